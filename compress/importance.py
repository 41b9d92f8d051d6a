"""What a model does with calibration text, read by hooks on one pass: how much each width matters, and what a layer is fed.

    neuron of an MLP       L2 over sequences of the mean over tokens of |activation|
    key/value head         the same of the norm of what its group of query heads gives to the output projection
    residual channel       the same of |output of a norm|, summed over the norms (Minitron, arXiv 2407.14679)
    moment of a layer      C = mean of x x^T over its inputs x, float64

The sums run on the model's device; nothing is read back before the last batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from edgestill.compress.moments import Product
from edgestill.compress.packing import Part
from edgestill.compress.teachers import decoder_blocks, hidden_states
from edgestill.runtime.progress import Task

BATCH_TOKENS = 2048
"""About how many tokens run at a time; a longer window runs alone."""
MLP_OUTPUT = "mlp.down_proj"
ATTENTION_OUTPUT = "self_attn.o_proj"
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
"""Norms of a block over the residual width, those that it has."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Windows of the training text, evenly spaced, so that every source has its share.

    token_ids: int64 [n, T]; scored: bool [n, T - 1], next tokens that count as labels.
    """

    token_ids: Tensor
    scored: Tensor

    @classmethod
    def of(cls, part: Part, tokens: int) -> Calibration:
        """At most `tokens` tokens of `part`, at least one window."""
        wanted = min(part.n_windows, max(1, tokens // part.token_ids.shape[1]))
        windows = np.linspace(0, part.n_windows - 1, wanted).round().astype(np.int64)
        ids = torch.from_numpy(part.token_ids[windows].astype(np.int64))
        if part.loss_mask is None:
            return cls(ids, torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool))
        return cls(ids, torch.from_numpy(part.loss_mask[windows][:, 1:] != 0))

    def __len__(self) -> int:
        return len(self.token_ids)

    def windows(self, chosen: Tensor) -> Calibration:
        """Those windows alone; `chosen` int64 [m]."""
        return Calibration(self.token_ids[chosen], self.scored[chosen])

    def batches(self, device: torch.device, task: Task | None, note: str) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids [B, T], scored [B, T - 1]) on `device`; `task` advances by tokens as they are done."""
        size = max(1, BATCH_TOKENS // self.token_ids.shape[1])
        for ids, scored in zip(torch.split(self.token_ids, size), torch.split(self.scored, size), strict=True):
            yield ids.to(device), scored.to(device)
            if task is not None:
                task.advance(ids.numel(), note)


@contextlib.contextmanager
def hooked(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Hooks that are removed at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_input(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """The hidden states [B, T, d] that a block was called with."""
    found: Tensor = arguments[0] if arguments else keywords["hidden_states"]
    return found


def block_output(output: Any) -> Tensor:
    """The hidden states [B, T, d] of what a block returned; some families return a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


# widths -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class WidthImportance:
    """Scores of a model's widths, float64; larger is more important.

    neurons, heads: per layer, [intermediate_size] and [key/value heads]; channels: [hidden_size]. power: per norm, by module
    name, [hidden_size]: mean of x_c^2 / mean_c x_c^2 over its inputs x (1 everywhere if all channels carry alike).
    """

    neurons: list[Tensor]
    heads: list[Tensor]
    channels: Tensor
    power: dict[str, Tensor]


class _Sums:
    """Running sums over batches by key."""

    def __init__(self) -> None:
        self.by_key: dict[Any, Tensor] = {}

    def add(self, key: Any, value: Tensor) -> None:
        value = value.double()
        self.by_key[key] = self.by_key[key] + value if key in self.by_key else value

    def add_magnitude(self, key: Any, magnitude: Tensor) -> None:
        """`magnitude` [B, T, n] -> sum over B of (mean over T)^2."""
        self.add(key, magnitude.float().mean(1).square().sum(0))


@torch.no_grad()
def width_importance(model: nn.Module, heads: int, calibration: Calibration, task: Task | None) -> WidthImportance:
    """Measure all widths in one pass over a model whose modules are named as Llama's.

    Args:
        heads: key/value heads of each layer.
    """
    sums, power, tokens = _Sums(), _Sums(), 0
    blocks = decoder_blocks(model)
    handles = []
    for i, block in enumerate(blocks):
        mlp, attention = block.get_submodule(MLP_OUTPUT), block.get_submodule(ATTENTION_OUTPUT)
        handles.append(mlp.register_forward_pre_hook(_neurons(sums, i)))
        handles.append(attention.register_forward_pre_hook(_heads(sums, i, heads)))
    norms = residual_norms(model)
    handles += [norm.register_forward_hook(_channels(sums, power, name)) for name, norm in norms.items()]
    with hooked(handles):
        for ids, _ in calibration.batches(device_of(model), task, "importance of widths"):
            hidden_states(model, ids)
            tokens += ids.numel()
    layers = range(len(blocks))
    return WidthImportance(
        neurons=[sums.by_key["neurons", i].sqrt().cpu() for i in layers],
        heads=[sums.by_key["heads", i].sqrt().cpu() for i in layers],
        channels=torch.stack([sums.by_key["channels", name].sqrt() for name in norms]).sum(0).cpu(),
        power={name: (total / tokens).cpu() for name, total in power.by_key.items()},
    )


def residual_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Norms over the residual width by module name: those of the blocks, and the one behind the last block."""
    blocks, names = decoder_blocks(model), {module: name for name, module in model.named_modules()}
    own = [getattr(block, norm) for block in blocks for norm in NORMS if hasattr(block, norm)]
    last = model.get_submodule(f"{names[blocks].rpartition('.')[0]}.norm")
    return {names[norm]: norm for norm in [*own, last]}


Hook = Callable[..., None]


def _neurons(sums: _Sums, layer: int) -> Hook:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        sums.add_magnitude(("neurons", layer), arguments[0].abs())

    return hook


def _heads(sums: _Sums, layer: int, heads: int) -> Hook:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        given = arguments[0]
        sums.add_magnitude(("heads", layer), given.reshape(*given.shape[:-1], heads, -1).norm(dim=-1))

    return hook


def _channels(sums: _Sums, power: _Sums, name: str) -> Hook:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        sums.add_magnitude(("channels", name), output.abs())
        square = arguments[0].float().square()
        share = square / square.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        power.add(name, share.sum((0, 1)))

    return hook


# inputs of linear layers --------------------------------------------------------------------------------------------


@torch.no_grad()
def input_moments(
    model: nn.Module, names: Sequence[str], calibration: Calibration, task: Task | None
) -> dict[str, Tensor]:
    """C = mean of x x^T, float64 [in, in] on the model's device, of each named linear layer's input.

    Layers that are fed the same tensor (queries, keys and values) share the sums.
    """
    products: dict[str, Product] = {}
    last: list[tuple[Tensor, Product]] = []

    def watch(name: str) -> Hook:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if last and last[0][0] is arguments[0]:
                products[name] = last[0][1]
                return
            product = products.setdefault(name, Product())
            last[:] = [(arguments[0], product)]
            rows = arguments[0].flatten(0, -2).double()
            product.add(rows, rows)

        return hook

    with hooked([model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]):
        for ids, _ in calibration.batches(device_of(model), task, "moments"):
            hidden_states(model, ids)
            last.clear()
    return {name: product.raw() for name, product in products.items()}
