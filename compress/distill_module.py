"""Student, projections and losses as one module: what the Trainer trains (and what DDP or FSDP wraps).

Teachers stay outside: they are frozen, not saved, and not resident when their answers come from the cache. Nothing here reads
a tensor back to the host; sums for the log are kept on the device and read once per log interval (`Meter`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgestill.compress.attention import AttentionLoss
from edgestill.compress.features import FeatureLoss
from edgestill.compress.fused_head import OutputLoss, OutputValues, output_loss
from edgestill.compress.lessons import Batch, Lesson, TeacherSource
from edgestill.compress.meter import Meter
from edgestill.compress.quantize.compensate import compensate_student
from edgestill.compress.quantize.fake_quant import FakeQuant
from edgestill.compress.reinforced import SelectionPolicy
from edgestill.compress.rows import Rows
from edgestill.compress.step_state import Balance, Taid
from edgestill.compress.targets import Target
from edgestill.compress.teachers import hidden_states


class DistillModule(nn.Module):
    """forward(batch) -> loss of the batch's share of an accumulation window."""

    def __init__(
        self,
        student: PreTrainedModel,
        source: TeacherSource | None,
        output: OutputLoss,
        domains: int,
        *,
        features: FeatureLoss | None = None,
        attention: AttentionLoss | None = None,
        policy: SelectionPolicy | None = None,
        taid: Taid | None = None,
        quantization: FakeQuant | None = None,
        grid_text: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """`grid_text`: windows int64 [W, T] that tell what reaches each layer, for `quantize.initialize: gptq`."""
        super().__init__()
        self.student = student
        self.features, self.attention = features, attention
        self.policy, self.taid = policy, taid
        self.quantization = quantization
        self._grid_text = grid_text
        self.feature_balance = Balance(features.spec.ratio) if features is not None else None
        self.attention_balance = Balance(attention.spec.ratio) if attention is not None else None
        self.output = output
        vocabulary = student.get_output_embeddings().weight.shape[0]
        self.meter = Meter(len(source.names) if source else 0, domains, math.log(vocabulary))
        self._source = [source]  # in a list: not a submodule, whatever it holds is neither moved nor saved

    def forward(
        self,
        input_ids: Tensor,
        windows: Sequence[int],
        normaliser: Tensor,
        rewrite: Callable[[PreTrainedModel, Tensor], Tensor] | None = None,
        **words: Any,
    ) -> Tensor:
        """Scalar loss.

        Args:
            input_ids: int64 [B, T].
            windows: index of each window in the training part, on the host.
            normaliser: valid labels of the whole accumulation window, over all processes.
            rewrite: makes the student write part of the windows, which leaves no true next token to learn. It runs in here,
                where the weights of a student that is spread over processes are whole.
            words: the rows (`Rows.to_batch`).
        """
        rows = Rows.from_batch(words)
        own = rewrite is not None
        if rewrite is not None:
            input_ids = rewrite(self.student, input_ids)
            rows = rows.written(input_ids)
        if self.policy is not None:
            self.policy.begin(len(rows.lengths))
        hidden, ours, attended = self._listen(input_ids)
        lesson = self._lesson(input_ids, rows, windows)
        head = self.student.get_output_embeddings()
        if self.quantization is not None:
            hidden = self.quantization.head_inputs(hidden)
        loss, values = output_loss(
            rows.take(hidden),
            head.weight,
            getattr(head, "bias", None),
            rows,
            lesson.target if lesson else None,
            normaliser,
            self._output_now(own),
        )
        self._note(rows, values, lesson, own)
        if lesson is not None:  # also without a row: every process must reach every parameter
            loss = loss + self._aligned(rows, values, lesson, ours, attended) * (sum(rows.lengths) / normaliser)
        return loss

    def begin(self, step: int) -> None:
        """Before the first batch: `step` optimizer steps are done."""
        if self.quantization is not None:
            self.quantization.at_step(step)

    def finish_step(self, step: int, steps: int) -> None:
        """After optimizer step `step` of `steps`: everything that is remembered moves once."""
        if self.quantization is not None:
            if self._grid_text is not None and self.quantization.enters_at(step):
                compensate_student(self.quantization, self.student, self._grid_text)
            self.quantization.at_step(step)
        if self.taid is not None:
            self.taid.finish(step, steps)
        if self.policy is not None:
            self.policy.finish()
        for balance in (self.feature_balance, self.attention_balance):
            if balance is not None:
                balance.finish()

    def _output_now(self, own: bool) -> OutputLoss:
        """The output loss of this batch. Buffers are asked for each time: a module that is moved or wrapped may replace them."""
        output = dataclasses.replace(self.output, cross_entropy=0.0) if own else self.output
        if self.taid is None:
            return output
        return dataclasses.replace(output, settings=dataclasses.replace(output.settings, interpolation=self.taid.t))

    def _listen(self, input_ids: Tensor) -> tuple[Tensor, dict[int, Tensor], Any]:
        """The student's hidden states [B, T, d], block outputs and attention of the layers that are aligned."""
        layers = self.features.student_layers() if self.features is not None else []
        with ExitStack() as watching:
            attended = (
                watching.enter_context(self.attention.watch_student(self.student)) if self.attention is not None else {}
            )
            hidden, ours = hidden_states(self.student, input_ids, layers)
        return hidden, ours, attended

    def _lesson(self, input_ids: Tensor, rows: Rows, windows: Sequence[int]) -> Lesson | None:
        source = self._source[0]
        if source is None or (self.output.weight == 0 and self.features is None and self.attention is None):
            return None
        return source.lesson(Batch(input_ids, rows, windows, self.features, self.attention))

    def _aligned(
        self, rows: Rows, values: OutputValues, lesson: Lesson, ours: dict[int, Tensor], attended: Any
    ) -> Tensor:
        """The balanced auxiliary losses, scalar."""
        if self.features is None and self.attention is None:
            return values.divergence.new_zeros(())
        weights = self._sequence_weights(lesson.target, rows)
        mask = nn.functional.pad(rows.valid, (0, 1))  # the last position predicts nothing
        count, total = sum(rows.lengths), values.divergence.new_zeros(())
        main = self._main(values).sum() / max(count, 1)
        if self.features is not None and self.feature_balance is not None:
            found = self.features(ours, lesson.features, weights, mask)
            self.meter.add("features", found * count)
            total = total + self.feature_balance(main, found, count) * found
        if self.attention is not None and self.attention_balance is not None:
            found = self.attention(attended, lesson.attention, weights, mask)
            self.meter.add("attention", found * count)
            total = total + self.attention_balance(main, found, count) * found
        return total

    def _main(self, values: OutputValues) -> Tensor:
        """Per row [n], what auxiliary losses are a share of: the output loss as it is minimised, else the cross-entropy."""
        if self.output.weight == 0:
            return values.cross_entropy
        return values.divergence * (self.output.weight * self.output.temperature**2)

    def _note(self, rows: Rows, values: OutputValues, lesson: Lesson | None, own: bool) -> None:
        """What the log, TAID and the policy take of a batch."""
        count = values.divergence.new_full((), float(values.divergence.numel()))
        self.meter.add("rows_seen", count)
        self.meter.add("output", values.divergence.sum())
        if not own:  # the student's own words are no true tokens
            self.meter.add("labels", count)
            self.meter.add("cross_entropy", values.cross_entropy.sum())
        if self.output.ranking is not None:
            self.meter.add("ranking", values.ranking.sum())
        if lesson is not None and self.output.weight > 0:
            self.meter.add_target(lesson.target, rows.domain)
        if self.taid is not None and self.training:
            self.taid.observe(values.to_interpolated)
        if self.policy is not None:
            loss = values.divergence if own else values.cross_entropy + values.divergence
            self.policy.reward(-rows.per_sequence(loss))

    def _sequence_weights(self, target: Target, rows: Rows) -> Tensor:
        """[K, B]: mean output weight per teacher and sequence; equal where only features are learnt."""
        if self.output.weight == 0:
            teachers = target.weights.shape[0]
            return target.weights.new_full((teachers, len(rows.lengths)), 1 / teachers)
        return rows.per_sequence(target.weights)
