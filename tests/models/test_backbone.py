import logging
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from fedllm_flwr.errors import AssetError, ConfigError
from fedllm_flwr.models import backbone as backbone_module
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.tiny import tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9], [20, 21, 22, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_loaded_once_per_process(tiny: Backbone) -> None:
    assert load(ModelRef("tiny"), dtype="float32") is tiny
    other = load(ModelRef("tiny"), dtype="bfloat16")
    assert other is not tiny
    assert other.dtype == torch.bfloat16
    assert load(ModelRef("tiny"), dtype="bfloat16") is other


def test_frozen_and_in_evaluation_mode(tiny: Backbone) -> None:
    assert not tiny.model.training
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())
    assert tiny.hidden_size == 64


@pytest.mark.parametrize("max_tokens", [256, 512])
def test_hidden_and_head_are_the_models_logits(max_tokens: int) -> None:
    model = load(ModelRef("tiny"), dtype="float32", max_tokens=max_tokens)
    assert model.model.config._attn_implementation == ("eager" if max_tokens == 256 else "sdpa")
    with torch.no_grad():
        logits = model.model(input_ids=IDS, attention_mask=MASK).logits
        ours = model.hidden(IDS, MASK) @ model.head_weight().t()
    torch.testing.assert_close(ours[MASK.bool()], logits[MASK.bool()])


def test_padding_on_the_right_changes_nothing_before_it(tiny: Backbone) -> None:
    with torch.no_grad():
        padded = tiny.hidden(IDS, MASK)[1, :3]
        alone = tiny.hidden(IDS[1:, :3])[0]
    torch.testing.assert_close(padded, alone)


def test_head_rows(tiny: Backbone) -> None:
    rows = tiny.head_weight((7, 3))
    assert torch.equal(rows, tiny.model.lm_head.weight[[7, 3]])
    assert tiny.head_weight((7, 3)) is rows
    assert tiny.head_weight().data_ptr() == tiny.model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("token_ids", [None, (4, 9, 30)])
def test_row_losses_are_the_models_cross_entropy(
    tiny: Backbone, token_ids: tuple[int, ...] | None
) -> None:
    targets = torch.tensor([2, 1, 0])
    with torch.no_grad():
        hidden = tiny.hidden(IDS)[0, :3]
        logits = tiny.model(input_ids=IDS).logits[0, :3]
    logits = logits if token_ids is None else logits[:, list(token_ids)]
    expected = functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(tiny.row_losses(hidden, targets, token_ids), expected)
    losses, best = tiny.row_scores(hidden, targets, token_ids)
    torch.testing.assert_close(losses, expected)
    assert torch.equal(best, logits.argmax(1))


def save(model: nn.Module, folder: Path) -> ModelRef:
    model.save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    return ModelRef("path", path=str(folder))


def soft_capped(folder: Path) -> ModelRef:
    config = Gemma2Config(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return save(Gemma2ForCausalLM(config), folder)


def test_soft_capped_model_has_its_own_loss(tmp_path: Path) -> None:
    model = load(soft_capped(tmp_path / "gemma2"), dtype="float32")
    assert model.logit_transform is not None
    assert model.logit_transform.softcap == 2.0
    with torch.no_grad():
        expected = model.model(input_ids=IDS[:1], labels=IDS[:1]).loss
        hidden = model.hidden(IDS[:1])[0, :-1]
        plain = functional.cross_entropy(hidden @ model.head_weight().t(), IDS[0, 1:])
    torch.testing.assert_close(model.row_losses(hidden, IDS[0, 1:]).mean(), expected)
    assert abs(plain - expected) > 0.1  # the cap matters here


def test_unknown_head_falls_back_to_full_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backbone_module, "find_transform", lambda model: None)
    with caplog.at_level(logging.WARNING):
        model = load(soft_capped(tmp_path / "gemma2"), dtype="float32")
    assert "losses hold full logits (400 floats per position)" in caplog.text
    hidden = model.hidden(IDS[:1])[0, :-1].requires_grad_()
    losses = model.row_losses(hidden, IDS[0, 1:])
    with torch.no_grad():
        torch.testing.assert_close(
            losses.mean(), model.model(input_ids=IDS[:1], labels=IDS[:1]).loss
        )
    losses.sum().backward()
    assert hidden.grad is not None
    scores, best = model.row_scores(hidden, torch.tensor([0, 1, 1, 0]), (4, 9))
    assert scores.shape == best.shape == (4,)
    torch.testing.assert_close(scores, model.row_losses(hidden, torch.tensor([0, 1, 1, 0]), (4, 9)))


def test_model_with_conv1d_layers(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=400, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
        )
        ref = save(GPT2LMHeadModel(config), tmp_path / "gpt2")
    model = load(ref, dtype="float32")
    assert list(model.target_layers(("c_attn",))) == ["transformer.h.0.attn.c_attn"]
    with torch.no_grad():
        logits = model.model(input_ids=IDS[:1]).logits
        torch.testing.assert_close(model.hidden(IDS[:1]) @ model.head_weight().t(), logits)


def test_model_without_a_head_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    ref = save(BertModel(config), tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(AssetError, match="not a causal language model"):
        load(ref, dtype="float32")


def test_target_layers(tiny: Backbone) -> None:
    names = list(tiny.target_layers(("v_proj", "q_proj")))
    assert names == sorted(names)
    assert len(names) == 4
    assert len(tiny.target_layers(("all-linear",))) == 14
    assert list(tiny.target_layers(("*.layers.[1-9].*.[qv]_proj",))) == [
        f"model.layers.1.self_attn.{each}_proj" for each in "qv"
    ]
    assert list(tiny.target_layers(("model.layers.1.mlp.up_proj",))) == [
        "model.layers.1.mlp.up_proj"
    ]


@pytest.mark.parametrize("target", ["query", "lm_head", "proj", "self_attn"])
def test_unknown_target_lists_the_linear_layers(tiny: Backbone, target: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny.target_layers(("q_proj", target))
    assert str(caught.value) == (
        f"target module '{target}' is no linear layer of model tiny; it has "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


def test_swapped_layers_come_back_after_an_error(tiny: Backbone) -> None:
    name = "model.layers.0.self_attn.q_proj"
    plain = tiny.model.get_submodule(name)

    def use_and_fail() -> None:
        with tiny.swapped({name: nn.Identity()}):
            assert isinstance(tiny.model.get_submodule(name), nn.Identity)
            with pytest.raises(RuntimeError, match="another adapter is active"):
                tiny.swapped({name: plain}).__enter__()
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        use_and_fail()
    assert tiny.model.get_submodule(name) is plain


def test_absent_device_is_refused_before_anything_loads() -> None:
    with pytest.raises(ConfigError, match="'cuda:99' is not present"):
        load(ModelRef("path", path="nowhere"), device="cuda:99")


@pytest.mark.assets
def test_smollm2_knows_a_capital_and_speaks_english() -> None:
    model = load(ModelRef("smollm2_135m"))
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = model.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt"
    )
    prompt = prompt["input_ids"]
    answer = model.model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert "Paris" in model.tokenizer.decode(answer)
    english = (
        "The committee met on Tuesday to discuss the new budget, and most of its members agreed that "
        "spending on schools should rise next year, although nobody could say where the money would come from."
    )
    ids = model.tokenizer(english, return_tensors="pt").input_ids[0]
    losses, _ = model.row_scores(model.hidden(ids[None])[0, :-1], ids[1:])
    # 3.4 nats per token for right weights; 10.8 = ln(49152) for wrong ones
    assert losses.mean() < 3.8


MAPPED = """
import sys, torch
from fedllm_flwr.models.adapters import LoraSpec, attach
from fedllm_flwr.models.backbone import load
from fedllm_flwr.models.catalog import ModelRef

def mappings():
    ranges, sums, inside = [], {}, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first = line.split()[0]
            if not first.endswith(":"):
                inside = line.rstrip().endswith("model.safetensors")
                if inside:
                    ranges.append([int(part, 16) for part in first.split("-")])
            elif inside and line.rstrip().endswith(" kB"):
                sums[first] = sums.get(first, 0) + int(line.split()[1])
    return ranges, sums

model = load(ModelRef("smollm2_135m"), dtype="bfloat16")
attached = attach(model, LoraSpec(8, 16))
ids = torch.arange(100, 116)[None]
with attached.active(train=True):  # a training step must not copy the weights either
    hidden = model.hidden(ids)[0]
    model.row_losses(hidden[:-1], ids[0, 1:]).sum().backward()
print("ready", flush=True)
sys.stdin.readline()
ranges, sums = mappings()
outside = 0
for tensor in model.model.parameters():
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    outside += 0 if any(low <= start and stop <= high for low, high in ranges) else tensor.nbytes
print(outside, *(sums[key] for key in ("Rss:", "Pss:", "Private_Dirty:", "Anonymous:")), flush=True)
sys.stdin.readline()
"""


@pytest.mark.assets
@pytest.mark.slow
def test_two_processes_share_the_pages_of_the_weights(
    start_python: Callable[..., "Popen[str]"],
) -> None:
    processes = [start_python(MAPPED) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready == "ready\n", process.communicate()
    measured = []
    for process in processes:  # both are alive and have touched every page
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("measure\n")
        process.stdin.flush()
        measured.append([int(word) for word in process.stdout.readline().split()])
    for outside, resident, proportional, private_dirty, anonymous in measured:
        assert outside == 0  # every weight lies in the mapped file
        assert private_dirty == anonymous == 0  # and none was copied on write
        assert resident > 200 * 1024  # kB; the file has 257 MiB
        assert proportional < 0.6 * resident
