"""Which layers of a teacher a student keeps, by what they do to calibration text.

block influence   1 - mean cos(what a block is given, what it hands on): a block that changes nothing scores 0 (ShortGPT, arXiv
                  2403.03853). One pass.
remove one        the block without which the cross-entropy is lowest is removed, again and again (arXiv 2511.05085). Each
                  trial starts from the hidden states in front of the removed block, so a round of L trials costs L / 2 passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgestill.compress.importance import Calibration, block_input, block_output, device_of, hooked
from edgestill.compress.teachers import Teacher, TeacherFacts, decoder_blocks, hidden_states
from edgestill.runtime.progress import Task

LOGIT_BYTES = 64 << 20
"""Memory for the logits of a chunk and their softmax."""


@torch.no_grad()
def block_influence(model: PreTrainedModel, calibration: Calibration, task: Task | None) -> list[float]:
    """1 - mean over tokens of cos(input, output), per block."""
    blocks, device = decoder_blocks(model), device_of(model)
    sums = torch.zeros(len(blocks), dtype=torch.float64, device=device)

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            given, made = block_input(arguments, keywords), block_output(output)
            sums[layer] += torch.cosine_similarity(given.double(), made.double(), dim=-1).sum()

        return hook

    with hooked([block.register_forward_hook(watch(i), with_kwargs=True) for i, block in enumerate(blocks)]):
        for ids, _ in calibration.batches(device, task, "block influence"):
            hidden_states(model, ids)
    return [float(1 - total) for total in (sums / calibration.token_ids.numel()).cpu()]


def most_influential(influence: Sequence[float], keep: int) -> list[int]:
    """The `keep` layers of largest influence, ascending; of equal ones the earlier."""
    return sorted(sorted(range(len(influence)), key=lambda i: (-influence[i], i))[:keep])


@dataclass(frozen=True)
class Removal:
    """A layer that was removed, and the calibration cross-entropy (nats per token) without it."""

    layer: int
    cross_entropy: float


def remove_one_by_one(
    model: PreTrainedModel, facts: TeacherFacts, calibration: Calibration, keep: int, task: Task | None
) -> tuple[list[int], list[Removal]]:
    """The layers that are left, ascending, and the removals in their order. The model is left as it was."""
    kept = list(range(len(decoder_blocks(model))))
    removals = []
    with _asked(model, facts) as teacher:
        while len(kept) > keep:
            losses = _losses_without(teacher, kept, calibration, task)
            layer = min(losses, key=lambda i: (losses[i], i))
            removals.append(Removal(layer, losses[layer]))
            kept.remove(layer)
    return kept, removals


@torch.no_grad()
def _losses_without(
    teacher: Teacher, kept: Sequence[int], calibration: Calibration, task: Task | None
) -> dict[int, float]:
    """Cross-entropy without each of the `kept` layers in turn, the others of `kept` in place."""
    blocks = decoder_blocks(teacher.model)
    sums = torch.zeros(len(kept), dtype=torch.float64, device=device_of(teacher.model))
    for ids, scored in calibration.batches(sums.device, task, f"{len(kept)} layers, one removed in turn"):
        outputs = _outputs(teacher, blocks, kept, ids)
        for i, layer in enumerate(kept):
            before = block_output(outputs[kept[i - 1]]) if i else None
            with _in_place(teacher.model, blocks, _without(blocks, kept, layer, outputs[layer], before)):
                hidden, _ = teacher.hidden(ids)
            sums[i] += _cross_entropy(teacher, hidden, ids, scored)
    means = (sums / calibration.scored.sum().clamp_min(1).to(sums.device)).cpu()
    return {layer: float(mean) for layer, mean in zip(kept, means, strict=True)}


def _outputs(teacher: Teacher, blocks: nn.ModuleList, kept: Sequence[int], ids: Tensor) -> Mapping[int, Any]:
    """What each of the kept blocks returns when these alone are in place."""
    found: dict[int, Any] = {}

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            found[layer] = output

        return hook

    # the form of a stand-in's answer is only known from a block's: those that stand before the first kept one learn it
    example = _example(teacher, blocks, kept[0], ids) if len(kept) < len(blocks) else None
    chosen = [block if i in kept else _StandIn(block, example, None) for i, block in enumerate(blocks)]
    with (
        _in_place(teacher.model, blocks, chosen),
        hooked([blocks[layer].register_forward_hook(watch(layer)) for layer in kept]),
    ):
        teacher.hidden(ids)
    return found


def _example(teacher: Teacher, blocks: nn.ModuleList, layer: int, ids: Tensor) -> Any:
    """What a block returns, for its form: of two tokens."""
    found: list[Any] = []
    with hooked([blocks[layer].register_forward_hook(lambda module, arguments, output: found.append(output))]):
        teacher.hidden(ids[:1, :2])
    return found[0]


def _without(
    blocks: nn.ModuleList, kept: Sequence[int], layer: int, example: Any, before: Tensor | None
) -> list[nn.Module]:
    """All positions filled: layers up to `layer` hand on `before`, later ones that are kept work, the rest stand in."""
    return [
        block if i in kept and i > layer else _StandIn(block, example, before if i <= layer else None)
        for i, block in enumerate(blocks)
    ]


class _StandIn(nn.Module):
    """Takes a block's place: hands on `hidden`, or what it is given, in the form of `example`.

    Families read attributes of their blocks (attention_type) while they run: those are the block's own.
    """

    def __init__(self, block: nn.Module, example: Any, hidden: Tensor | None) -> None:
        super().__init__()
        self._block = [block]  # in a list: not a submodule
        self._example, self._hidden = [example], hidden

    def __getattr__(self, name: str) -> Any:
        if name in ("_block", "_example", "_hidden"):
            raise AttributeError(name)
        return getattr(self._block[0], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        hidden = block_input(arguments, keywords) if self._hidden is None else self._hidden
        example = self._example[0]
        return (hidden, *example[1:]) if isinstance(example, tuple) else hidden


@contextlib.contextmanager
def _in_place(model: nn.Module, blocks: nn.ModuleList, others: Sequence[nn.Module]) -> Iterator[None]:
    """`others` where the model keeps its blocks, for a while."""
    parent, name = next((p, n) for p in model.modules() for n, child in p.named_children() if child is blocks)
    setattr(parent, name, nn.ModuleList(others))
    try:
        yield
    finally:
        setattr(parent, name, blocks)


@contextlib.contextmanager
def _asked(model: PreTrainedModel, facts: TeacherFacts) -> Iterator[Teacher]:
    """The model as a teacher, which hands out hidden states and logits of a chunk; as it was at the end."""
    use_cache = model.config.use_cache
    try:
        yield Teacher(facts, model)
    finally:
        model.config.use_cache = use_cache
        model.requires_grad_(True)


def _cross_entropy(teacher: Teacher, hidden: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
    """Sum over the scored next tokens, float64 scalar; logits chunk by chunk."""
    rows, labels = hidden[:, :-1][scored], ids[:, 1:][scored]
    size = max(1, LOGIT_BYTES // (8 * len(teacher.head_weight)))
    total = hidden.new_zeros((), dtype=torch.float64)
    for chunk, label in zip(torch.split(rows, size), torch.split(labels, size), strict=True):
        total += torch.nn.functional.cross_entropy(teacher.logits(chunk), label, reduction="sum").double()
    return total
