"""A client message written the usual way: model, PEFT wrap and Hugging Face Trainer, rebuilt each time.

This is the structure of the common Flower examples for language models. It is kept as lean as the
structure allows: local files, the weights' own dtype (so that transformers maps them too), rows that are
tokenised already, no checkpoints, no logging, no progress bar, no evaluation.
"""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.data.data_collator import default_data_collator
from transformers.utils import logging as transformers_logging

TensorRow = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class UsualClient:
    """What the usual client knows between messages: only settings.

    Attributes:
        folder: Checkpoint in the compute dtype.
        dtype: That dtype.
        lora: PEFT's settings of the adapter.
        learning_rate: Of AdamW.
        clip_norm: Largest gradient norm.
    """

    folder: Path
    dtype: torch.dtype
    lora: LoraConfig
    learning_rate: float
    clip_norm: float

    def message(
        self, state: Mapping[str, torch.Tensor], rows: Sequence[TensorRow], batch: int
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Train one epoch on rows of equal length.

        Args:
            state: Adapter values under PEFT's names.
            rows: ``input_ids`` and ``labels`` of each row.
            batch: Rows of a step.

        Returns:
            The new adapter values, and the mean loss of the steps.
        """
        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        base = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=self.dtype, local_files_only=True
        )
        model = get_peft_model(base, self.lora)
        set_peft_model_state_dict(model, dict(state))
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model=model,
                args=self._arguments(folder, batch),
                train_dataset=list(rows),  # type: ignore[arg-type]  # any sequence serves
                processing_class=tokenizer,
                data_collator=default_data_collator,
            )
            loss = trainer.train().training_loss
        return get_peft_model_state_dict(model), loss

    def _arguments(self, folder: str, batch: int) -> TrainingArguments:
        return TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            learning_rate=self.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=self.clip_norm,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )


def silence() -> None:
    """Keep the libraries' progress bars and notices out of the table."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def lora_config(rank: int, alpha: float, target_modules: Sequence[str]) -> LoraConfig:
    """PEFT's settings without dropout."""
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha}
    return LoraConfig(target_modules=list(target_modules), task_type="CAUSAL_LM", **options)
