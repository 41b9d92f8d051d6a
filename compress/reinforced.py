"""Teachers selected by a policy that is trained along (RL-KD, arXiv 2012.06048).

The strongest teacher is not the best one for every text, nor for every moment of a student. For sequence b and teacher k:

    state     s_kb  = [ mean_t H_k / log V,  mean_t -log p_k(label) / log V,  1 ]     over the tokens that count
    choice    a_kb ~ Bernoulli(pi_kb),  pi_kb = sigmoid(w_k . s_kb)                   w = 0 at first, so pi = 1/2
    target    the equal mix of the selected teachers; of all of them when none is selected
    reward    r_b   = -(cross-entropy + divergence) of the student on that sequence
    baseline  m     = moving average of the mean reward before this step (the step's own mean for the first)
    update    w_k  += learning_rate * mean_b (r_b - m) (a_kb - pi_kb) s_kb            REINFORCE; (a - pi) s = d log pi(a) / dw

While it learns, a batch is `begin`, then `choose` for every teacher and chunk of whole sequences, then `reward`; after all batches
of an optimizer step comes `finish`, which learns from them together. In evaluation mode `choose` alone is enough. Everything
stays on the device. What is learnt lies in buffers, so it is in every checkpoint; draws come from the default generator, whose
state is too. With torch.distributed every process draws for the whole batch and
takes its share, and the sums of the update are all-reduced, so that all processes keep one policy, which is the policy of one
process with all the sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgestill.compress.processes import summed, world
from edgestill.compress.rows import consecutive
from edgestill.profiles.fusion_words import ReinforcedSpec

SELECTED, NOT_SELECTED = 0.0, -30.0
"""Log-weights. exp(-30) is nothing beside a selected teacher, and where all are -30 normalisation makes them equal."""
FEATURES = 3
FIXED_POINT = 2.0**32
"""Sums over a sequence are made in 64-bit integers: exact in any order, so a resumed run on a GPU chooses the same."""
LEAST_LOG_P = -100.0
"""A label that a teacher rules out counts as this, in nats."""


@dataclass
class _Batch:
    """One batch between `begin` and `reward`, for K teachers and B sequences."""

    draws: Tensor
    """[K, B], uniform in [0, 1)."""
    state: Tensor
    """[K, B, 3]."""
    surprise: Tensor
    """a - pi, [K, B]; 0 where nothing was chosen."""
    valid: Tensor
    """bool [B], sequences with a token that counts."""


class SelectionPolicy(nn.Module):
    """One Bernoulli choice per sequence and teacher; in evaluation mode selected iff pi >= 1/2, and nothing is learnt.

    Buffers: `weight` [K, 3]; `reward_average`, moving average that starts at 0; `updates`, its number of terms, which undoes
    the bias of that start.
    """

    weight: Tensor
    reward_average: Tensor
    updates: Tensor

    def __init__(self, spec: ReinforcedSpec, teachers: int, log_vocabulary: float) -> None:
        super().__init__()
        self.spec = spec
        self.log_vocabulary = log_vocabulary
        self.register_buffer("weight", torch.zeros(teachers, FEATURES))
        self.register_buffer("reward_average", torch.zeros(()))
        self.register_buffer("updates", torch.zeros(()))
        self.register_buffer("sums", torch.zeros(2 * teachers * FEATURES + 2), persistent=False)
        self.sums: Tensor
        self._batch: _Batch | None = None

    @torch.no_grad()
    def begin(self, sequences: int) -> None:
        """Start a batch of B sequences; what was chosen before and not rewarded is forgotten. Nothing in evaluation mode."""
        if not self.training:
            return
        teachers = self.weight.shape[0]
        processes, rank = world()
        draws = self.weight.new_empty(processes * sequences, teachers).uniform_()
        self._batch = _Batch(
            draws=draws[rank * sequences : (rank + 1) * sequences].T,
            state=self.weight.new_zeros(teachers, sequences, FEATURES),
            surprise=self.weight.new_zeros(teachers, sequences),
            valid=torch.zeros(sequences, dtype=torch.bool, device=self.weight.device),
        )

    @torch.no_grad()
    def choose(self, teacher: int, entropy: Tensor, label_log_p: Tensor, sequence: Tensor) -> Tensor:
        """Unnormalised log-weight of one teacher for each row of a chunk: SELECTED or NOT_SELECTED.

        Args:
            teacher: its index.
            entropy: float32 [rows], nats.
            label_log_p: float32 [rows], its log-probability of the true token; clamped to LEAST_LOG_P.
            sequence: int64 [rows], ascending, which sequence a row belongs to: its position in the batch while learning, any
                ascending numbers otherwise. A chunk holds all rows of its sequences.

        Returns:
            float32 [rows].

        Raises:
            RuntimeError: `begin` was not called for a batch to learn from.
        """
        if not self.training:
            sequence = consecutive(sequence)
            state, _ = self._state(entropy, label_log_p, sequence, sequence.numel())
            return _log_weight(self._probability(teacher, state) >= 0.5, entropy)[sequence]
        batch = self._started()
        state, here = self._state(entropy, label_log_p, sequence, batch.valid.numel())
        probability = self._probability(teacher, state)
        selected = batch.draws[teacher] < probability
        batch.state[teacher] = torch.where(here.unsqueeze(1), state, batch.state[teacher])
        batch.surprise[teacher] = torch.where(here, selected.to(state.dtype) - probability, batch.surprise[teacher])
        batch.valid |= here
        return _log_weight(selected, entropy)[sequence]

    def _state(self, entropy: Tensor, label_log_p: Tensor, sequence: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
        """s [sequences, 3] of one teacher, and which of the sequences have rows here (bool)."""
        sums = torch.zeros(sequences, FEATURES, dtype=torch.int64, device=sequence.device)
        values = torch.stack([entropy, -label_log_p.clamp_min(LEAST_LOG_P)], dim=1).double().mul(FIXED_POINT).round()
        sums.index_add_(0, sequence, torch.nn.functional.pad(values.long(), (0, 1), value=1))
        rows = sums[:, 2:]
        means = sums[:, :2].double() / (rows.clamp_min(1).double() * (FIXED_POINT * self.log_vocabulary))
        return torch.nn.functional.pad(means, (0, 1), value=1.0).to(self.weight.dtype), rows[:, 0] > 0

    def _probability(self, teacher: int, state: Tensor) -> Tensor:
        """pi [sequences]; a sum of products, which autocast leaves in full precision."""
        return torch.sigmoid((self.weight[teacher] * state).sum(1))

    @torch.no_grad()
    def reward(self, rewards: Tensor) -> None:
        """Keep what the batch has to teach, and forget it. Nothing in evaluation mode.

        Args:
            rewards: float32 [B], per sequence; not read where a sequence had no row.

        Raises:
            RuntimeError: `begin` was not called.
        """
        if not self.training:
            return
        batch, self._batch = self._started(), None
        valid = batch.valid
        advantage = torch.where(valid, rewards.to(self.weight.dtype) - self.baseline(), 0.0)
        gradients = batch.surprise.unsqueeze(-1) * batch.state  # d log pi / dw, [K, B, 3]
        parts = ((gradients * advantage[:, None]).sum(1), gradients.sum(1), advantage.sum(), valid.sum())
        self.sums += torch.cat([part.reshape(-1).to(self.weight.dtype) for part in parts])

    @torch.no_grad()
    def finish(self) -> None:
        """Learn once from the batches of an optimizer step. Every process must call this as often as the others."""
        sums, baseline = summed(self.sums), self.baseline()
        known = self.updates > 0
        by_advantage, plain = (part.view_as(self.weight) for part in sums[:-2].chunk(2))
        count = sums[-1]
        mean = sums[-2] / count.clamp_min(1)  # of the step, above the baseline
        gradient = by_advantage - torch.where(known, 0.0, mean) * plain
        self.weight.add_(gradient / count.clamp_min(1), alpha=self.spec.learning_rate)
        decay = self.spec.baseline_decay
        seen = (count > 0).to(mean.dtype)
        self.reward_average.lerp_(baseline + mean, seen * (1 - decay))
        self.updates.add_(seen)
        self.sums.zero_()

    def baseline(self) -> Tensor:
        """The moving average of the mean reward, scalar; 0 before the first update."""
        weight = 1 - self.spec.baseline_decay**self.updates
        return torch.where(self.updates > 0, self.reward_average / weight, 0.0)

    def _started(self) -> _Batch:
        if self._batch is None:
            raise RuntimeError("SelectionPolicy.begin was not called for this batch")
        return self._batch


def _log_weight(selected: Tensor, like: Tensor) -> Tensor:
    return torch.where(selected, SELECTED, NOT_SELECTED).to(like.dtype)
