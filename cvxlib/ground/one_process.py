"""What the processes that share a program's samples do together, when there is one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from torch import Tensor

from cvxlib.ground.checks import require

T = TypeVar("T")


class OneProcess:
    """What the processes that share a program's samples do together, when there is one (several: :mod:`cvxlib.parallel`)."""

    rank, size = 0, 1
    #: whether all samples are in this process; asked instead of comparing with :data:`ALONE`, which copies and pickles do not survive
    alone = True

    def __call__(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor."""
        return tensor

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of every process, one behind the other."""
        return rows

    def own(self, rows: Tensor) -> Tensor:
        """This process's share of gathered rows."""
        return rows

    def first(self, make: Callable[[], T]) -> T:
        """What the first process makes, or the error that it makes instead."""
        return make()

    def agree(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The first process's tensors: replicated arithmetic may round differently elsewhere, and decisions must not differ."""
        return tensors

    def held(self) -> AbstractContextManager[None]:
        """A solve: Ctrl-C waits for the next :meth:`agree`, so that it stops every process at the same place."""
        return nullcontext()


ALONE = OneProcess()


def require_alone(name: str, reduce: OneProcess) -> None:
    """Raise the ``ValueError`` if other processes hold samples too."""
    came = f"one that {reduce.size} processes share"
    require(reduce.alone, name, "a program with all its samples in this process", came)
