"""Write a checkpoint in the compute dtype: read once with transformers, saved as safetensors with its tokenizer."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from fedllm_flwr.assets import GET_ASSETS
from fedllm_flwr.errors import AssetError
from fedllm_flwr.models.kernels import DTYPES
from fedllm_flwr.models.progress import StepReport
from fedllm_flwr.models.sources import WeightSource, digest

STEPS = 4


def convert(source: WeightSource, dtype: str, target: Path, report: StepReport) -> None:
    """Convert a model.

    Args:
        source: The weights as shipped. Those of a GGUF file are dequantised.
        dtype: A key of ``DTYPES``.
        target: An empty folder; gets weights, configuration and tokenizer.
        report: Told about each of the ``STEPS`` steps.

    Raises:
        AssetError: A packaged file is not the one that is expected, or the weights cannot be read.
    """
    report.step("checking the source")
    if source.sha256 and (found := digest(source.files)) != source.sha256:
        raise AssetError(f"{source.files[0].name}: expected sha256 {source.sha256}, got {found}")
    with quiet_progress_bars():
        if source.kind == "checkpoint":
            _rewrite(source.folder, {}, {}, (dtype, target, report))
        else:
            with single_file(source, target) as file:
                place = {"gguf_file": file.name}
                # without dequantize=True the loaded model refuses to be saved
                weights = {**place, "quantization_config": GgufConfig(dequantize=True)}
                _rewrite(file.parent, place, weights, (dtype, target, report))


def _rewrite(
    folder: Path,
    tokenizer_options: dict[str, Any],
    model_options: dict[str, Any],
    job: tuple[str, Path, StepReport],
) -> None:
    dtype, target, report = job
    with reading_errors(folder):
        report.step("reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, **tokenizer_options
        )
        report.step("reading the weights")
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar has no switch
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=DTYPES[dtype], local_files_only=True, **model_options
            )
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    report.step(f"writing {size / 2**20:,.0f} MiB of {dtype}")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def reading_errors(folder: Path) -> Iterator[None]:
    """Turn transformers' errors about a folder's content into one line.

    Raises:
        AssetError: Names the folder and the reason.
    """
    try:
        yield
    except ImportError as error:
        raise AssetError(
            f"{folder.name}: reading it needs package gguf; run `{GET_ASSETS}`"
        ) from error
    except (ValueError, KeyError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AssetError(
            f"{folder.name}: not a causal language model that can be read: {reason}"
        ) from error


@contextmanager
def single_file(source: WeightSource, folder: Path) -> Iterator[Path]:
    """A GGUF source as one file.

    Args:
        source: In one piece or several.
        folder: Where several pieces are joined; the joined file is removed afterwards.
    """
    if len(source.files) == 1:
        yield source.files[0]
        return
    joined = folder / "joined.gguf"
    try:
        with joined.open("wb") as out:
            for piece in source.files:
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, out, 2**20)
        yield joined
    finally:
        joined.unlink()


@contextmanager
def quiet_progress_bars() -> Iterator[None]:
    """Silence the libraries' own progress bars, which would garble ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
