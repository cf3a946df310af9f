"""A model's tokenizer without the model."""

from functools import lru_cache
from typing import Any

from transformers import AutoTokenizer

from fedllm_flwr.models.cache import converted
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.convert import reading_errors
from fedllm_flwr.models.kernels import choose
from fedllm_flwr.models.tiny import tiny_tokenizer


@lru_cache(maxsize=8)
def load_tokenizer(ref: ModelRef, dtype: str = "auto") -> Any:
    """The tokenizer of a model, once per process; no weights are read.

    Args:
        ref: Which model. One that was never used is converted first, as loading it would.
        dtype: As in :func:`fedllm_flwr.models.backbone.load`; it only says which converted copy is used.

    Raises:
        AssetError: The model's source is absent or unreadable.
        ConfigError: The dtype is unknown.
    """
    if ref.entry.source == "built":
        return tiny_tokenizer()
    folder = converted(ref, choose(dtype).dtype)
    with reading_errors(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
