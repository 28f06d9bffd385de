r"""The factored operator: predictions of heads and their gradients, in parts of the samples, never forming a lifted matrix.

Predictions are bilinear in the factors, :math:`f = \sum_j \phi(u_j) V_j` with features :math:`\phi_i(u_j) = T_{i,g_j}^\top u_j`. Along
a line they are a quadratic polynomial of the step, whose coefficients cost one evaluation of the features: a line search is free.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cvxlib.geometry.norms import frobenius
from cvxlib.ground.checks import require
from cvxlib.ground.one_process import ALONE, OneProcess
from cvxlib.model.contractions import Contraction, Design, largest_workspace
from cvxlib.operators.gates import Gates
from cvxlib.operators.hidden import HiddenMatrices
from cvxlib.operators.lifted import block_design
from cvxlib.operators.maps import BlockOperator, CoreMap

#: what contractions may keep in memory besides the tokens; what does not fit is computed again in every pass over the samples
MEMORY = 2**30
#: heads whose features one part of the samples is made for
HEADS = 16
#: floating point operations that take as long as reading one byte
FLOPS_PER_BYTE = 8


@dataclass(frozen=True)
class Part:
    """Consecutive samples: which predictions are theirs, and for each of the mixer's blocks their contraction."""

    rows: slice
    blocks: tuple[Contraction, ...]


def _budget(device: torch.device) -> float:
    """``MEMORY``, or a quarter of what a GPU has free."""
    return torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else MEMORY


def _cost(part: Contraction) -> float:
    """What the features of one head of many take, in operations: its workspace is its own, what is kept is read for all."""
    return part.flops + FLOPS_PER_BYTE * (part.workspace + part.bytes / HEADS)


class FactoredOperator:
    r"""The bilinear map from factors to predictions, and its gradients.

    Factors are u (m, p), v (m, w, c / B) and k (m,), the lifted block of each head; k stays on the CPU.

    Args:
        gates: the mixer's gates on the tokens, which may be memory-mapped.
        pooled: average over the output positions.
        gate: (K,) the gate of each lifted block.
        block: (K,) the mixer's block of each lifted block.
        rows: the number of predictions.
        reduce: sums a tensor over all processes that hold samples.
        memory: bytes that may be kept besides the tokens, by default ``MEMORY``, or a quarter of what a GPU has free.
        dtype: of the arithmetic, by default the tokens' own.
    """

    def __init__(
        self,
        gates: Gates,
        pooled: bool,
        gate: Tensor,
        block: Tensor,
        rows: int,
        reduce: OneProcess = ALONE,
        memory: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.gates, self.mixer, self.tokens, self.pooled = gates, gates.mixer, gates.tokens, pooled
        mixer, tokens = self.mixer, self.tokens
        self.gate, self.block, self.rows, self.reduce = gate.cpu(), block.cpu(), rows, reduce
        self.dtype, self.device = dtype or tokens.dtype, tokens.device
        self.memory = _budget(self.device) if memory is None else memory
        #: whether this is the operator of the tokens' absolute values
        self.absolute = False
        self._make, part = self._choose()
        #: operations for one head's features, and bytes that are kept, of one sample
        self.flops, self.bytes = part.flops * mixer.blocks, part.bytes * mixer.blocks
        self.step = max(1, min(len(tokens), int(largest_workspace(self.device) / (HEADS * max(part.workspace, 1)))))
        self.stored = self.bytes * len(tokens) <= self.memory
        #: which contraction it is, in words
        self.path = part.name if self.stored else f"{part.name}, computed in every pass"
        self._parts: list[Part] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, p, q) of the lifted blocks."""
        return len(self.gate), self.mixer.p, self.mixer.q

    def _choose(self) -> tuple[Callable[[Tensor, Tensor], Contraction], Contraction]:
        """The contraction that takes least time: how it is made, and that of one sample and block."""
        one, masks = self._seen(0, 1)[0]
        pooled = self._pooled(one, masks) if self.pooled else None
        make, part = (self._hidden, self._hidden(one, masks)) if pooled is None else (self._shortcut, pooled)
        # only its shape counts; where it could not be kept it would have to be formed head by head in every pass
        shape = (self.gates.count, part.rows, self.mixer.width, self.mixer.p)
        design = Design(torch.empty(shape, dtype=self.dtype, device="meta"))
        fits = design.bytes * len(self.tokens) * self.mixer.blocks <= self.memory
        return (self._design, design) if fits and _cost(design) < _cost(part) else (make, part)

    def every_way(self) -> Iterator[FactoredOperator]:
        """The same operator by each contraction that the mixer has, whatever it takes."""
        one, masks = self._seen(0, 1)[0]
        ways = [self._hidden, self._design]
        if self.pooled and self._pooled(one, masks) is not None:
            ways.append(self._shortcut)
        for make in ways:
            other = copy.copy(self)
            other._make, other.path, other._parts = make, make(one, masks).name, None
            yield other

    # the parts

    def _seen(self, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """What each of the mixer's blocks sees of consecutive samples, or of their absolute values, and its masks."""
        parts = self.mixer.split(self.tokens[start:stop].to(self.dtype))
        masks = [self.gates.masks(b, start, stop) for b in range(len(parts))]
        return [(seen.abs() if self.absolute else seen, mask) for seen, mask in zip(parts, masks, strict=True)]

    def _hidden(self, seen: Tensor, masks: Tensor) -> Contraction:
        return HiddenMatrices(self.mixer, seen, masks, self.pooled)

    def _pooled(self, seen: Tensor, masks: Tensor) -> Contraction | None:
        """The mixer's own contraction, unless it was inherited from a class whose hidden matrices are others."""
        if not self.mixer.written_for_its_maps("pooled"):
            return None
        return self.mixer.pooled(seen, masks)

    def _shortcut(self, seen: Tensor, masks: Tensor) -> Contraction:
        """The mixer's own contraction, or the hidden matrices of samples for which it has none."""
        part = self._pooled(seen, masks)
        return self._hidden(seen, masks) if part is None else part

    def _design(self, seen: Tensor, masks: Tensor) -> Contraction:
        design = block_design(self.mixer, seen, masks, self.pooled)
        design = design if self.pooled else design.flatten(0, 1)  # (rows, P, p, w)
        return Design(design.permute(1, 0, 3, 2).contiguous())

    def parts(self) -> Iterator[Part]:
        """The samples in parts, kept for the next pass where they fit in memory."""
        if self._parts is not None:
            yield from self._parts
            return
        kept, each = [], self.rows // len(self.tokens)
        for start in range(0, len(self.tokens), self.step):
            stop = min(start + self.step, len(self.tokens))
            blocks = tuple(self._make(seen, masks) for seen, masks in self._seen(start, stop))
            part = Part(slice(start * each, stop * each), blocks)
            if self.stored:
                kept.append(part)
            yield part
        if self.stored:
            self._parts = kept

    # heads

    def features(self, part: Part, u: Tensor, k: Tensor) -> list[Tensor]:
        """For each of the mixer's blocks the features (rows, m_b, w) of its heads."""
        return [c.features(u[mine], self.gate[k[mine]]) for c, mine in zip(part.blocks, self.heads(k), strict=True)]

    def combine(self, features: list[Tensor], v: Tensor, k: Tensor) -> Tensor:
        """(rows, c) predictions from features and v."""
        pairs = zip(features, self.heads(k), strict=True)
        return torch.cat([phi.flatten(1) @ v[mine].flatten(0, 1) for phi, mine in pairs], 1)

    def predictions(self, u: Tensor, v: Tensor, k: Tensor, features: list[list[Tensor]] | None = None) -> Tensor:
        """(rows, c) predictions of heads, from their features in every part where these are known."""
        parts = enumerate(self.parts())
        return torch.cat([self.combine(features[i] if features else self.features(x, u, k), v, k) for i, x in parts])

    def line(
        self,
        u: Tensor,
        v: Tensor,
        du: Tensor,
        dv: Tensor,
        k: Tensor,
        features: list[list[Tensor]] | None = None,
        changes: list[list[Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(rows, c) the coefficients of t and t^2 in the predictions at u + t du, v + t dv."""
        first, second = [], []
        for index, part in enumerate(self.parts()):
            phi = features[index] if features else self.features(part, u, k)
            change = changes[index] if changes else self.features(part, du, k)
            first.append(self.combine(phi, dv, k) + self.combine(change, v, k))
            second.append(self.combine(change, dv, k))
        return torch.cat(first), torch.cat(second)

    def gradients(
        self, u: Tensor, v: Tensor, k: Tensor, dual: Tensor, features: list[list[Tensor]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The gradients (m, p) and (m, w, c / B) of the inner product of the predictions with (rows, c)."""
        gu, gv = torch.zeros_like(u), torch.zeros_like(v)
        for index, part in enumerate(self.parts()):
            phis = features[index] if features else self.features(part, u, k)
            columns = dual[part.rows].chunk(self.mixer.blocks, 1)
            for c, mine, phi, rho in zip(part.blocks, self.heads(k), phis, columns, strict=True):
                gv[mine] += (phi.flatten(1).mT @ rho).reshape(v[mine].shape)
                gu[mine] += c.transpose(torch.einsum("no,mwo->nmw", rho, v[mine]), self.gate[k[mine]])
        return self.reduce(gu), self.reduce(gv)

    def adjoint(self, dual: Tensor) -> Tensor:
        """(K, p, q) the adjoint of the lifted operator, applied to (rows, c)."""
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for part in self.parts():
            columns = dual[part.rows].chunk(self.mixer.blocks, 1)
            for b, (contraction, rho) in enumerate(zip(part.blocks, columns, strict=True)):
                slots = (self.block == b).nonzero().squeeze(1)
                total[slots] += contraction.adjoint(rho, self.gate[slots].tolist()).flatten(2)
        return self.reduce(total)

    def adjoint_within(self, dual: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        r"""The adjoint of the lifted operator, and how far it can be from that of any point near a given one.

        .. math:: \|\mathrm{fl}(A_k^* \rho) - A_k^* x\|_F \le \gamma\, \big\||A_k|^* |\rho|\big\|_F + (1 + \gamma) \big\||A_k|^* \Delta\big\|_F
           \quad\text{where } |x - \rho| \le \Delta

        :math:`|A_k|` is the same contraction of the tokens' absolute values, with the same masks: sums of products round by no more than
        :math:`\gamma_m = m u / (1 - m u)` times what they would be if nothing cancelled, in whatever order they are added.

        Args:
            dual: (rows, c) the point :math:`\rho`.
            distance: (rows, c) entry by entry a bound on the distance to the point x that is meant.

        Returns:
            (K, p, q) the adjoint at the point, and (K,) the bounds.

        Raises:
            ValueError: the mixer does not say that its maps are sums of products.

        Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1; book, chapter "Certificates".
        """
        require(self.mixer.bounded_by is not None, "mixer", "one whose maps are sums of products", repr(self.mixer))
        one, (p, w) = self._seen(0, 1)[0][0], (self.mixer.p, self.mixer.width)
        a, h = self.mixer.hidden(one, one.new_zeros(1, *self.mixer.shape)).shape[2:]
        signed = copy.copy(self)
        if self.mixer.bounded_by == "rows" and self._make != self._design:
            signed._make, signed.stored, signed._parts = self._design, False, None
            size = self.gates.count * p * max(a * h, w) * dual.element_size()
            signed.step = max(1, min(self.step, int(4 * largest_workspace(self.device) / size)))
        absolute = copy.copy(signed)
        absolute.absolute, absolute.stored, absolute._parts = True, False, None
        # sums over samples, output positions, hidden entries, entries of u and values, one inside the other, and a few products
        samples = int(self.reduce(dual.new_tensor([len(self.tokens)])))
        roundings = (samples + a + h + p + w + 32) * torch.finfo(dual.dtype).eps / 2
        gamma = roundings / (1 - roundings)
        near = absolute.adjoint(gamma * dual.abs() + (1 + gamma) * distance)
        # a product that underflows loses at most the smallest number, times what it is multiplied by afterwards
        size = max(1.0, float(self.tokens.abs().max()))
        largest = size * size * max(1.0, float(dual.abs().max()))
        products = 8.0 * len(self.tokens) * a * h * (p + w) * (p * w * dual.shape[1]) ** 0.5
        lost = self.reduce(dual.new_tensor([products * largest * math.ulp(0.0)]))
        return signed.adjoint(dual), frobenius(near) * (1 + 4 * gamma) + lost

    def core(self, left: Tensor, right: Tensor, k: Tensor) -> BlockOperator:
        r"""The operator restricted to :math:`Z_k = P_k C_k Q_k^\top`, for left P (K', p, R) and right Q (K', q, R') of the ascending blocks k (K',)."""
        r = left.shape[2]
        heads, u = k.repeat_interleave(r), left.mT.flatten(0, 1)
        mine = self.heads(k)
        features = [left.new_empty(self.rows, len(m), r, self.mixer.width) for m in mine]
        for part in self.parts():
            for kept, phi in zip(features, self.features(part, u, heads), strict=True):
                kept[part.rows] = phi.unflatten(1, kept.shape[1:3])
        right = right.mT.unflatten(2, (self.mixer.width, self.mixer.block_outputs))
        return BlockOperator(tuple(CoreMap(phi, right[m]) for phi, m in zip(features, mine, strict=True)), self.reduce)

    def heads(self, k: Tensor) -> list[Tensor]:
        """For each of the mixer's blocks the heads that belong to it."""
        if self.mixer.blocks == 1:
            return [torch.arange(len(k))]
        return [(self.block[k] == b).nonzero().squeeze(1) for b in range(self.mixer.blocks)]
