"""Projections onto the graph of a linear map, with a matrix that is factored once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from cvxlib.factored import CoreOperator
from cvxlib.lifting import ALONE, LiftedOperator, OneProcess

#: rows of a Gram matrix that are computed together
STRIPE = 512


class GraphProjection:
    r"""The nearest point :math:`(TZ, Z)` to a given (f, W): :math:`\min_Z \|TZ - f\|^2 + r \|Z - W\|^2`, by Cholesky.

    Args:
        design: T (rows, columns).
        reduce: sums a tensor over the processes that hold rows.
        ratio: r, greater than 0.
    """

    def __init__(self, design: Tensor, reduce: OneProcess, ratio: float) -> None:
        self.design, self.reduce = design, reduce
        # the smaller of the two Gram matrices carries the same information; only that of the columns is a sum over processes
        self.wide = reduce is ALONE and len(design) <= design.shape[1]
        self.gram = _gram(design) if self.wide else reduce(_gram(design.mT))
        self.set_ratio(ratio)

    def set_ratio(self, ratio: float) -> None:
        """Factor afresh for another r."""
        self.ratio, shifted = ratio, self.gram.clone()
        shifted.diagonal().add_(ratio)
        self.factor = torch.linalg.cholesky(shifted)

    def __call__(self, f: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, o) T Z and (columns, o) Z, for f (rows, o) and W (columns, o)."""
        if self.wide:
            multiplier = torch.cholesky_solve(f - self.design @ w, self.factor)
            return f - self.ratio * multiplier, w + self.design.mT @ multiplier
        z = torch.cholesky_solve(self.reduce(self.design.mT @ f) + self.ratio * w, self.factor)
        return self.design @ z, z

    def at(self, f: Tensor) -> Callable[[Tensor], Tensor]:
        r"""The map from W to Z for one f (rows, o); for a tall T it needs the moments :math:`T^\top T` and :math:`T^\top f` only."""
        if self.wide:
            return lambda w: self(f, w)[1]
        moment = self.reduce(self.design.mT @ f)
        return lambda w: torch.cholesky_solve(moment + self.ratio * w, self.factor)


class Blocks:
    """The mixer's blocks: each has a design matrix, and outputs and lifted blocks of its own."""

    def __init__(self, operator: LiftedOperator | CoreOperator) -> None:
        self.designs = [design.flatten(1) for design in operator.designs]
        self.counts = [design.shape[1] for design in operator.designs]

    def outputs(self, f: Tensor) -> tuple[Tensor, ...]:
        """Predictions (rows, c) as one matrix for each block."""
        return f.reshape(len(self.designs[0]), -1).chunk(len(self.designs), 1)

    def matrices(self, z: Tensor) -> list[Tensor]:
        """Lifted blocks (K, p, q) as the matrices that the designs multiply."""
        pairs = zip(self.designs, z.split(self.counts), strict=True)
        return [part.reshape(design.shape[1], -1) for design, part in pairs]

    @staticmethod
    def lifted(matrices: Iterable[Tensor], like: Tensor) -> Tensor:
        """Such matrices as lifted blocks (K, p, q)."""
        return torch.cat([matrix.reshape(-1, *like.shape[1:]) for matrix in matrices])


def _gram(matrix: Tensor) -> Tensor:
    """The products of a matrix's rows with each other, each pair once."""
    gram, end = matrix.new_empty(len(matrix), len(matrix)), 0
    for rows in matrix.split(STRIPE):
        start, end = end, end + len(rows)
        torch.matmul(rows, matrix[:end].mT, out=gram[start:end, :end])
        gram[:start, start:end] = gram[start:end, :start].mT
    return gram
