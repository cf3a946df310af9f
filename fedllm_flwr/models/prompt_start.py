"""The values that a soft prompt starts from, in the size of the model's own input embeddings.

What counts is what the embedding module gives, not what it stores: some models multiply the stored rows.
A process without the model, such as the server, reads the embedding alone from the cache.

Axes: l soft tokens of a prompt, d width of the input embeddings, V rows of the embedding, n tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedllm_flwr.errors import AssetError, ConfigError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.cache import converted
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.convert import reading_errors
from fedllm_flwr.models.kernels import choose
from fedllm_flwr.models.shapes import model_config
from fedllm_flwr.models.tiny import tiny_model, tiny_tokenizer
from fedllm_flwr.seeding import numpy_generator

StartKind = Literal["random", "vocabulary", "text"]
_CHUNK = 4096  # embeddings that are in float32 at a time


@dataclass(frozen=True, eq=False)
class InputEmbeddings:
    """A model's input embedding and its tokenizer.

    Attributes:
        module: The embedding, in the dtype that the model computes in.
        tokenizer: The model's tokenizer.
    """

    module: Any
    tokenizer: Any

    @property
    def size(self) -> int:
        """Rows V, which may be more than the tokenizer has tokens."""
        return int(self.module.weight.shape[0])

    @property
    def width(self) -> int:
        """Values d of one embedding."""
        return int(self.module.weight.shape[1])

    @torch.no_grad()
    def rows(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """What the model reads for these tokens.

        Args:
            token_ids: [n].

        Returns:
            float32 [n, d], a copy of values that the compute dtype holds exactly.
        """
        ids = torch.tensor(np.asarray(token_ids, dtype=np.int64), device=self.module.weight.device)
        found: Tensor = self.module(ids)
        return found.float().cpu().numpy()

    @cached_property
    def mean_rms(self) -> float:
        """Root mean square of an embedding, averaged over the V rows."""
        total = 0.0
        for start in range(0, self.size, _CHUNK):
            values = self.rows(np.arange(start, min(start + _CHUNK, self.size)))
            total += float(_rms(values).sum())
        return total / self.size

    def ordinary_tokens(self) -> np.ndarray:
        """Ids of the tokens that the tokenizer learned from text, rising; special and added ones are left out."""
        odd = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        vocabulary = min(self.size, len(self.tokenizer))
        return np.array([token for token in range(vocabulary) if token not in odd], dtype=np.int64)


def embeddings_of(backbone: Backbone) -> InputEmbeddings:
    """The input embedding of a loaded model; nothing is copied."""
    return InputEmbeddings(backbone.model.get_input_embeddings(), backbone.tokenizer)


def embedding_table(ref: ModelRef, dtype: str = "auto") -> InputEmbeddings:
    """The input embedding of a model that is not loaded; no other weights are read.

    Args:
        ref: Which model.
        dtype: As in :func:`fedllm_flwr.models.backbone.load`. The same dtype gives the same values, to the bit, as the
            loaded model's embedding.

    Returns:
        The embedding on the CPU, its rows mapped from the cached weights.

    Raises:
        ConfigError: The dtype is unknown.
        AssetError: The model's source is absent or unreadable, or has no such weight.
    """
    kernels = choose(dtype)
    if ref.entry.source == "built":
        built: nn.Module = tiny_model().get_input_embeddings()
        module: Any = built.to(kernels.torch_dtype).requires_grad_(False)
        return InputEmbeddings(module, tiny_tokenizer())
    folder = converted(ref, kernels.dtype)
    model = meta_model(ref)
    module = model.get_input_embeddings()
    name = next(name for name, found in model.named_modules() if found is module)
    with reading_errors(folder):
        weight = _stored(ref, folder, f"{name}.weight")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    _materialise(model, module, weight)
    return InputEmbeddings(module, tokenizer)


@lru_cache(maxsize=8)
def prompt_width(ref: ModelRef) -> int:
    """Values d of one soft token, from the model's configuration alone.

    Args:
        ref: Which model.

    Raises:
        AssetError: The model is absent, or no causal language model.
    """
    return int(meta_model(ref).get_input_embeddings().weight.shape[1])


def meta_model(ref: ModelRef) -> Any:
    """The model built from its configuration without values, which takes milliseconds.

    Args:
        ref: Which model.

    Raises:
        AssetError: As in :func:`prompt_width`.
    """
    config = model_config(ref)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise AssetError(
            f"model {ref.label}: {config.model_type} is not a causal language model"
        ) from error


def start_prompt(
    embeddings: InputEmbeddings, length: int, kind: StartKind, seed: int, text: str = ""
) -> np.ndarray:
    """The soft prompt that training starts from; every process that asks alike gets the same.

    Clients must start from one prompt: soft tokens are averaged place by place.

    Args:
        embeddings: Of the model.
        length: Soft tokens l, at least 1.
        kind: ``random``: normal, every soft token scaled to the root mean square of an average embedding.
            ``vocabulary``: the embeddings of l different ordinary tokens, drawn at random. ``text``: those of a
            text's tokens, repeated from its beginning or cut to l.
        seed: Address of the draws; not read for ``text``.
        text: Of kind ``text``.

    Returns:
        float32 [l * d].

    Raises:
        ConfigError: The kind is unknown, the length is below 1 or beyond the vocabulary, or the text is empty, or it is
            given to another kind.

    Source:
        Lester et al. 2021, section 3.2, for ``vocabulary`` and ``text``. PEFT draws ``vocabulary`` with repetition and
        special tokens among it, lets the tokenizer add special tokens to ``text``, and its ``random`` prompt has
        variance 1, some ten times an embedding's norm in many models.
    """
    if kind != "random":
        return embeddings.rows(start_tokens(embeddings, length, kind, seed, text)).flatten()
    _check_start(length, kind, text)
    values = numpy_generator(seed, "prompt", kind).standard_normal((length, embeddings.width))
    values *= embeddings.mean_rms / _rms(values)[:, None]
    return values.astype(np.float32).flatten()


def start_tokens(
    embeddings: InputEmbeddings, length: int, kind: StartKind, seed: int, text: str = ""
) -> np.ndarray:
    """The tokens that a start of kind ``vocabulary`` or ``text`` is made of.

    Args:
        embeddings: As in :func:`start_prompt`.
        length: As there.
        kind: As there, but not ``random``.
        seed: As there.
        text: As there.

    Returns:
        Token ids, int64 [l].

    Raises:
        ConfigError: As there, or the kind has no tokens.
    """
    _check_start(length, kind, text)
    if kind == "random":
        raise ConfigError("prompt start random: expected vocabulary or text, which are tokens")
    if kind == "text":
        return _text_tokens(embeddings, length, text)
    tokens = embeddings.ordinary_tokens()
    if length > len(tokens):
        raise ConfigError(
            f"prompt start vocabulary: expected a length of at most {len(tokens)} tokens, got {length}"
        )
    return numpy_generator(seed, "prompt", kind).choice(tokens, length, replace=False)


def _check_start(length: int, kind: str, text: str) -> None:
    if kind not in get_args(StartKind):
        raise ConfigError(f"prompt start: expected random, vocabulary or text, got {kind!r}")
    if length < 1:
        raise ConfigError(f"prompt length: expected at least 1, got {length}")
    if bool(text) != (kind == "text"):
        raise ConfigError(f"prompt start {kind}: expected a text for kind text only, got {text!r}")


def _text_tokens(embeddings: InputEmbeddings, length: int, text: str) -> np.ndarray:
    # nothing that is spelled out in the text counts as a special token
    options = {"add_special_tokens": False, "split_special_tokens": True}
    tokens = embeddings.tokenizer(text, **options)["input_ids"]
    if not tokens:
        raise ConfigError(f"prompt start text: expected a text with tokens, got {text!r}")
    return np.resize(np.array(tokens, dtype=np.int64), length)


def _rms(values: np.ndarray) -> np.ndarray:
    """Root mean square of each row [n]."""
    return np.sqrt(np.square(values, dtype=np.float64).mean(axis=1))


def _stored(ref: ModelRef, folder: Path, name: str) -> Tensor:
    """A weight by its name in the model; a checkpoint's own names may have more or fewer parts in front."""
    holders: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            holders.update((key, file) for key in weights.keys())  # noqa: SIM118  # no mapping
    alike = [
        key for key in holders if f".{key}".endswith(f".{name}") or f".{name}".endswith(f".{key}")
    ]
    [key, *others] = [name] if name in holders else alike or [""]
    if not key or others:
        raise AssetError(
            f"model {ref.label}: expected one weight {name} in its files, got {len(alike)}"
        )
    with safe_open(holders[key], framework="pt") as weights:
        return weights.get_tensor(key)


def _materialise(model: Any, module: Any, weight: Tensor) -> None:
    """Give an embedding without values its weight, and what else it holds, as loading the model would."""
    module.weight = nn.Parameter(module.weight[:1], requires_grad=False)
    module.padding_idx = None  # matters in training only, and must lie within the weight
    module.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        model._init_weights(module)  # sets buffers that no checkpoint stores, such as a scale
    module.weight = nn.Parameter(weight, requires_grad=False)
