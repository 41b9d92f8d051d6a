"""A model made of low rank, each layer fitted to what it replaces (Lillama, arXiv 2412.16719).

    loss(a, y) = mean over tokens of ( mean_d |a - y| - log sigmoid(cos(a, y)) )
    joint      = loss(layer(x), y) + loss(layer(x'), y)

x and y are the input and output of the layer that is replaced, x' is what the layers before it, replaced too, now hand to it.
Inputs are constants, so every layer has its own loss and its own AdamW, and no gradient crosses a layer. The two models run
block beside block, so that only one block's features are alive. Every eighth window is held back; of each layer the values with
the lowest joint loss on these stay, those of the decomposition among them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgestill.compress.importance import (
    Calibration,
    block_input,
    block_output,
    device_of,
    hooked,
    input_moments,
)
from edgestill.compress.low_rank import FIELD, LowRankLinear, choose_ranks, low_rank_of, replace_module
from edgestill.compress.teachers import decoder_blocks, hidden_states
from edgestill.profiles.schema import LowRankSpec
from edgestill.runtime.progress import Task

MOMENT_BYTES = 1 << 30
"""Memory for the moments of a group of layers; each group costs a pass over the text."""
HELD_BACK = 8
"""One window in so many is not learnt from."""
EVALUATIONS = 8


def make_low_rank(
    model: PreTrainedModel, spec: LowRankSpec, calibration: Calibration, seed: int, task: Task | None
) -> dict[str, Any]:
    """Factor the linear layers of the blocks, in place, and fit them; notes for the log.

    Returns:
        {"rank": {name: rank}, "loss": {name: [before, after]}, "error": {name: [before, after]}}: the joint loss, and
        E|y' - y|^2 / E|y|^2 on the replaced layer's own input, on windows held back, before and after the fitting.

    Raises:
        BadInput: as `low_rank.choose_ranks`.
    """
    ranks = choose_ranks(model, spec, str(model.config.model_type))
    dense = copy.deepcopy(model).requires_grad_(False)
    for names in _groups(dense, list(ranks)):
        moments = input_moments(dense, names, calibration, task)
        for name in names:
            layer = dense.get_submodule(name)
            if isinstance(layer, nn.Linear):
                replace_module(model, name, low_rank_of(layer, moments[name], ranks[name]))
    setattr(model.config, FIELD, {"rank": ranks})
    fit = _Fit(model, dense, list(ranks), spec.learning_rate)
    learnt, held_back = _split(calibration)
    first = fit.evaluate(held_back, task)
    last = fit.train(spec.steps, learnt, held_back, seed, task) if spec.steps else first
    return {
        "rank": ranks,
        "loss": {name: [round(first[name].loss, 6), round(last[name].loss, 6)] for name in ranks},
        "error": {name: [round(first[name].error, 6), round(last[name].error, 6)] for name in ranks},
    }


def local_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    """Lillama's feature loss of outputs [..., d], a scalar."""
    distance = (ours - theirs).abs().mean(-1)
    return (distance - nn.functional.logsigmoid(torch.cosine_similarity(ours, theirs, dim=-1))).mean()


def _groups(model: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Neighbouring layers whose moments fit in MOMENT_BYTES together."""
    group: list[str] = []
    held = 0
    for name in names:
        size = 8 * int(getattr(model.get_submodule(name), "in_features")) ** 2  # noqa: B009  (typed as a tensor)
        if group and held + size > MOMENT_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def _split(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """Windows to learn from and windows held back; a single one is both."""
    every = torch.arange(len(calibration))
    back = every % HELD_BACK == HELD_BACK - 1 if len(every) >= HELD_BACK else every == len(every) - 1
    learnt = every[~back] if len(every) > 1 else every
    return calibration.windows(learnt), calibration.windows(every[back])


@dataclass(frozen=True)
class Features:
    """Of one layer on one batch, [B, T, in or out]: the replaced layer's input and output, and the new one's own input."""

    given: Tensor
    wanted: Tensor
    own: Tensor


@dataclass(frozen=True)
class Quality:
    """Joint loss, and relative squared error on the replaced layer's input."""

    loss: float
    error: float


@torch.no_grad()
def run_beside(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    names: Sequence[str],
    ids: Tensor,
    visit: Callable[[Mapping[str, Features]], None],
) -> None:
    """Run both on ids [B, T], block beside block; `visit` gets the features of the named layers of each block in turn."""
    theirs: dict[str, tuple[Tensor, Tensor]] = {}
    ours: dict[str, Tensor] = {}
    state: list[Tensor] = []

    def of_dense(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            theirs[name] = (arguments[0], output)

        return hook

    def of_model(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            ours[name] = arguments[0]

        return hook

    def beside(block: nn.Module) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            hidden = state.pop() if state else block_input(arguments, keywords)
            rest = {key: value for key, value in keywords.items() if key != "hidden_states"}
            state.append(block_output(block(hidden, *arguments[1:], **rest)))
            visit({name: Features(*pair, ours[name]) for name, pair in theirs.items() if name in ours})
            theirs.clear()
            ours.clear()

        return hook

    handles = [dense.get_submodule(name).register_forward_hook(of_dense(name)) for name in names]
    handles += [model.get_submodule(name).register_forward_pre_hook(of_model(name)) for name in names]
    pairs = zip(decoder_blocks(dense), decoder_blocks(model), strict=True)
    handles += [theirs_.register_forward_hook(beside(ours_), with_kwargs=True) for theirs_, ours_ in pairs]
    with hooked(handles):
        hidden_states(dense, ids)


class _Fit:
    """The low-rank layers of `model` and what they replace in `dense`."""

    def __init__(self, model: PreTrainedModel, dense: PreTrainedModel, names: list[str], learning_rate: float) -> None:
        self.model, self.dense, self.names = model, dense, names
        self.layers = {name: layer for name in names if isinstance(layer := model.get_submodule(name), LowRankLinear)}
        self.optimizers = {
            name: torch.optim.AdamW(layer.parameters(), lr=learning_rate, weight_decay=0.0)
            for name, layer in self.layers.items()
        }

    def train(
        self, steps: int, learnt: Calibration, held_back: Calibration, seed: int, task: Task | None
    ) -> dict[str, Quality]:
        """`steps` batches; the best values of each layer are left in it, and their quality is returned."""
        best = self.evaluate(held_back, task)
        values = {name: copy.deepcopy(layer.state_dict()) for name, layer in self.layers.items()}
        pause = max(1, math.ceil(steps / EVALUATIONS))
        for step, ids in enumerate(self._batches(steps, learnt, seed, task), start=1):
            run_beside(self.dense, self.model, self.names, ids, self._step)
            if step % pause == 0 or step == steps:
                for name, quality in self.evaluate(held_back, task).items():
                    if quality.loss < best[name].loss:
                        best[name] = quality
                        values[name] = copy.deepcopy(self.layers[name].state_dict())
        for name, layer in self.layers.items():
            layer.load_state_dict(values[name])
        return best

    def evaluate(self, calibration: Calibration, task: Task | None) -> dict[str, Quality]:
        """Quality of every layer on these windows."""
        sums = {name: torch.zeros(3, dtype=torch.float64, device=device_of(self.model)) for name in self.names}
        seen = 0

        def measure(features: Mapping[str, Features]) -> None:
            for name, found in features.items():
                made = self.layers[name](found.given)
                own = self.layers[name](found.own)
                loss = (local_loss(made, found.wanted) + local_loss(own, found.wanted)) * len(ids)
                squares = ((made - found.wanted).double().square().sum(), found.wanted.double().square().sum())
                sums[name] += torch.stack([loss.double(), *squares])

        for ids, _ in calibration.batches(device_of(self.model), task, "layers measured"):
            run_beside(self.dense, self.model, self.names, ids, measure)
            seen += len(ids)
        totals = torch.stack(list(sums.values())).cpu().tolist()
        return {
            name: Quality(loss / seen, error / max(power, 1e-300))
            for name, (loss, error, power) in zip(sums, totals, strict=True)
        }

    def _step(self, features: Mapping[str, Features]) -> None:
        """One step of every layer of a block."""
        for name, found in features.items():
            with torch.enable_grad():
                layer = self.layers[name]
                loss = local_loss(layer(found.given), found.wanted) + local_loss(layer(found.own), found.wanted)
                self.optimizers[name].zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            self.optimizers[name].step()

    def _batches(self, steps: int, learnt: Calibration, seed: int, task: Task | None) -> Iterator[Tensor]:
        """`steps` batches of ids, the windows shuffled anew whenever they are used up."""
        generator = torch.Generator().manual_seed(seed)
        done = 0
        while done < steps:
            order = learnt.windows(torch.randperm(len(learnt), generator=generator))
            for ids, _ in order.batches(device_of(self.model), task, "layers fitted"):
                yield ids
                done += 1
                if done == steps:
                    return
