"""PEFT's own prompt methods over the shared backbone, for comparison with ours: prompt, prefix and P-tuning.

The module that is trained is PEFT's; only its input and output are handled here. The frozen model is
neither copied nor changed.

Axes: l virtual tokens, b rows, t tokens, d hidden size, w width of what the module gives for a virtual token:
d, or for a prefix the keys and values of all layers; P size of a flat module.
"""

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.prompt_start import (
    InputEmbeddings,
    StartKind,
    embeddings_of,
    meta_model,
    start_prompt,
    start_tokens,
)
from fedllm_flwr.seeding import numpy_generator

PeftPromptKind = Literal["prompt_tuning", "prefix_tuning", "p_tuning"]
PREFIX_RMS = 0.02
"""Of a prefix's random start: not zero, since virtual tokens that start equal stay equal. Whatever the size,
such a prefix draws attention to nothing and costs loss at first; :func:`start_prefix` avoids that."""
_NAME = "default"


@dataclass(frozen=True)
class PeftPromptSpec:
    """Settings of one of PEFT's prompt methods.

    Attributes:
        kind: ``prompt_tuning``: the embeddings of virtual tokens before the row. ``p_tuning``: the same, given by
            an embedding and a multi-layer perceptron, both trained. ``prefix_tuning``: keys and values of
            virtual tokens in every layer.
        length: Virtual tokens l, at least 1.
        encoder_hidden_size: Width of the perceptron. Of ``p_tuning``: 0 = the model's hidden size. Of
            ``prefix_tuning``: 0 = the keys and values themselves are trained. Of ``prompt_tuning``: 0.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Lester et al. 2021 (prompt tuning); Li and Liang 2021 (prefix tuning), section 4; Liu et al. 2021
        (P-tuning) with a perceptron in the place of its LSTM, PEFT's default.
    """

    kind: PeftPromptKind
    length: int
    encoder_hidden_size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(PeftPromptKind):
            known = ", ".join(get_args(PeftPromptKind))
            raise ConfigError(f"PEFT prompt: expected one of {known}, got {self.kind!r}")
        if self.length < 1:
            raise ConfigError(f"PEFT prompt length: expected at least 1, got {self.length}")
        if self.encoder_hidden_size < 0 or (
            self.kind == "prompt_tuning" and self.encoder_hidden_size
        ):
            wanted = "0" if self.kind == "prompt_tuning" else "at least 0"
            raise ConfigError(
                f"{self.kind} encoder_hidden_size: expected {wanted}, got {self.encoder_hidden_size}"
            )

    @property
    def dropout(self) -> float:
        """There is none."""
        return 0.0

    @property
    def alone(self) -> bool:
        """Whether clients are trained one after the other: PEFT's modules serve one at a time."""
        return True


class FlatModule:
    """A module's parameters as views into one flat float32 array, in the order of :func:`flat_order`.

    Args:
        module: PEFT's module; its parameters are moved into the array.
        device: Where the array is.

    Attributes:
        module: The module, which computes with whatever the array holds.
    """

    def __init__(self, module: Any, device: torch.device) -> None:
        self.module = module.to_empty(device=device).float()
        self._parameters: list[nn.Parameter] = list(module.parameters())
        sizes = [parameter.numel() for parameter in self._parameters]
        self._flat = torch.zeros(sum(sizes), device=device)
        for parameter, piece in zip(self._parameters, self._flat.split(sizes), strict=True):
            parameter.data = piece.view(parameter.shape)

    def load(self, flat: np.ndarray) -> None:
        """Copy values [P] in.

        Raises:
            ShapeError: The array has another size.
        """
        if flat.shape != tuple(self._flat.shape):
            raise ShapeError(f"flat prompt: expected {tuple(self._flat.shape)}, got {flat.shape}")
        self._flat.copy_(torch.from_numpy(np.require(flat, np.float32, ["C", "W"])))

    def read(self) -> np.ndarray:
        """A float32 copy of the values [P]."""
        return self._flat.to("cpu", copy=True).numpy()

    def parameters(self) -> list[nn.Parameter]:
        """The module's parameters."""
        return self._parameters


class AttachedPrompt:
    """PEFT's module of one specification beside a shared backbone. Get it from :func:`attach_prompt`.

    Attributes:
        backbone: The shared model.
        spec: Settings.
        values: The module and its flat array.
    """

    def __init__(self, backbone: Backbone, spec: PeftPromptSpec) -> None:
        self.backbone = backbone
        self.spec = spec
        self._peft = wrap(backbone.model, spec)
        self.values = FlatModule(self._peft.prompt_encoder[_NAME], backbone.device)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Final hidden states behind the virtual tokens, differentiable in the module's parameters.

        Args:
            input_ids: Token ids [b, t], padded on the right.

        Returns:
            States [b, t, d] of the tokens, in the model's dtype; those of virtual tokens are left out.
        """
        decoder = self.backbone.model.base_model
        prompt = self._peft.get_prompt(batch_size=len(input_ids))
        if self.spec.kind == "prefix_tuning":
            return decoder(input_ids=input_ids, past_key_values=prompt).last_hidden_state
        embedded = self.backbone.model.get_input_embeddings()(input_ids)
        inputs = torch.cat([prompt.to(embedded.dtype), embedded], dim=1)
        states = decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return states[:, self.spec.length :]


def attach_prompt(backbone: Backbone, spec: PeftPromptSpec) -> AttachedPrompt:
    """PEFT's module of a specification for a backbone: made at the first call, the same object afterwards."""
    if spec not in backbone.attached:
        backbone.attached[spec] = AttachedPrompt(backbone, spec)
    attached: AttachedPrompt = backbone.attached[spec]
    return attached


def wrap(model: Any, spec: PeftPromptSpec) -> Any:
    """PEFT's model of a specification around a model, whose own modules, values and settings stay as they are.

    Args:
        model: A transformers model, also one without values.
        spec: Settings; PEFT's module in it has random start values, drawn apart from the global generator.
    """
    size = spec.encoder_hidden_size
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": spec.length}
    config: Any
    if spec.kind == "prompt_tuning":
        config = PromptTuningConfig(**common)
    else:
        common["encoder_hidden_size"] = size or None
        config = (
            PromptEncoderConfig(**common)
            if spec.kind == "p_tuning"
            else PrefixTuningConfig(**common, prefix_projection=bool(size))
        )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT 0.21 asks for a property that transformers 5.23 has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config, adapter_name=_NAME)


def meta_config(ref: ModelRef, spec: PeftPromptSpec) -> Any:
    """PEFT's configuration with the model's sizes filled in, a new one at each call; the model is not loaded.

    Args:
        ref: Which model.
        spec: Settings.

    Raises:
        AssetError: The model is absent, or no causal language model.
    """
    return wrap(meta_model(ref), spec).peft_config[_NAME]


@lru_cache(maxsize=16)
def flat_order(ref: ModelRef, spec: PeftPromptSpec) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Where a module's parameters lie in a flat array, from the model's configuration alone.

    Args:
        ref: Which model.
        spec: Settings.

    Returns:
        Names in the module and shapes, each row by row: first ``embedding.weight`` [l, ...], then, if there is a
        perceptron, weight and bias of its layers from its input to its output.

    Raises:
        AssetError: The model is absent, or no causal language model.
    """
    module = wrap(meta_model(ref), spec).prompt_encoder[_NAME]
    return tuple((name, tuple(value.shape)) for name, value in module.named_parameters())


def flat_size(ref: ModelRef, spec: PeftPromptSpec) -> int:
    """Elements P of a flat module: what a client sends.

    Args:
        ref: Which model.
        spec: Settings.

    Raises:
        AssetError: As :func:`flat_order`.
    """
    return sum(math.prod(shape) for _, shape in flat_order(ref, spec))


@torch.no_grad()
def module_output(ref: ModelRef, spec: PeftPromptSpec, flat: np.ndarray) -> np.ndarray:
    """What a module gives for its virtual tokens: all that is needed to use it, and what PEFT saves.

    Args:
        ref: Which model; it is not loaded.
        spec: Settings.
        flat: Values [P].

    Returns:
        float32 [l, w].

    Raises:
        AssetError: As :func:`flat_order`.
        ShapeError: The array has another size.
    """
    values = FlatModule(wrap(meta_model(ref), spec).prompt_encoder[_NAME], torch.device("cpu"))
    values.load(flat)
    output: np.ndarray = values.module(torch.arange(spec.length)[None])[0].numpy()
    return output


def start_module(
    ref: ModelRef,
    spec: PeftPromptSpec,
    embeddings: InputEmbeddings,
    seed: int,
    *,
    kind: StartKind = "random",
    text: str = "",
) -> np.ndarray:
    """The values that training starts from; every process that asks alike gets the same.

    Args:
        ref: Which model; it is not loaded.
        spec: Settings.
        embeddings: The model's input embedding.
        seed: Address of the draws; every parameter has its own below it.
        kind: As in :func:`fedllm_flwr.models.prompt_start.start_prompt`; the other methods know ``random`` only here,
            and a plain prefix has :func:`start_prefix`.
        text: As there.

    Returns:
        float32 [P].

    Raises:
        ConfigError: The kind or the text does not fit.
        AssetError: As :func:`flat_order`.

    Source:
        PEFT's distributions: normal for the embedding, uniform in ±1/sqrt(inputs) for linear layers. Differs in
        size: the last layer is scaled, so that virtual tokens have the root mean square of an average input
        embedding, and keys and values of a prefix that of ``PREFIX_RMS``.
    """
    if spec.kind == "prompt_tuning":
        return start_prompt(embeddings, spec.length, kind, seed, text)
    if kind != "random" or text:
        raise ConfigError(f"{spec.kind} start: expected kind random and no text, got {kind} {text}")
    order = flat_order(ref, spec)
    pieces = []
    for name, shape in order:
        draws = numpy_generator(seed, "prompt", spec.kind, name)
        if name == "embedding.weight":
            pieces.append(draws.standard_normal(shape))
        else:
            weight = dict(order)[name.replace("bias", "weight")]
            pieces.append(draws.uniform(-1, 1, shape) / math.sqrt(weight[1]))
    flat = np.concatenate([piece.flatten() for piece in pieces]).astype(np.float32)
    output = module_output(ref, spec, flat).astype(np.float64)
    mean = float(np.sqrt(np.square(output).mean(axis=1)).mean())
    wanted = PREFIX_RMS if spec.kind == "prefix_tuning" else embeddings.mean_rms
    last = sum(piece.size for piece in pieces[-2:])  # weight and bias, or the embedding alone
    flat[-last:] *= wanted / mean
    return flat


@torch.no_grad()
def start_prefix(
    backbone: Backbone, spec: PeftPromptSpec, kind: StartKind, seed: int, text: str = ""
) -> np.ndarray:
    """A prefix that starts as keys and values of real tokens, as if they stood before the row.

    Args:
        backbone: The model, since every layer has to be computed.
        spec: Settings of a prefix without a perceptron.
        kind: Which tokens, as in :func:`fedllm_flwr.models.prompt_start.start_tokens`.
        seed: As there.
        text: As there.

    Returns:
        float32 [P].

    Raises:
        ConfigError: The kind or the text does not fit, or the spec is another.

    Source:
        Li and Liang 2021, section 7.4 (initialization): real words start a prefix better than random values.
    """
    if spec.kind != "prefix_tuning" or spec.encoder_hidden_size:
        raise ConfigError(
            f"prefix start {kind}: expected prefix_tuning with encoder_hidden_size 0, got {spec.kind} "
            f"with {spec.encoder_hidden_size}"
        )
    tokens = start_tokens(embeddings_of(backbone), spec.length, kind, seed, text)
    ids = torch.from_numpy(tokens)[None].to(backbone.device)
    layers = backbone.model.base_model(input_ids=ids, use_cache=True).past_key_values.layers
    pairs = torch.stack([torch.cat([layer.keys, layer.values]) for layer in layers])
    # [layer, key or value, head, token, width of a head] -> token by token, as PEFT cuts it
    flat: np.ndarray = pairs.permute(3, 0, 1, 2, 4).flatten().float().cpu().numpy()
    return flat
