"""A client message written the usual way: model, PEFT wrap and Hugging Face Trainer, rebuilt each time.

This is the structure of the common Flower examples for language models. It is kept as lean as the structure
allows: local files in the compute dtype, which transformers maps instead of copying; rows that are tokenised
already; no checkpoints, logging, progress bar, evaluation or gradient checkpointing.

As a program, given the checkpoint folder and the dtype, it is a worker process for the memory measurement of
`second_worker.py`.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.data.data_collator import default_data_collator
from transformers.utils import logging as transformers_logging
from workload import (
    ALPHA,
    CLIP_NORM,
    LEARNING_RATE,
    RANK,
    TARGET_MODULES,
    WORKER_SHAPE,
    Shape,
    serve_as_worker,
)


@dataclass(frozen=True)
class UsualClient:
    """What the usual client knows between messages: only settings.

    Attributes:
        folder: Checkpoint in the compute dtype.
        dtype: That dtype.
        state: Adapter values under PEFT's names that each message brings.
    """

    folder: Path
    dtype: torch.dtype
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def message(self, shape: Shape) -> Callable[[], float]:
        """A call that trains once over the rows and gives the mean loss of the steps."""
        rows = [_labelled(ids, shape) for ids in shape.tokens()]
        return lambda: self._train(rows, shape.batch)

    def _train(self, rows: list[dict[str, torch.Tensor]], batch: int) -> float:
        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        base = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=self.dtype, local_files_only=True
        )
        lora = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=list(TARGET_MODULES),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base, lora)
        set_peft_model_state_dict(model, dict(self.state))
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model=model,
                args=_arguments(folder, batch),
                train_dataset=rows,
                processing_class=tokenizer,
                data_collator=default_data_collator,
            )
            trainer.remove_callback(PrinterCallback)
            loss = trainer.train().training_loss
        get_peft_model_state_dict(model)  # the reply
        return float(loss)


def _arguments(folder: str, batch: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP_NORM,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )


def _labelled(ids: np.ndarray, shape: Shape) -> dict[str, torch.Tensor]:
    """A row with labels in the Trainer's way: -100 where there is no loss."""
    labels = np.where(np.arange(shape.length) < shape.length - shape.targets, -100, ids)
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def silence() -> None:
    """Keep the libraries' progress bars and notices out of the table."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    silence()
    torch.set_num_threads(1)
    client = UsualClient(Path(sys.argv[1]), getattr(torch, sys.argv[2]))
    serve_as_worker(client.message(WORKER_SHAPE))
