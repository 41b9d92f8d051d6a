"""Batches whose second part the student writes itself (GKD, arXiv 2306.13649).

A student that has only seen text by people meets its own mistakes for the first time when it is used. On a share of the
batches the last tokens of every window are therefore replaced by the student's own sampled continuation of the first part,
and the teachers score that.

    due        floor((m + 1) f + u) > floor(m f + u)      for micro-step m, share f, phase u in [0, 1) from the seed:
               evenly spread, and within one batch of the share over any stretch of steps
    next token argmax_v (z_v - T log E_v), E_v ~ Exp(1)   one draw from softmax(z / T) (the Gumbel-max trick)

The draw stays on the device: `torch.multinomial` reads its input's validity back. Windows are running text, so a special
token is a token like any other and ends nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from edgestill.compress.processes import world
from edgestill.profiles.data_words import OnPolicySpec
from edgestill.runtime.errors import BadInput

MIN_PROMPT_TOKENS = 4
"""The student continues a text; from fewer tokens it would make one up."""


def check(spec: OnPolicySpec, sequence_length: int) -> None:
    """Refuse a continuation that leaves no prompt in a window of `sequence_length` tokens.

    Raises:
        BadInput: new_tokens > sequence_length - MIN_PROMPT_TOKENS.
    """
    most = sequence_length - MIN_PROMPT_TOKENS
    if spec.new_tokens > most:
        raise BadInput(
            f"train.on_policy.new_tokens: {spec.new_tokens}, but windows of {sequence_length} tokens keep {MIN_PROMPT_TOKENS} "
            f"as the prompt; use at most {most} or a longer data.sequence_length"
        )


class OnPolicy:
    """Decides which batches the student rewrites, and rewrites them. Stateless: a resumed run writes the same tokens."""

    def __init__(self, spec: OnPolicySpec, seed: int) -> None:
        self.spec, self.seed = spec, seed
        self._phase = float(np.random.default_rng(seed).random())

    def due(self, micro_step: int) -> bool:
        """Whether the student rewrites the batch of `micro_step` (counted from 0 over the whole run). The same answer in
        every process, so that all of them generate together."""
        before, after = (math.floor(m * self.spec.fraction + self._phase) for m in (micro_step, micro_step + 1))
        return after > before

    @torch.no_grad()
    def rewrite(self, student: PreTrainedModel, input_ids: Tensor, micro_step: int) -> Tensor:
        """The windows with their last `new_tokens` tokens written by the student.

        Runs under the caller's autocast, if any. The student is in evaluation mode meanwhile (no dropout), and put back; the
        default random generators are not touched.

        Args:
            student: a causal LM on the device of `input_ids`.
            input_ids: int64 [B, T], no padding; not changed.
            micro_step: with the seed (and the rank, so that processes differ) it decides the draws.

        Returns:
            int64 [B, T].

        Raises:
            BadInput: T leaves no prompt, see `check`.
        """
        length = input_ids.shape[1]
        check(self.spec, length)
        start = length - self.spec.new_tokens
        generator = torch.Generator(input_ids.device).manual_seed(self._draws(micro_step))
        out = input_ids.clone()
        cache = DynamicCache(config=student.config)
        with _writing(student):
            for position in range(start, length):
                unread = out[:, :start] if position == start else out[:, position - 1 : position]
                logits = student(
                    input_ids=unread, past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True
                ).logits
                out[:, position] = _draw(logits[:, -1], self.spec.temperature, generator)
        return out

    def _draws(self, micro_step: int) -> int:
        """Seed of the draws of one batch in this process."""
        return int(np.random.SeedSequence((self.seed, micro_step, world()[1])).generate_state(1, np.uint64)[0])


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token per row, int64 [B], from softmax(logits / temperature) of logits [B, V]."""
    wait = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
    gumbel = -wait.clamp_min_(torch.finfo(torch.float32).tiny).log_()  # an exact 0 would win whatever its logit
    return torch.add(logits.float(), gumbel, alpha=temperature).argmax(-1)


@contextmanager
def _writing(student: nn.Module) -> Iterator[None]:
    """Evaluation mode, each module's own mode put back."""
    modes = [(module, module.training) for module in student.modules()]
    student.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        # some torch releases would hand the weights cast without a gradient to the training pass of the same autocast
        torch.clear_autocast_cache()
