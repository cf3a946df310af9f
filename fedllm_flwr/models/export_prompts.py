"""Prompts on disk in PEFT's own format, so that any program that knows PEFT can use the result of a run.

Axes: l soft tokens, n tokens of a fixed text, d width of the input embeddings, w width of what PEFT stores for one
virtual token: d, or for a prefix the keys and values of all layers.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from fedllm_flwr.errors import ConfigError, DataError, ShapeError
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.export import CONFIG_FILE, WEIGHTS_FILE
from fedllm_flwr.models.peft_prompts import PeftPromptSpec, meta_config, module_output
from fedllm_flwr.models.prompt_start import embedding_table, prompt_width
from fedllm_flwr.prompts import PromptSpec, Segment

SPEC_FILE = "prompt.json"
"""Segments, placement and fixed text of a prompt of ours, which PEFT has no place for and does not read."""
README_FILE = "README.md"
_KEY = "prompt_embeddings"
_KINDS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")


@dataclass(frozen=True, eq=False)
class ImportedPrompt:
    """A prompt as it is needed to compute with it.

    Attributes:
        spec: Settings; of a prompt that is all embeddings a :class:`PromptSpec`, of a prefix PEFT's.
        flat: Its values, float32.
        fixed_ids: With placement ``after``: the text ahead of the prompt, which rows are to begin with.
    """

    spec: PromptSpec | PeftPromptSpec
    flat: np.ndarray
    fixed_ids: tuple[int, ...] = ()


def export_prompt(
    folder: Path,
    ref: ModelRef,
    spec: PromptSpec | PeftPromptSpec,
    flat: np.ndarray,
    *,
    fixed_ids: Sequence[int] = (),
    dtype: str = "auto",
) -> None:
    """Write a prompt that ``PeftModel.from_pretrained(base, folder)`` loads.

    PEFT puts virtual tokens before everything. So for a prompt behind a fixed text, the embeddings of that text are
    virtual tokens too, and what is fed is the rest of the row. Perceptrons are not written, only what they give, as
    PEFT does itself. A ``README.md`` beside it says what to feed.

    Args:
        folder: Created if absent; earlier files of the same names are replaced. The same input gives the same bytes.
        ref: The base model; no more of it than its configuration and its input embedding is read.
        spec: Settings of the prompt.
        flat: Its values.
        fixed_ids: Token ids [n] of the fixed text; read only with placement ``after``.
        dtype: What the model computes in, as in :func:`fedllm_flwr.models.backbone.load`; decides the values of the
            fixed text's embeddings.

    Raises:
        ShapeError: The array has another size.
        AssetError: The model is absent.
    """
    own: dict[str, Any] = {}
    fixed: tuple[int, ...] = ()
    fixed_text = ""
    if isinstance(spec, PeftPromptSpec):
        kind, values = spec, module_output(ref, spec, flat)
    else:
        values = _rows(ref, spec, flat)
        if spec.placement == "after" and len(fixed_ids):
            embeddings = embedding_table(ref, dtype)
            fixed = tuple(int(token) for token in fixed_ids)
            fixed_text = embeddings.tokenizer.decode(list(fixed))
            values = np.concatenate([embeddings.rows(fixed), values])
        own = {**asdict(spec), "fixed_ids": fixed}
        kind = PeftPromptSpec("prompt_tuning", len(values))
    config = meta_config(ref, kind)
    config.inference_mode = True
    config.base_model_name_or_path = ref.base_name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_KEY: np.ascontiguousarray(values, np.float32)}
    safetensors.numpy.save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_json(folder / CONFIG_FILE, config.to_dict())
    readme = _readme(ref, kind, fixed_text, len(fixed))
    (folder / README_FILE).write_text(readme, encoding="utf-8")
    (folder / SPEC_FILE).unlink(missing_ok=True)
    if own:
        _write_json(folder / SPEC_FILE, own)


def import_prompt(folder: Path) -> ImportedPrompt:
    """Read a prompt in PEFT's format, whoever wrote it, to compute with it.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        What :func:`export_prompt` was given, segments and fixed text included. Of PEFT's kinds with a perceptron, and
        of folders that others wrote, the virtual tokens as a plain prompt before the row, or as a plain prefix.

    Raises:
        DataError: A file is missing or malformed, or the adapter is no prompt of a causal language model.
    """
    config = _read_config(folder)
    file = folder / WEIGHTS_FILE
    try:
        values = safetensors.numpy.load_file(file)[_KEY].astype(np.float32)
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    length = config["num_virtual_tokens"]
    if values.ndim != 2 or len(values) != length:
        raise DataError(f"{file}: expected {length} virtual tokens, got shape {values.shape}")
    if config["peft_type"] == "PREFIX_TUNING":
        return ImportedPrompt(PeftPromptSpec("prefix_tuning", length), values.flatten())
    spec, fixed = _read_spec(folder, length)
    return ImportedPrompt(spec, values[len(fixed) :].flatten(), fixed)


def _read_spec(folder: Path, length: int) -> tuple[PromptSpec, tuple[int, ...]]:
    """Segments and fixed text of a prompt of ours; one segment and no text of anyone else's."""
    file = folder / SPEC_FILE
    if not file.exists():
        return PromptSpec((Segment("prompt", length),), "before"), ()
    try:
        own = json.loads(file.read_text(encoding="utf-8"))
        segments = tuple(Segment(**segment) for segment in own["segments"])
        spec = PromptSpec(segments, own["placement"])
        fixed = tuple(int(token) for token in own["fixed_ids"])
    except (OSError, KeyError, TypeError, ValueError, ConfigError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if len(fixed) + spec.length != length:
        wanted = f"{length} fixed and soft tokens, as many as {CONFIG_FILE} says"
        raise DataError(f"{file}: expected {wanted}, got {len(fixed)} + {spec.length}")
    return spec, fixed


def _rows(ref: ModelRef, spec: PromptSpec, flat: np.ndarray) -> np.ndarray:
    """The prompt as [l, d]."""
    width = prompt_width(ref)
    if flat.shape != (spec.length * width,):
        raise ShapeError(
            f"export: expected a flat prompt of ({spec.length * width},) = {spec.length} x {width}, "
            f"got {flat.shape}"
        )
    return flat.reshape(spec.length, width)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if config.get("peft_type") not in _KINDS:
        wanted = ", ".join(_KINDS)
        raise DataError(f"{file}: expected peft_type {wanted}, got {config.get('peft_type')!r}")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise DataError(
            f"{file}: expected one transformer submodule, got {config['num_transformer_submodules']}"
        )
    if not isinstance(config.get("num_virtual_tokens"), int):
        raise DataError(f"{file}: num_virtual_tokens is missing")
    return config


def _readme(ref: ModelRef, kind: PeftPromptSpec, fixed_text: str, num_fixed: int) -> str:
    """What the folder is and what to feed."""
    lines = [
        f"# A trained prompt for {ref.base_name}",
        "",
        f"PEFT `{kind.kind}`, {kind.length} virtual tokens. Load it over the base model:",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base_model, "this folder")',
        "```",
        "",
        "## What to feed",
        "",
    ]
    if not num_fixed:
        lines += [
            "The whole text, with the special tokens that the tokenizer or the chat template puts in front.",
            "The virtual tokens stand before all of it.",
        ]
        return "\n".join(lines) + "\n"
    fence = "`" * 3
    while fence in fixed_text:
        fence += "`"
    lines += [
        f"The first {num_fixed} virtual tokens are the text below, and the trained prompt follows it. Feed only what",
        "comes after this text, tokenised apart, with nothing put in front of it (`add_special_tokens=False`):",
        "",
        f"{fence}text",
        fixed_text,
        fence,
    ]
    return "\n".join(lines) + "\n"
