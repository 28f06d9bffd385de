r"""Linear maps from lifted blocks to predictions, one for each of the mixer's blocks, which has outputs and lifted blocks of its own."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from cvxlib.ground.one_process import ALONE, OneProcess

#: rows of a Gram matrix that are computed together
STRIPE = 512
#: products of rows and weights that are masked together
PRODUCTS = 2**18


class BlockMap(abc.ABC):
    """The linear map of one of the mixer's blocks, from (K, p, q) to (rows, o): a matrix that acts alike on several columns."""

    #: on how many columns it acts alike
    copies: int

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """Number of predictions."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(K, p, q) of the lifted blocks."""

    @property
    @abc.abstractmethod
    def columns(self) -> int:
        """K p q / copies: lifted blocks as a matrix are (columns, copies)."""

    @property
    @abc.abstractmethod
    def flops(self) -> float:
        """Operations of one product."""

    @abc.abstractmethod
    def forward(self, z: Tensor) -> Tensor:
        """(rows, o) predictions."""

    @abc.abstractmethod
    def adjoint(self, dual: Tensor) -> Tensor:
        """(K, p, q) the adjoint applied to (rows, o)."""

    @abc.abstractmethod
    def gram(self) -> Tensor:
        """(columns, columns) the adjoint times the map."""


@dataclass(frozen=True)
class DesignMap(BlockMap):
    """A design tensor (rows, K, p, w), applied to each of the outputs."""

    design: Tensor
    copies: int

    @property
    def rows(self) -> int:
        return len(self.design)

    @property
    def shape(self) -> tuple[int, int, int]:
        _, k, p, w = self.design.shape
        return k, p, w * self.copies

    @property
    def columns(self) -> int:
        return self.design[0].numel()

    @property
    def flops(self) -> float:
        return 2.0 * self.design.numel() * self.copies

    def forward(self, z: Tensor) -> Tensor:
        return self.design.flatten(1) @ z.reshape(self.columns, self.copies)

    def adjoint(self, dual: Tensor) -> Tensor:
        return (self.design.flatten(1).mT @ dual).reshape(self.shape)

    def gram(self) -> Tensor:
        return gram(self.design.flatten(1).mT)

    def outer(self) -> Tensor:
        """(rows, rows) the map times its adjoint, for one output."""
        return gram(self.design.flatten(1))


@dataclass(frozen=True)
class MaskedMap(BlockMap):
    r"""A design tensor whose rows the gates only mask, :math:`T_{i,k} = D_{ik} T_i`, applied to each of the outputs.

    Args:
        design: (rows, p, w) the rows T.
        masks: (rows, K) the gates D, in the dtype of the design.
        copies: number of outputs.
    """

    design: Tensor
    masks: Tensor
    copies: int

    @property
    def rows(self) -> int:
        return len(self.design)

    @property
    def shape(self) -> tuple[int, int, int]:
        _, p, w = self.design.shape
        return self.masks.shape[1], p, w * self.copies

    @property
    def columns(self) -> int:
        return self.masks.shape[1] * self.design[0].numel()

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.columns * self.copies

    def forward(self, z: Tensor) -> Tensor:
        weights = z.reshape(len(z), -1, self.copies).transpose(0, 1).flatten(1)  # (p w, K o)
        parts = zip(self._parts(self.design.flatten(1)), self._parts(self.masks), strict=True)
        return torch.cat([((t @ weights).unflatten(1, (len(z), -1)) * mask.unsqueeze(2)).sum(1) for t, mask in parts])

    def adjoint(self, dual: Tensor) -> Tensor:
        total = dual.new_zeros(self.design[0].numel(), self.masks.shape[1] * self.copies)
        parts = (self._parts(tensor) for tensor in (self.design.flatten(1), self.masks, dual))
        for t, mask, rho in zip(*parts, strict=True):
            total.addmm_(t.mT, (mask.unsqueeze(2) * rho.unsqueeze(1)).flatten(1))
        return total.unflatten(1, (-1, self.copies)).transpose(0, 1).reshape(self.shape)

    def gram(self) -> Tensor:
        total = self.design.new_zeros(self.columns, self.columns)
        for t, mask in zip(self.design.split(self.columns), self.masks.split(self.columns), strict=True):
            total += gram((mask.unsqueeze(2) * t.flatten(1).unsqueeze(1)).flatten(1).mT)
        return total

    def outer(self) -> Tensor:
        """(rows, rows) the map times its adjoint, for one output."""
        return gram(self.design.flatten(1)) * gram(self.masks)

    def _parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Rows in parts whose masked products are few enough to stay in a cache."""
        return tensor.split(max(1, PRODUCTS // (self.masks.shape[1] * self.copies)))


@dataclass(frozen=True)
class CoreMap(BlockMap):
    r"""A design tensor restricted to :math:`Z_k = P_k C_k Q_k^\top`, by its features :math:`T_{i,k}^\top P_k`.

    Args:
        features: (rows, K, R, w).
        right: (K, R', w, o) the columns of every Q.
    """

    features: Tensor
    right: Tensor
    copies = 1

    @property
    def rows(self) -> int:
        return len(self.features)

    @property
    def shape(self) -> tuple[int, int, int]:
        _, k, r, _ = self.features.shape
        return k, r, self.right.shape[1]

    @property
    def columns(self) -> int:
        k, r, other = self.shape
        return k * r * other

    @property
    def flops(self) -> float:
        return 2.0 * self.features.numel() * self.right.shape[3]

    def forward(self, z: Tensor) -> Tensor:
        weights = z @ self.right.flatten(2)  # (K, R, w o)
        return self.features.flatten(1) @ weights.reshape(-1, self.right.shape[3])

    def adjoint(self, dual: Tensor) -> Tensor:
        moment = (self.features.flatten(1).mT @ dual).unflatten(0, self.features.shape[1:])  # (K, R, w, o)
        return moment.flatten(2) @ self.right.flatten(2).mT

    def gram(self) -> Tensor:
        # second moments of the features, contracted with the products of the columns of Q over outputs
        (k, r, other), w = self.shape, self.features.shape[3]
        moments = gram(self.features.flatten(1).mT).reshape(k, r, w, k, r, w)
        out = moments.new_empty(k, r, other, k, r, other)
        for one in range(k):
            products = torch.einsum("bwo,ldvo->lwvbd", self.right[one], self.right)
            pairs = moments[one].permute(2, 0, 3, 1, 4)  # (K, R, R, w, w)
            block = pairs.flatten(3).flatten(1, 2) @ products.flatten(3).flatten(1, 2)  # (K, R R, R' R')
            out[one] = block.reshape(k, r, r, other, other).permute(1, 3, 0, 2, 4)
        return out.reshape(self.columns, self.columns)


class BlockOperator:
    """The maps of the mixer's blocks side by side: from lifted blocks (K, p, q) to predictions (rows, c).

    Args:
        maps: of the mixer's blocks, in order.
        reduce: sums a tensor over the processes that hold samples.
    """

    def __init__(self, maps: tuple[BlockMap, ...], reduce: OneProcess = ALONE) -> None:
        self._maps, self.reduce = maps, reduce

    @property
    def maps(self) -> tuple[BlockMap, ...]:
        """Of the mixer's blocks, in order."""
        return self._maps

    def split(self, z: Tensor) -> tuple[Tensor, ...]:
        """Lifted blocks (K, p, q) by the mixer's blocks."""
        return z.split([part.shape[0] for part in self.maps])

    def forward(self, z: Tensor) -> Tensor:
        """(rows, c) predictions of lifted blocks (K, p, q)."""
        return torch.cat([part.forward(mine) for part, mine in zip(self.maps, self.split(z), strict=True)], 1)

    def adjoint(self, dual: Tensor) -> Tensor:
        """(K, p, q) the adjoint applied to (rows, c)."""
        columns = dual.chunk(len(self.maps), 1)
        return self.reduce(torch.cat([part.adjoint(rho) for part, rho in zip(self.maps, columns, strict=True)]))


def gram(matrix: Tensor) -> Tensor:
    """The products of a matrix's rows with each other, each pair once."""
    products, end = matrix.new_empty(len(matrix), len(matrix)), 0
    for rows in matrix.split(STRIPE):
        start, end = end, end + len(rows)
        torch.matmul(rows, matrix[:end].mT, out=products[start:end, :end])
        products[:start, start:end] = products[start:end, :start].mT
    return products
