import numpy as np
import pytest

from benchmarks import memory
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.shapes import layer_shapes


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load(ModelRef("tiny"), dtype="float32", device="cpu")


@pytest.mark.parametrize("name", memory.METHODS)
def test_every_method_trains(
    backbone: Backbone, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "METHODS", small(memory.METHODS))
    found = memory.measure(backbone, name, steps=2)
    assert len(found.seconds) == 2
    matrices = sum(layer.weight.nbytes for layer in backbone.linear_layers.values())
    trains_weights = not name.startswith(("LoRA", "soft", "prompt"))
    assert found.private == (matrices if trains_weights else 0)
    if name.startswith("AdamW"):
        assert found.state == 2 * matrices
    else:
        assert 0 < found.state < 2 * matrices
    monkeypatch.setattr(memory, "RANK", 4)
    shapes = [(s.out_features, s.in_features) for s in layer_shapes(backbone.ref, memory.TARGETS)]
    told = memory.predictions(shapes, backbone.hidden_size)[name]
    assert (found.state, found.sent) == (told.state, told.sent), "to the byte"
    assert told.held > told.state
    backbone.check_plain(backbone.linear_layers)


def small(methods: dict[str, memory.Method]) -> dict[str, memory.Method]:
    """The same with ranks that fit the tiny model."""
    grass = memory.GrassSettings(rank=4, refresh_interval=2)
    galore = memory.GaloreSettings(rank=4, refresh_interval=2)
    replaced = {
        memory.GRASS: memory.full(grass),
        "GRASS, frozen pass": memory.full(memory.GrassSettings(rank=4, rule="frozen_pass")),
        "GRASS, checkpoints": memory.full(grass, checkpointing=True),
        "GaLore": memory.full(galore),
    }
    assert set(replaced) < set(methods)
    return methods | replaced


def test_the_baseline_and_layer_by_layer_learn_the_same(backbone: Backbone) -> None:
    """Ratios compare methods that compute one thing: the same rows, loss and weights."""
    share = memory.share_of(len(backbone.head_weight()))
    losses = {
        name: [float(training.step()) for _ in range(3)]
        for name in (memory.BASELINE, memory.LAYERED)
        for training in memory.METHODS[name](backbone, share)
    }
    assert losses[memory.BASELINE] == pytest.approx(losses[memory.LAYERED], rel=1e-4)
    assert losses[memory.BASELINE][2] < losses[memory.BASELINE][0]


def test_ratios_are_those_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    def measured(extra: int, seconds: float, refresh: float = 1.0) -> memory.Measured:
        steps = [seconds, seconds, seconds, refresh]
        return memory.Measured(10**9, 10**6, 10**6, extra * 10**6, 10**6, steps)

    found = {name: [measured(100, 1.0)] * 3 for name in memory.METHODS}
    found[memory.BASELINE] = [measured(900, 3.0, 3.0), measured(1000, 2.0), measured(1100, 9.0)]
    figures = memory.figures_of(found)
    assert figures == pytest.approx({
        "grass_memory_ratio": 10.0,
        "grass_step_ratio": 3.0,
        "grass_step_ratio_fused": 1.0,
        "grass_step_ratio_layered": 1.0,
    })  # fmt: skip
    # a refresh counts for one of 200 steps
    assert memory.medians([measured(1, 2.0, 102.0)]) == pytest.approx((10**6, 2.5, 102.0))
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(memory.METHODS)
    memory.print_predictions(found)
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(memory.METHODS)


def test_sizes_are_those_of_this_process() -> None:
    before = memory.status("VmRSS")
    held = np.ones(64_000_000, dtype=np.uint8)  # more than malloc ever takes from pages it has
    assert memory.status("VmRSS") - before > 0.8 * held.nbytes
    assert memory.status("VmHWM") >= memory.status("VmRSS") - held.nbytes
