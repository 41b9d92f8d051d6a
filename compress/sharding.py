"""A student spread over processes (FSDP2), and its whole state gathered again.

Every block of the student is a unit of its own, gathered when it runs; what is left (embedding, head, last norm, projections)
belongs to the module that is trained and is whole during its forward pass, so that the fused head may read the head's weights.
The Trainer of transformers 4.57 cannot ask accelerate for version 2 of FSDP (and accelerate has it only on GPUs), so the module
is spread with torch's `fully_shard` before the Trainer sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from edgestill.compress.distill_module import DistillModule
from edgestill.compress.processes import world
from edgestill.compress.teachers import decoder_blocks
from edgestill.profiles.schema import TrainSpec
from edgestill.runtime.errors import BadInput

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def check_sharding(spec: TrainSpec) -> None:
    """Refuse what cannot be spread, before any work.

    Raises:
        BadInput: torchrun did not start this process, or the optimizer keeps states that cannot be cut.
    """
    if spec.sharding == "none":
        return
    if not torch.distributed.is_initialized():
        raise BadInput(
            "train.sharding: full spreads the student over processes; start them with torchrun (--nproc_per_node N) or use "
            "sharding: none"
        )
    if spec.optimizer == "adamw_8bit":
        raise BadInput("train.sharding: full cannot cut the blocks of optimizer: adamw_8bit; use optimizer: adamw")


def shard(module: DistillModule, device: torch.device) -> None:
    """Spread the module's parameters over all processes, in place; every process holds the same ones before."""
    module.to(device)
    mesh = init_device_mesh(device.type, (world()[0],))
    for block in decoder_blocks(module.student):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(module, FSDPModule)


class Sharded(nn.Module):
    """What the Trainer calls instead of a module that is spread already; it leaves a wrapper of our own alone."""

    def __init__(self, module: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.module = module
        self._autocast = autocast

    def forward(self, *arguments: Any, **words: Any) -> Any:
        with self._autocast():
            return self.module(*arguments, **words)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module, spread or not. Every process must call it; of a spread one only the first holds the answer."""
    if not is_sharded(module):
        return module.state_dict()
    return cast(dict[str, Tensor], get_model_state_dict(module, options=WHOLE))


def load_whole_state(module: nn.Module, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Put such a state (in every process) into a module; returns the names that are missing and those it does not know."""
    if not is_sharded(module):
        missing, unexpected = module.load_state_dict(state, strict=False)
    else:
        options = StateDictOptions(full_state_dict=True, strict=False)
        missing, unexpected = set_model_state_dict(module, dict(state), options=options)
    return list(missing), list(unexpected)


def whole_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of the optimizer of a spread module, by parameter name; as `whole_state`."""
    return dict(get_optimizer_state_dict(module, optimizer, options=WHOLE))


def load_whole_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put such a state (in every process) into the optimizer of a spread module."""
    set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(full_state_dict=True))
