from typing import Any

import pytest

from fedllm_flwr.codecs import CODECS, FLOAT_CODECS
from fedllm_flwr.compose import compose_run
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.settings.wire import USES, WireConfig

PROMPT = ("method=fedprompt", "strategy=prompt_mean")
RESPROMPT = ("method=fedresprompt", "strategy=controller_mean")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"block_size": 0}, r"wire\.block_size: expected >= 1, got 0"),
        ({"low_rank": 0}, r"wire\.low_rank: expected >= 1, got 0"),
        ({"top_k_fraction": 0.0}, r"wire\.top_k_fraction: expected in \(0, 1\], got 0"),
        ({"top_k_fraction": 1.5}, r"wire\.top_k_fraction: expected in \(0, 1\], got 1\.5"),
        ({"error_feedback": True}, r"wire\.error_feedback=true and wire\.uplink=float32"),
        ({"error_feedback": True, "uplink": "bfloat16", "downlink": "int8"}, r"wire\.uplink=bfloat16: val"),
        ({"block_size": 64}, r"wire\.block_size=64, wire\.uplink=float32 and .*: only int8 and int4"),
        ({"block_size": 64, "uplink": "top_k"}, r"wire\.block_size=64, wire\.uplink=top_k"),
        ({"top_k_fraction": 0.5, "uplink": "int8"}, r"wire\.top_k_fraction=0\.5, .*: only top_k read it"),
        ({"low_rank": 2, "downlink": "int4"}, r"wire\.low_rank=2, .*: only low_rank read it"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_or_without_effect_is_named(
    changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        WireConfig(name="own", **changes)


def test_settings_reach_the_codecs_of_both_directions() -> None:
    wire = WireConfig(name="own", uplink="int4", downlink="top_k", block_size=8, top_k_fraction=0.5)
    assert wire.codec("uplink").size_bytes(((64,),)) == 8 * 4 + 32
    assert wire.codec("downlink").size_bytes(((64,),)) == 32 * 4 + 8
    assert wire.sends_updates
    assert wire.sends_differences


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_carries_values_or_differences(name: Any) -> None:
    assert WireConfig(name="own", uplink=name).sends_updates == (name not in FLOAT_CODECS)
    assert WireConfig(name="own", downlink=name).sends_differences == (name not in FLOAT_CODECS)
    assert all(set(readers) <= set(CODECS) for readers in USES.values())


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ((*RESPROMPT, "wire=int8"), r"wire\.uplink=int8 and method=fedresprompt: .* use float32, float16 or bfloat16"),
        ((*RESPROMPT, "wire.downlink=top_k"), r"wire\.downlink=top_k and method=fedresprompt"),
        (("wire.uplink=zip",), r"wire\.uplink: .*zip"),
        (("strategy=stack", "wire=int8"), r"wire\.error_feedback=true and strategy=stack"),
        (("strategy=svd", "wire=top_k"), r"wire\.error_feedback=true and strategy=svd"),
        (("strategy=residual", "wire=flasc"), r"wire\.downlink=top_k and strategy=residual"),
        (("strategy=svd", "wire.downlink=low_rank", "wire.low_rank=2"), r"wire\.downlink=low_rank and strategy=svd"),
        (("wire=low_rank", "method.rank=4"), r"wire\.uplink=low_rank, wire\.low_rank=4 and method\.rank=4"),
        (("wire.downlink=low_rank", "method.rank=2"), r"wire\.downlink=low_rank, wire\.low_rank=4 and method\.rank=2"),
        ((*PROMPT, "wire=low_rank", "method.length=4"), r"wire\.low_rank=4 and method\.length=4"),
        ((*PROMPT, "wire=low_rank", "method.length=1"), r"wire\.low_rank=4 and method\.length=1"),
        ((*PROMPT, "wire=low_rank", "method.kind=p_tuning", "method.placement=before", "method.start=random"),
         r"wire\.low_rank=4 and method\.kind=p_tuning"),
    ],
)  # fmt: skip
def test_what_a_method_cannot_bear_is_named_with_it(overrides: tuple[str, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        compose_run(["experiment=smoke", "baselines=none", *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy=stack", "wire=int8", "wire.error_feedback=false"),
        ("strategy=svd", "wire=int8", "wire.error_feedback=false"),
        ("strategy=residual", "wire=int4"),
        ("wire=low_rank", "method.client_ranks=[2,8]"),
        (*PROMPT, "wire=flasc"),
        (*RESPROMPT, "wire=bfloat16"),
    ],
    ids=str,
)
def test_what_goes_together_composes(overrides: tuple[str, ...]) -> None:
    compose_run(["experiment=smoke", "baselines=none", *overrides])
