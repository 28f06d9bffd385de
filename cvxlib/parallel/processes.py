"""The processes that share a program's samples: sums over them, what they agree on, and how the loss of one becomes an error."""

from __future__ import annotations

import atexit
import copy
import functools
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

from cvxlib.ground.checks import positive_float, require, wrong_value
from cvxlib.ground.one_process import OneProcess

#: what torchrun, and most batch systems on request, tell every process
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

#: seconds that processes which saw a failure wait for each other, to find out who did not
GRACE = 5.0

#: how long one attempt to reach rank 0 may take
RETRY = timedelta(seconds=2)

T = TypeVar("T")
Array = TypeVar("Array", Tensor, np.ndarray)


def _hang_up() -> None:
    """Leave the process group, if that was not done before."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


class Processes(OneProcess):
    r"""The processes that ``torchrun`` started, joined by gloo for tensors on the CPU and by NCCL for those on a GPU.

    A process group that exists already is used as it is, with its own timeout.

    Args:
        timeout: seconds that a process waits for the others before it gives up, greater than 0. It must exceed the time that any part of
            a solve takes between two sums.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
        device: the GPU that is this process's own where its machine has one for each, else the CPU.

    Raises:
        RuntimeError: the environment does not say which process this is, or the processes do not find each other within the timeout.

    Source: NVIDIA NCCL documentation, "Collective operations" (an all-reduce gives identical results on all ranks); gloo documentation,
    "Algorithms" (a reduce-scatter, then an all-gather: each entry is summed in one place).
    """

    alone = False

    def __init__(self, timeout: float = 300.0) -> None:
        self.timeout = timedelta(seconds=positive_float("timeout", timeout))
        self._store: distributed.Store | None = None
        self._interrupted, self._failure = False, ""
        #: (size,) how many of a program's samples each process holds, see :meth:`holding`
        self.shares: list[int] = []
        if not distributed.is_initialized():
            self._join()
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        local, here = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        own = torch.cuda.is_available() and torch.cuda.device_count() >= max(here, 1)
        self.device = torch.device("cuda", local) if own else torch.device("cpu")

    def _join(self) -> None:
        missing = [name for name in VARIABLES if name not in os.environ]
        if missing:
            raise RuntimeError(
                f"Processes: expected to be started by torchrun, which sets {', '.join(VARIABLES)}; {', '.join(missing)} "
                "not set (torchrun --standalone --nproc-per-node 2 script.py)"
            )
        backend = "gloo"
        if torch.cuda.is_available() and distributed.is_nccl_available():
            backend = "cpu:gloo,cuda:nccl"
            # without this a lost process ends the others by SIGABRT instead of an error
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        rank, size = (int(os.environ[name]) for name in VARIABLES[:2])
        try:
            store, rank, size = next(distributed.rendezvous("env://", rank, size, timeout=self.timeout))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                store = self._renewed(store, rank)
            distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=self.timeout)
            # while the interpreter is alive: gloo's threads may abort a process that ends with its group still there
            atexit.register(_hang_up)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {rank} of {size}: the other processes were not found within {self.timeout.total_seconds():g} s; "
                "start all of them with the same MASTER_ADDR and MASTER_PORT"
            ) from error
        self._store = store

    def _renewed(self, store: distributed.Store, rank: int) -> distributed.Store:
        """A store of these processes alone: that of torchrun still holds the keys of those that it has started before."""
        host, key = os.environ["MASTER_ADDR"], "cvxlib/port"
        if rank == 0:
            renewed = distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self.timeout)
            store.set(key, str(renewed.port))
            return renewed
        deadline = time.monotonic() + self.timeout.total_seconds()
        while True:
            try:  # the port of an earlier rank 0 refuses
                renewed = distributed.TCPStore(host, int(store.get(key)), wait_for_workers=False, timeout=RETRY)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
            else:
                renewed.set_timeout(self.timeout)
                return renewed

    # what a program asks for

    def __call__(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, bit for bit the same on all; the tensor itself is left alone."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._together(lambda: distributed.all_reduce(total))
        return total

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of every process, one behind the other."""
        counts = self._counts(len(rows))
        total = rows.new_zeros(sum(counts), *rows.shape[1:])
        total.split(counts)[self.rank].copy_(rows)
        return self(total)

    def own(self, rows: Tensor) -> Tensor:
        """This process's share of rows, so many for each of a program's samples."""
        per_sample = len(rows) // sum(self.shares)
        return rows.split([per_sample * share for share in self.shares])[self.rank]

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, or the error that it makes instead, on every process."""
        made: list[tuple[T] | Exception] = [RuntimeError("no word from rank 0")]
        if self.rank == 0:
            try:
                made = [(make(),)]
            except (OSError, TypeError, ValueError) as error:
                made = [error]
        self._together(lambda: distributed.broadcast_object_list(made))
        outcome = made[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome[0]

    def agree(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Rank 0's tensors on every process, perhaps of other sizes than here but with the same number of axes.

        Raises:
            KeyboardInterrupt: on all processes, if any was interrupted since the last time.
        """
        sizes = [size for tensor in tensors for size in tensor.shape]
        header = torch.tensor([self._interrupted, *(size * (self.rank == 0) for size in sizes)], dtype=torch.int64)
        interrupts, *sizes = self(header.to(tensors[0].device)).tolist()
        if interrupts:
            self._interrupted = False
            raise KeyboardInterrupt
        agreed = []
        for tensor in tensors:
            shape, sizes = sizes[: tensor.ndim], sizes[tensor.ndim :]
            like = tensor.detach()
            buffer = like.clone(memory_format=torch.contiguous_format) if self.rank == 0 else like.new_empty(shape)
            self._together(functools.partial(distributed.broadcast, buffer, 0))
            agreed.append(buffer)
        return tuple(agreed)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A solve: Ctrl-C waits for the next :meth:`agree`, so that it stops every process at the same place."""
        if threading.current_thread() is not threading.main_thread():  # which gets no signals
            yield
            return

        def interrupt(number: int, frame: object) -> None:
            self._interrupted = True

        previous = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    # sharing out

    def _counts(self, mine: int) -> list[int]:
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = mine
        return self(counts).tolist()

    def holding(self, samples: int) -> Processes:
        """The same processes, as holders of a program of whose samples this one has so many."""
        holders = copy.copy(self)
        holders.shares = self._counts(samples)
        return holders

    def part(self, whole: Array) -> Array:
        """This process's samples of an array, tensor or memory map (n, ...): equal shares, up to one sample.

        Raises:
            ValueError: there are fewer samples than processes.
        """
        n = len(whole)
        require(n >= self.size, "whole", f"at least one sample for each of {self.size} processes", f"{n} in all")
        part = whole[self.rank * n // self.size : (self.rank + 1) * n // self.size]
        return part.clone() if isinstance(part, Tensor) else np.array(part)

    def require_same(self, make: Callable[[], Mapping[str, str]]) -> None:
        """Raise a ``ValueError`` on every process unless all of them make the same words, or if one of them cannot.

        Args:
            make: the words, by argument; what it raises is told to all.
        """
        failure = None
        try:
            mine: Mapping[str, str] | str = make()
        except (TypeError, ValueError) as error:
            failure, mine = error, str(error)
        every: list[Mapping[str, str] | str] = [mine] * self.size
        self._together(lambda: distributed.all_gather_object(every, mine))
        if failure is not None:
            raise failure
        told: list[Mapping[str, str]] = []
        for rank, made in enumerate(every):
            if isinstance(made, str):
                raise ValueError(f"rank {rank} of {self.size}: {made}")
            told.append(made)
        for argument, word in told[0].items():
            for rank, words in enumerate(told):
                if words[argument] != word:
                    raise wrong_value(
                        argument, "the same on every process", f"{word} on rank 0 and {words[argument]} on rank {rank}"
                    )

    # failure

    def _together(self, collective: Callable[[], T]) -> T:
        """A collective operation, whose failure is told in words."""
        try:
            if self._failure:
                raise RuntimeError(self._failure)
            return collective()
        except (RuntimeError, ValueError) as error:
            if self._failure:
                raise
            traceback.clear_frames(error.__traceback__)  # which hold on to the process group
            silent = self._silent()
            lost = (
                f"no word from rank {', '.join(map(str, silent))}" if silent else "a process is lost or does not answer"
            )
            self._failure = (
                f"rank {self.rank} of {self.size}: the processes cannot go on together, {lost}; start all of them again "
                "(cvxlib.solve(..., checkpoint=...) goes on from the last checkpoint)"
            )
            raise RuntimeError(self._failure) from error

    def _silent(self) -> list[int]:
        """Ranks that do not say within a few seconds that they have seen the failure too."""
        if self._store is None:
            return []
        if self.device.type == "cpu":
            _hang_up()  # so that no process waits for this one until its timeout
        silent = [0] if self.rank else []
        try:
            self._store.set(f"cvxlib/failed/{self.rank}", "")
            deadline = time.monotonic() + GRACE
            while True:
                silent = [rank for rank in range(self.size) if not self._store.check([f"cvxlib/failed/{rank}"])]
                if len(silent) <= 1 or time.monotonic() > deadline:
                    return silent
                time.sleep(0.05)
        except RuntimeError:  # the store went down with the machine that kept it, rank 0's
            return silent
