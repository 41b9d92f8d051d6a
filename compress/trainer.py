"""transformers.Trainer with our loss, and with its faults closed.

Resume, schedules, optimizers, mixed precision and distribution are the Trainer's. Closed here: it saves into the final folder
(ours is written beside and renamed, so a checkpoint folder is complete or not there); on a folder without optimizer.pt it
goes on silently with other weights (only complete checkpoints are resumed); `logging_nan_inf_filter` reads the loss back
every step (off). The order of the windows is computed before, so a resumed run sees exactly the tokens it would have seen.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from edgestill.compress.distill_module import DistillModule
from edgestill.compress.on_policy import OnPolicy
from edgestill.compress.processes import world
from edgestill.compress.stages import explained_write_errors
from edgestill.compress.teachers import native_bfloat16
from edgestill.compress.training_log import LOG, JsonLog
from edgestill.compress.windows import OrderedWindows, collate
from edgestill.profiles.schema import TrainSpec
from edgestill.runtime.progress import Task

MODULE = "module.safetensors"
LOG_EVERY = 10
KEPT_CHECKPOINTS = 2
COMPLETE = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", MODULE)
"""Files without which a checkpoint is not resumed."""


def autocast_bfloat16(spec: TrainSpec, device: torch.device) -> bool:
    """Whether training runs under bfloat16 autocast."""
    return spec.precision == "bfloat16" or (spec.precision == "auto" and native_bfloat16(device))


def train(
    module: DistillModule,
    data: OrderedWindows,
    spec: TrainSpec,
    folder: Path,
    task: Task,
    *,
    names: dict[str, tuple[str, ...]],
) -> dict[str, Any]:
    """Train to the end, from the newest complete checkpoint in `folder` if there is one.

    Args:
        folder: checkpoints and training.jsonl go here; only this machine reads the checkpoints back.
        task: advanced by tokens.
        names: {"teachers": ..., "domains": ...} for the log.

    Returns:
        Facts: steps, tokens, seconds, tokens_per_s, precision.
    """
    tokens_per_step = spec.batch_size * spec.gradient_accumulation * data.part.token_ids.shape[1]  # of all processes
    steps = -(-spec.tokens // tokens_per_step)
    arguments = _arguments(spec, steps, folder)
    _forget_incomplete(folder)
    complete = _checkpoints(folder)
    log = JsonLog(folder / LOG, module, task, tokens_per_step, names)
    on_policy = OnPolicy(spec.on_policy, spec.seed) if spec.on_policy is not None else None
    trainer = DistillTrainer(
        model=module, args=arguments, train_dataset=data, data_collator=collate, callbacks=[log], on_policy=on_policy
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    started = time.perf_counter()
    with explained_write_errors(folder):
        trainer.train(resume_from_checkpoint=str(complete[-1]) if complete else None)
    seconds = time.perf_counter() - started
    ran = steps - log.first_step
    return {
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "seconds": round(seconds, 1),
        "tokens_per_s": round(ran * tokens_per_step / seconds, 1) if ran else None,
        "precision": "bfloat16 autocast" if arguments.bf16 else "float32",
        "resumed_from_step": log.first_step,
    }


def _arguments(spec: TrainSpec, steps: int, folder: Path) -> TrainingArguments:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type={"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[spec.schedule],
        warmup_steps=round(spec.warmup_fraction * steps),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim="adamw_bnb_8bit" if spec.optimizer == "adamw_8bit" else "adamw_torch_fused",
        bf16=autocast_bfloat16(spec, device),
        use_cpu=device.type == "cpu",
        seed=spec.seed,
        save_strategy="steps",
        save_steps=spec.checkpoint_every_steps,
        logging_steps=LOG_EVERY,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        label_names=["labels"],
    )


class DistillTrainer(Trainer):  # type: ignore[misc]  # transformers is imported untyped
    """Our loss, our order, atomic checkpoints."""

    def __init__(self, *, on_policy: OnPolicy | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch, over the accumulation window
        self._on_policy = on_policy
        self._place = (-1, 0)
        """Optimizer step, and micro-step within it."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        if num_items_in_batch is None:
            raise RuntimeError("the Trainer did not count the labels of the accumulation window")
        if self._on_policy is not None and self._on_policy.due(micro_step := self._micro_step()):
            with self.accelerator.autocast():  # the Trainer casts within the module's forward only
                written = self._on_policy.rewrite(self.model.student, inputs["input_ids"], micro_step)
            inputs = {**inputs, "input_ids": written, "own": True}
        loss: Tensor = model(**inputs, normaliser=num_items_in_batch.clamp_min(1))
        return loss * world()[0]  # DDP takes the mean over the processes of what is already a share of all labels

    def _micro_step(self) -> int:
        """Number of this micro-step in the whole run, also after a resume."""
        step, micro = self._place
        now = self.state.global_step
        self._place = (now, micro + 1 if step == now else 0)
        return int(now * self.args.gradient_accumulation_steps + self._place[1])

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_untied(state_dict or self.model.state_dict()), folder / MODULE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target = self.model if model is None else model
        missing, unexpected = target.load_state_dict(load_file(Path(resume_from_checkpoint) / MODULE), strict=False)
        tied = set(target.state_dict()) - set(_untied(target.state_dict()))
        if unexpected or set(missing) - tied:
            raise RuntimeError(
                f"{resume_from_checkpoint}: {sorted(set(missing) - tied)} missing, {unexpected} unexpected"
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self.args.output_dir)
        beside = run / "tmp"
        shutil.rmtree(beside, ignore_errors=True)
        self._saving_into = str(beside)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_into = None
        for finished in beside.iterdir():
            shutil.rmtree(run / finished.name, ignore_errors=True)
            finished.rename(run / finished.name)
        beside.rmdir()
        for old in _checkpoints(run)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    _saving_into: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_into or str(super()._get_output_dir(trial))


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without second names of the same storage (tied embedding and head), which safetensors refuses."""
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    kept = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() == 0 or place not in seen:
            seen[place] = name
            kept[name] = tensor.contiguous()
    return kept


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def _forget_incomplete(folder: Path) -> None:
    """Remove what a kill left half-written, so that the Trainer cannot resume from it."""
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    for path in folder.glob("checkpoint-*"):
        if not all((path / name).is_file() for name in COMPLETE):
            shutil.rmtree(path)
