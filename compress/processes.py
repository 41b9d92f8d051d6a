"""The processes that train together (torchrun): who this one is, what they wait for and what they add up.

Alone, everything here is a no-op. What is done once is done by the first process, and the others wait for its answer at a
store, which has no time limit: a barrier of the communication back end gives up after minutes, and a corpus may take hours.
A process that fails leaves a mark there. The first to do so says why; the others end without a word instead of waiting for it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # documented, not declared
from torch.distributed.rendezvous import rendezvous

from edgestill.runtime.errors import BadInput, EdgestillError

T = TypeVar("T")

FAILED = "failed"
POLL_S = 0.05
LONGEST_COLLECTIVE = timedelta(days=1)
"""A process that ends, ends the collectives of the others at once; this is for one that is only slow."""


class _Meetings:
    """The store where processes wait for each other; every process must come to the same meetings in the same order."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._count = 0

    def next(self) -> str:
        """The key of the next meeting."""
        self._count += 1
        return f"meeting-{self._count}"

    def wait(self, ready: Callable[[], bool]) -> None:
        """Until `ready`, or until another process fails."""
        while not ready():
            if self.store.check([FAILED]):
                raise SystemExit(EdgestillError.exit_code)  # it has said why
            time.sleep(POLL_S)


_joined: ContextVar[_Meetings | None] = ContextVar("joined", default=None)
"""The meetings of this process while it is joined with others."""


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started, if it did. Goes around all the work they share.

    Raises:
        BadInput: more processes than GPUs.
        EdgestillError: another process is gone without a word.
        SystemExit: another process failed and has said why.
    """
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    device = _own_gpu(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://", timeout=LONGEST_COLLECTIVE))
    distributed.init_process_group(
        "gloo" if device is None else "nccl",
        store=PrefixStore("torch", store),
        rank=rank,
        world_size=size,
        timeout=LONGEST_COLLECTIVE,
        device_id=device,
    )
    meetings = _Meetings(PrefixStore("edgestill", store))
    token = _joined.set(meetings)
    try:
        yield
        distributed.barrier()  # the first process may hold the store
    except BaseException as error:
        _leave(meetings.store, error)
        raise
    finally:
        _joined.reset(token)
    distributed.destroy_process_group()


def _own_gpu(local_rank: int) -> torch.device | None:
    """The GPU of this process, made its current one; None without GPUs."""
    if not torch.cuda.is_available():
        return None
    if local_rank >= torch.cuda.device_count():
        raise BadInput(
            f"process {local_rank + 1} of this machine has no GPU, there are {torch.cuda.device_count()}; start as many "
            "processes as there are GPUs (--nproc_per_node)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _leave(store: Store, error: BaseException) -> None:
    """Tell the others of a failure, or end without a word when they know of one."""
    gone = EdgestillError("another process ended without a word; the same command goes on from here")
    try:
        told = store.add(FAILED, 1) > 1
    except distributed.DistError:
        raise gone from error
    if told:
        raise SystemExit(EdgestillError.exit_code) from error
    if isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        raise gone from error


def world() -> tuple[int, int]:
    """(number of processes, rank of this one); (1, 0) alone."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    return 1, 0


def on_this_machine() -> int:
    """Number of the processes that share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world()[0] > 1 else 1


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return world()[1] == 0


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in all of them. It runs there only; the others wait, however long it takes.

    Args:
        make: returns something JSON-able.
    """
    meetings = _joined.get()
    if meetings is None:
        return make()
    key, store = meetings.next(), meetings.store
    if is_first():
        value = make()
        store.set(key, json.dumps(value))
        return value
    meetings.wait(lambda: store.check([key]))
    answer: T = json.loads(store.get(key))
    return answer


def first_then_others(make: Callable[[], T]) -> T:
    """`make` in the first process and then in the others, so that what is wrong is said once and downloaded once."""
    made = [make()] if is_first() else []
    from_first(lambda: None)
    return made[0] if made else make()


def wait_for_all() -> None:
    """Go on when every process is here."""
    meetings = _joined.get()
    if meetings is not None:
        key, store = meetings.next(), meetings.store
        store.add(key, 1)
        meetings.wait(lambda: store.add(key, 0) >= world()[0])


@torch.no_grad()
def summed(values: Tensor) -> Tensor:
    """The sum over all processes, on each of them; every process must call it, in the same order. `values` is overwritten."""
    if world()[0] > 1:
        distributed.all_reduce(values)
    return values


def share_of(batch_size: int) -> int:
    """Windows of a batch that each process takes.

    Raises:
        BadInput: they do not divide evenly.
    """
    processes = world()[0]
    if batch_size % processes:
        raise BadInput(
            f"train.batch_size: {batch_size} windows do not divide over {processes} processes; make it a multiple of "
            f"{processes} or start another number (--nproc_per_node)"
        )
    return batch_size // processes


def refuse_several(command: str) -> None:
    """Refuse a command that works in one process.

    Raises:
        BadInput: torchrun started several.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if "LOCAL_RANK" in os.environ and processes > 1:
        if int(os.environ["RANK"]):
            raise SystemExit(EdgestillError.exit_code)  # the first process says it
        raise BadInput(
            f"edgestill {command} works in one process, torchrun started {processes}; train with torchrun and `edgestill "
            f"distill`, then run `edgestill export`, or this command with the same --out, in one process"
        )
