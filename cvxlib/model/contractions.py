r"""Contractions: design tensors that are multiplied with weights and never formed.

The design tensor :math:`T_{i,g}` (p x w) of row i and gate g is all that a program needs of its data, and it is large: :math:`d^3` numbers
for attention. A head only ever needs :math:`T_{i,g}^\top u` (its *features*) and the transpose of that map, and these have structure:

- pooled linear attention: :math:`T_i = \bar x_i \otimes X_i^\top X_i`, so the mean token and the Gram matrix are all that is kept;
- pooled gated attention: :math:`T_{i,g} = \sum_b \bar x_{i,g,b} \otimes x_b \otimes x_b` with gate-averaged queries
  :math:`\bar x_{i,g,b} = \tfrac1s \sum_a D_{i,g}[a,b]\, x_a`;
- anything else: the hidden matrices themselves (:class:`cvxlib.operators.hidden.HiddenMatrices`), or the design tensor where it is small.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

#: bytes of intermediate results; a GPU takes 16 times as many at once, to be busy
WORKSPACE = 32 * 2**20


def largest_workspace(device: torch.device) -> float:
    """The bytes that intermediate results may need at once."""
    return WORKSPACE * (16 if device.type == "cuda" else 1)


class Contraction(abc.ABC):
    """The design tensors of some rows, for every gate of one block of a mixer."""

    #: what it is called in a solution's account of its solver
    name: ClassVar[str]

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """Number of rows."""

    @property
    @abc.abstractmethod
    def flops(self) -> float:
        """Floating point operations that the features of one head take."""

    @property
    @abc.abstractmethod
    def workspace(self) -> float:
        """Bytes that one head's features need while they are computed."""

    @abc.abstractmethod
    def features(self, u: Tensor, gate: Tensor) -> Tensor:
        r"""(rows, m, w) :math:`T_{i,g_j}^\top u_j` for u (m, p) and gates (m,), which stay on the CPU."""

    @abc.abstractmethod
    def transpose(self, weights: Tensor, gate: Tensor) -> Tensor:
        r"""(m, p) :math:`\sum_i T_{i,g_j}\, \omega_{ij}` for weights (rows, m, w)."""

    @abc.abstractmethod
    def design(self, gate: int) -> Tensor:
        """(rows, p, w) the design tensor of one gate, formed after all."""

    def adjoint(self, dual: Tensor, gates: list[int]) -> Tensor:
        r"""(P', p, w, c) :math:`\sum_i T_{i,g} \otimes \rho_i` for dual (rows, c) and each of P' gates."""
        design = self.split(1)[0].design(gates[0])
        total = design.new_zeros(len(gates), design[0].numel(), dual.shape[1])
        step = max(1, int(largest_workspace(design.device) / (len(design) * design[0].numel() * design.element_size())))
        start = 0
        for part in self.split(step):
            rho = dual[start : start + part.rows]
            for slot, gate in enumerate(gates):
                total[slot].addmm_(part.design(gate).flatten(1).mT, rho)
            start += part.rows
        return total.unflatten(1, design.shape[1:])

    @abc.abstractmethod
    def split(self, step: int) -> list[Contraction]:
        """The same in parts of ``step`` samples."""

    @property
    @abc.abstractmethod
    def bytes(self) -> int:
        """What the contraction keeps in memory besides the tokens."""


@dataclass(frozen=True)
class Design(Contraction):
    """The design tensor itself, as (P, rows, w, p): features and their transpose are then one matrix product a gate."""

    name = "design tensor"

    tensor: Tensor

    @property
    def rows(self) -> int:
        return self.tensor.shape[1]

    @property
    def flops(self) -> float:
        return 2.0 * self.tensor[0].numel()

    @property
    def workspace(self) -> float:
        return self.tensor[0, ..., 0].numel() * self.tensor.element_size()

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def features(self, u: Tensor, gate: Tensor) -> Tensor:
        _, n, w, _ = self.tensor.shape
        out = self.tensor.new_empty(n, len(u), w)
        for g, heads in _by_gate(gate):
            out[:, heads] = (u[heads] @ self.tensor[g].flatten(0, 1).mT).unflatten(1, (n, w)).movedim(0, 1)
        return out

    def transpose(self, weights: Tensor, gate: Tensor) -> Tensor:
        out = self.tensor.new_empty(len(gate), self.tensor.shape[3])
        for g, heads in _by_gate(gate):
            out[heads] = weights[:, heads].movedim(1, 0).flatten(1) @ self.tensor[g].flatten(0, 1)
        return out

    def design(self, gate: int) -> Tensor:
        return self.tensor[gate].mT

    def adjoint(self, dual: Tensor, gates: list[int]) -> Tensor:
        totals = [dual.mT @ self.tensor[g].flatten(1) for g in gates]  # (c, w p)
        return torch.stack(totals).unflatten(2, self.tensor.shape[2:]).permute(0, 3, 2, 1)

    def split(self, step: int) -> list[Contraction]:
        return [Design(part) for part in self.tensor.split(step, 1)]


@dataclass(frozen=True)
class GramMatrices(Contraction):
    r"""Pooled linear attention, :math:`T_i = \bar x_i \otimes G_i`: mean queries (n, d) and :math:`G_i = K_i^\top R_i` (n, d, w)."""

    name = "Gram matrices"
    queries: Tensor
    gram: Tensor

    @property
    def rows(self) -> int:
        return len(self.gram)

    @property
    def flops(self) -> float:
        return 2.0 * self.gram.numel() + 2.0 * self.queries.numel() * self.gram.shape[1]

    @property
    def workspace(self) -> float:
        return self.gram[:, 0].numel() * 2 * self.gram.element_size()

    @property
    def bytes(self) -> int:
        return (self.queries.numel() + self.gram.numel()) * self.gram.element_size()

    def features(self, u: Tensor, gate: Tensor) -> Tensor:
        n, d = self.queries.shape
        return (self.queries @ u.reshape(-1, d, d).transpose(0, 1).flatten(1)).reshape(n, -1, d) @ self.gram

    def transpose(self, weights: Tensor, gate: Tensor) -> Tensor:
        d = self.queries.shape[1]
        keys = (weights @ self.gram.mT).flatten(1)  # (n, m d)
        return (self.queries.mT @ keys).reshape(d, -1, d).transpose(0, 1).flatten(1)

    def design(self, gate: int) -> Tensor:
        return (self.queries.unsqueeze(2).unsqueeze(3) * self.gram.unsqueeze(1)).flatten(1, 2)

    def adjoint(self, dual: Tensor, gates: list[int]) -> Tensor:
        d, c = self.queries.shape[1], dual.shape[1]
        step = max(1, int(largest_workspace(dual.device) / (d * c * dual.element_size())))
        total = dual.new_zeros(d * c, self.gram[0].numel())
        for queries, gram, rho in zip(*(t.split(step) for t in (self.queries, self.gram, dual)), strict=True):
            pairs = (queries.unsqueeze(2) * rho.unsqueeze(1)).flatten(1)  # (n, d c)
            total.addmm_(pairs.mT, gram.flatten(1))
        return total.reshape(d, c, *self.gram.shape[1:]).movedim(1, 3).flatten(0, 1).unsqueeze(0)

    def split(self, step: int) -> list[Contraction]:
        return [GramMatrices(*parts) for parts in zip(self.queries.split(step), self.gram.split(step), strict=True)]


@dataclass(frozen=True)
class MeanQueries(Contraction):
    r"""Pooled gated attention, :math:`T_{i,g} = \sum_b \bar x_{i,g,b} \otimes k_b \otimes r_b`.

    Args:
        queries: (P, n, h, d) for every gate the queries that its mask lets through to each key, averaged over output positions.
        keys: (n, h, d).
        values: (n, h, w).
    """

    name = "gate-averaged queries"
    queries: Tensor
    keys: Tensor
    values: Tensor

    @property
    def rows(self) -> int:
        return len(self.keys)

    @property
    def flops(self) -> float:
        return 2.0 * self.keys.numel() * (self.keys.shape[2] + 1) + 2.0 * self.values.numel()

    @property
    def workspace(self) -> float:
        return self.keys.numel() * 2 * self.keys.element_size()

    @property
    def bytes(self) -> int:
        return self.queries.numel() * self.queries.element_size()

    def features(self, u: Tensor, gate: Tensor) -> Tensor:
        n, h, d = self.keys.shape
        out = self.values.new_empty(n, len(u), self.values.shape[2])
        for g, heads in _by_gate(gate):
            seen = self.queries[g].flatten(0, 1) @ u[heads].reshape(-1, d, d).transpose(0, 1).flatten(1)
            scores = (seen.reshape(n, h, -1, d) * self.keys.unsqueeze(2)).sum(3)
            out[:, heads] = scores.mT @ self.values
        return out

    def transpose(self, weights: Tensor, gate: Tensor) -> Tensor:
        d = self.keys.shape[2]
        out = weights.new_empty(len(gate), d * d)
        for g, heads in _by_gate(gate):
            scores = self.values @ weights[:, heads].mT  # (n, h, m)
            seen = (scores.unsqueeze(3) * self.queries[g].unsqueeze(2)).flatten(0, 1).flatten(1)
            out[heads] = (seen.mT @ self.keys.flatten(0, 1)).reshape(len(heads), d * d)
        return out

    def design(self, gate: int) -> Tensor:
        pairs = torch.einsum("nhk,nhl->nhkl", self.queries[gate], self.keys).flatten(2)
        return pairs.mT @ self.values

    def adjoint(self, dual: Tensor, gates: list[int]) -> Tensor:
        # products of keys and values are the same for every gate, and symmetric where keys are values
        d, w = self.keys.shape[2], self.values.shape[2]
        pairs = (
            torch.triu_indices(d, w)
            if self.keys is self.values
            else torch.cartesian_prod(*map(torch.arange, (d, w))).mT
        )
        row, column = pairs.to(dual.device)
        size = len(gates) * d * len(row)
        step = max(1, int(largest_workspace(dual.device) / (size * dual.element_size())))
        total = dual.new_zeros(dual.shape[1], size)
        rows = (tensor.split(step) for tensor in (self.keys, self.values, dual))
        for queries, keys, values, rho in zip(self.queries.split(step, 1), *rows, strict=True):
            # features come first: whole rows are then gathered
            products = keys.mT.contiguous().index_select(1, row) * values.mT.contiguous().index_select(1, column)
            means = queries[gates].permute(1, 0, 3, 2).flatten(1, 2)  # (n, P' d, h)
            total.addmm_(rho.mT, (means @ products.mT).flatten(1))
        total = total.mT.unflatten(0, (len(gates), d, len(row)))
        out = total.new_empty(len(gates), d, d, w, dual.shape[1])
        out[:, :, row, column] = total
        if self.keys is self.values:
            out[:, :, column, row] = total
        return out.flatten(1, 2)

    def split(self, step: int) -> list[Contraction]:
        if self.keys is self.values:
            return [
                MeanQueries(q, x, x) for q, x in zip(self.queries.split(step, 1), self.keys.split(step), strict=True)
            ]
        queries = self.queries.split(step, 1)
        return [MeanQueries(*p) for p in zip(queries, self.keys.split(step), self.values.split(step), strict=True)]


def mean_queries(queries: Tensor, masks: Tensor, keys: Tensor, values: Tensor) -> Contraction:
    """The contraction of pooled attention, from queries (n, a, d), masks (n, P, a, h), keys (n, h, d) and values (n, h, w)."""
    if masks.shape[2] == 1 and bool(masks.all()):  # nothing is masked
        return GramMatrices(queries.mean(1), keys.mT @ values)
    masks = masks.expand(-1, -1, queries.shape[1], keys.shape[1])
    means = [(mask.to(queries).mT @ queries) / queries.shape[1] for mask in masks.unbind(1)]
    return MeanQueries(torch.stack(means), keys, values)


def _by_gate(gate: Tensor) -> list[tuple[int, Tensor]]:
    """Each gate that occurs, with the heads it belongs to."""
    return [(int(g), (gate == g).nonzero().squeeze(1)) for g in gate.unique()]
