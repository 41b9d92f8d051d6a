"""transformers.Trainer with our loss, and with its faults closed.

Resume, schedules, optimizers, mixed precision and distribution are the Trainer's. Closed here: it saves into the final folder
(ours is written beside and renamed, so a checkpoint folder is complete or not there); on a folder without optimizer.pt it
goes on silently with other weights (only complete checkpoints are resumed); `logging_nan_inf_filter` reads the loss back
every step (off). The order of the windows is computed before, so a resumed run sees exactly the tokens it would have seen.

Of several processes each takes its share of every batch (in order, so all see together what one would see), the first writes,
and sums go over all of them: the same recipe makes the same gradients, whatever their number, but for the order of sums.
"""

from __future__ import annotations

import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from edgestill.compress import checkpoints, sharding
from edgestill.compress.checkpoints import MODULE, OPTIMIZER, RANDOM, SCHEDULER
from edgestill.compress.distill_module import DistillModule
from edgestill.compress.on_policy import OnPolicy
from edgestill.compress.processes import from_first, is_first, share_of, world
from edgestill.compress.stages import explained_write_errors
from edgestill.compress.teachers import best_device, native_bfloat16
from edgestill.compress.training_log import LOG, JsonLog
from edgestill.compress.windows import OrderedWindows, collate
from edgestill.profiles.schema import TrainSpec
from edgestill.runtime.progress import Task

EIGHT_BITS = "adamw_bnb_8bit"
LOG_EVERY = 10
KEPT_CHECKPOINTS = 2


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
    """Train to the end, from the newest complete checkpoint in `folder` if there is one. All processes call it.

    Args:
        folder: checkpoints and training.jsonl go here; only this machine reads the checkpoints back.
        task: advanced by tokens.
        names: {"teachers": ..., "domains": ...} for the log.

    Returns:
        Facts: steps, tokens, seconds, tokens_per_s, precision, processes.
    """
    tokens_per_step = spec.batch_size * spec.gradient_accumulation * data.part.token_ids.shape[1]  # of all processes
    steps = -(-spec.tokens // tokens_per_step)
    if spec.sharding == "full":
        sharding.shard(module, best_device())
    share_of(spec.batch_size)
    arguments = _arguments(spec, steps, folder, module)
    complete = from_first(lambda: checkpoints.newest(folder))
    log = JsonLog(folder / LOG, module, task, tokens_per_step, names)
    on_policy = OnPolicy(spec.on_policy, spec.seed) if spec.on_policy is not None else None
    trainer = DistillTrainer(
        model=module, args=arguments, train_dataset=data, data_collator=collate, callbacks=[log], on_policy=on_policy
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    started = time.perf_counter()
    with explained_write_errors(folder):
        trainer.train(resume_from_checkpoint=complete)
    seconds = time.perf_counter() - started
    ran = steps - log.first_step
    return {
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "seconds": round(seconds, 1),
        "tokens_per_s": round(ran * tokens_per_step / seconds, 1) if ran else None,
        "precision": "bfloat16 autocast" if arguments.bf16 else "float32",
        "processes": world()[0],
        "resumed_from_step": log.first_step,
    }


def _arguments(spec: TrainSpec, steps: int, folder: Path, module: DistillModule) -> TrainingArguments:
    device = best_device()
    bf16 = autocast_bfloat16(spec, device)
    # TrainingArguments writes bf16=True into the environment, and reads bf16=False from there: once on, it would stay on
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=spec.batch_size,  # of all devices: `split_batches`
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type={"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[spec.schedule],
        warmup_steps=round(spec.warmup_fraction * steps),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        adam_beta2=spec.adam_beta2,
        optim=EIGHT_BITS if spec.optimizer == "adamw_8bit" else "adamw_torch_fused",
        bf16=bf16,
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
        # non_blocking: else each batch waits for all that the GPU still has to do
        accelerator_config={"split_batches": True, "non_blocking": device.type == "cuda"},
        label_names=["labels"],
        ddp_find_unused_parameters=_routes(module.student),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several GPUs the Trainer would make threads and enlarge the batch
    return arguments


def _routes(student: PreTrainedModel) -> bool:
    """Whether the student is a mixture of experts, some of which a batch may leave out; all else is reached by every batch."""
    text = student.config.get_text_config(decoder=True)
    return any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def _keep_embedding_wide(student: PreTrainedModel) -> None:
    """32-bit optimizer states for the embedding, as bitsandbytes advises.

    transformers asks for them too, but by `module.weight`, which on a grid is not the parameter.
    """
    import bitsandbytes.optim

    optim: Any = bitsandbytes.optim  # partly typed
    parameter = student.get_input_embeddings()._parameters["weight"]
    optim.GlobalOptimManager.get_instance().override_config(parameter, key_value_dict={"optim_bits": 32})


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
            inputs = {**inputs, "rewrite": partial(self._on_policy.rewrite, micro_step=micro_step)}
        loss: Tensor = model(**inputs, normaliser=num_items_in_batch.clamp_min(1))
        return loss * world()[0]  # the processes' gradients are averaged, and each is a share of all labels already

    def create_optimizer(self, *arguments: Any, **words: Any) -> Any:
        optimizer = super().create_optimizer(*arguments, **words)
        if self.args.optim == EIGHT_BITS:
            _keep_embedding_wide(self.model.student)
        return optimizer

    def _micro_step(self) -> int:
        """Number of this micro-step in the whole run, also after a resume."""
        step, micro = self._place
        now = self.state.global_step
        self._place = (now, micro + 1 if step == now else 0)
        return int(now * self.args.gradient_accumulation_steps + self._place[1])

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> Any:
        if sharding.is_sharded(model):
            return sharding.Sharded(model, self.accelerator.autocast)
        wrapped: Any = super()._wrap_model(model, training, dataloader)
        if world()[0] > 1:
            wrapped = self.accelerator.prepare_model(wrapped)
            wrapped.broadcast_buffers = False  # they hold what this process alone has seen since the last step
        return wrapped

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.model.meter.gather()
        state = sharding.whole_state(self.model)
        if is_first():
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(checkpoints.untied(state), folder / MODULE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / MODULE)
        missing, unexpected = sharding.load_whole_state(self.model, state)
        every, once = ({n for n, _ in self.model.named_parameters(remove_duplicate=twice)} for twice in (False, True))
        lost = set(missing) - (every - once)  # a tied weight is stored once
        if unexpected or lost:
            raise RuntimeError(f"{resume_from_checkpoint}: {sorted(lost)} missing, {unexpected} unexpected")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not sharding.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = sharding.whole_optimizer_state(self.model, self.optimizer)
        if is_first():
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not sharding.is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        sharding.load_whole_optimizer_state(self.model, self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self.args.output_dir)
        beside = run / "tmp"
        from_first(lambda: shutil.rmtree(beside, ignore_errors=True))
        self._saving_into = str(beside)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_into = None
        from_first(lambda: checkpoints.publish(beside, run, KEPT_CHECKPOINTS))

    def _save_rng_state(self, output_dir: str) -> None:
        if is_first():
            checkpoints.save_random_state(Path(output_dir) / RANDOM)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_random_state(Path(checkpoint) / RANDOM)

    _saving_into: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_into or str(super()._get_output_dir(trial))
