r"""The norms that weight decay becomes: the block nuclear norm, and for ReLU its cone-constrained sibling.

Blocks are stacked: ``z`` is ``(K, p, q)`` and the norm is :math:`\sum_k \|Z_k\|_*`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cvxlib.geometry.arrangements import PARALLEL, Hyperplanes
from cvxlib.geometry.cones import NODES, Bounds, dual_norm, facets, nuclear_norm
from cvxlib.ground.checks import require

LARGEST_EIGEN = 1024  # side of a Gram matrix whose eigenvalues are all computed
BLOCKS = 20  # of a Krylov space of a larger one, after the first
EPS, TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny
CLOSE = 1e-7  # relative distance from its largest singular value at which the search for an upper bound starts


class BlockNuclearNorm:
    r"""The sum of the nuclear norms of stacked blocks, :math:`N(Z) = \sum_k \|Z_k\|_*`.

    Nothing here is differentiated by autograd: the SVD's derivative does not exist at repeated singular values.

    Source: book, chapter "The nuclear norm".
    """

    @torch.no_grad()
    def value(self, z: Tensor) -> Tensor:
        """The norm of (K, p, q) blocks, a scalar."""
        return torch.linalg.svdvals(z).sum()

    @torch.no_grad()
    def dual(self, g: Tensor) -> Tensor:
        r"""The dual norm :math:`\max_k \|G_k\|_2` of (K, p, q) blocks, a scalar (from above, as :meth:`spectral`)."""
        return self.spectral(g).max()

    @torch.no_grad()
    def spectral(self, g: Tensor) -> Tensor:
        """(K,) the largest singular value of each block; where blocks are large a bound from above, by :func:`top_singular`."""
        if min(g.shape[1:]) > LARGEST_EIGEN:
            return torch.stack([g.new_tensor(top_singular(block, 16)[2]) for block in g])
        # squares of numbers of ordinary size neither over- nor underflow; what is not finite stays so
        size = g.abs().amax((1, 2), keepdim=True)
        scale = torch.where(torch.isfinite(size) & (size > 0), size, 1.0)
        m = torch.where(torch.isfinite(size), g / scale, 0.0)
        gram = m @ m.mT if m.shape[-2] < m.shape[-1] else m.mT @ m
        top = torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0).sqrt() * scale.flatten()
        return torch.where(torch.isfinite(size.flatten()), top, torch.inf)

    @torch.no_grad()
    def prox(self, z: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        r"""Singular value thresholding, and the norm of what is left.

        .. math:: \operatorname{prox}(Z) = \arg\min_W \tfrac12\|W - Z\|_F^2 + \tau N(W)

        Args:
            z: (K, p, q) blocks.
            threshold: :math:`\tau \ge 0`.

        Returns:
            (K, p, q) the minimiser, and its norm as a scalar.
        """
        u, sigma, vh = torch.linalg.svd(z, full_matrices=False)
        sigma = (sigma - threshold).clamp(min=0)
        return (u * sigma.unsqueeze(-2)) @ vh, sigma.sum()


class BlockConeNorm:
    r"""The sum of the cone-constrained nuclear norms of stacked blocks, :math:`N(Z) = \sum_k \|Z_k\|_{C_k,*}`.

    Block k may only be built from :math:`u v^\top` with u in the cone :math:`C_k` on which the stacked data have the signs that its
    direction gives them. Values are upper bounds, which are exact where the search over a cone could be completed.

    Args:
        rows: for each block b of the mixer, its stacked data (R_b, p), as :class:`cvxlib.geometry.arrangements.Hyperplanes` takes them.
        directions: (K, p) a direction inside each cone.
        block: (K,) the mixer's block that each lifted block belongs to.
        nodes: limit on the faces of one cone that a search may open.

    Source: Sahiner et al. 2022, section 3; book, chapter "ReLU and its cones".
    """

    def __init__(self, rows: list[np.ndarray], directions: Tensor, block: Tensor, nodes: int = NODES) -> None:
        self._planes = [Hyperplanes(part, merge=PARALLEL) for part in rows]
        self.block = block.tolist()
        self._directions = directions.detach().double().cpu().numpy()
        self._signs = [self._planes[b].signs_at(u) for b, u in zip(self.block, self._directions, strict=True)]
        self._cones: dict[int, np.ndarray] = {}
        self.nodes = nodes

    def moved(self, b: int) -> np.ndarray:
        """(R_b,) by how much, as a fraction of its length, a row of block b was moved where directions differ by rounding."""
        return self._planes[b].off

    def cone(self, k: int) -> np.ndarray:
        """(f, p) the facets of the cone of lifted block k: unit rows of which none is implied by the others."""
        return self._facets(k) @ self._basis(k)

    def direction(self, k: int) -> np.ndarray:
        """(p,) the direction inside the cone of lifted block k."""
        return self._directions[k]

    def locate(self, u: Tensor, block: Tensor) -> Tensor:
        """(m,) the lifted blocks in whose cones the vectors (m, p), of the given mixer's blocks (m,), lie (or come closest to lying)."""
        found = []
        for vector, b in zip(u.detach().double().cpu().numpy(), block.tolist(), strict=True):
            mine = [k for k, owner in enumerate(self.block) if owner == b]
            signs = np.array([self._signs[k] for k in mine])
            # a block whose data are all zero has one cone, which is everything
            inside = (signs * (self._planes[b].normals @ vector)).min(1, initial=np.inf)
            found.append(mine[int(inside.argmax())])
        return torch.tensor(found, dtype=torch.long, device=u.device)

    def value(self, z: Tensor) -> Tensor:
        """An upper bound on the norm of (K, p, q) blocks, a scalar; :meth:`bounds` gives both sides."""
        return z.new_tensor(self.bounds(z).upper)

    def bounds(self, z: Tensor, tol: float = 1e-6) -> Bounds:
        """The norm of (K, p, q) blocks from both sides."""
        lower = upper = 0.0
        for k, matrix in enumerate(z.detach().double().cpu().numpy()):
            if np.abs(matrix).max() > 0:
                inside = self._basis(k) @ matrix
                outside = np.linalg.norm(matrix - self._basis(k).T @ inside)
                part = nuclear_norm(inside, self._facets(k), tol=tol)
                # what no row sees is free of the cone: it can only add to the norm
                lower, upper = lower + part.lower, upper + part.upper + outside * min(matrix.shape) ** 0.5
        return Bounds(lower, upper)

    def dual(self, g: Tensor) -> Tensor:
        """An upper bound on the dual norm of (K, p, q) blocks, a scalar."""
        return g.new_tensor(self.search(g)[0].upper)

    def search(
        self, g: Tensor, threshold: float = 0.0
    ) -> tuple[Bounds, list[tuple[float, int, np.ndarray, np.ndarray]]]:
        r"""The dual norm :math:`\max_k \max \{u^\top G_k v : u \in C_k\}` from both sides, and the linear oracle.

        Args:
            g: (K, p, q) blocks.
            threshold: what the oracle is asked to exceed.

        Returns:
            the bounds, and a list of (value, k, u, v) with the best term of each block searched whose value exceeds the threshold,
            largest first.
        """
        matrices = g.detach().double().cpu().numpy()
        spectral = np.linalg.norm(matrices, 2, axis=(1, 2)) if len(matrices) else np.zeros(0)
        spectral = spectral * (1 + 4 * max(g.shape[1:]) * np.finfo(float).eps)
        best, upper, terms = 0.0, 0.0, []
        for k in np.argsort(-spectral):
            if spectral[k] <= max(best, np.finfo(float).tiny):
                break
            basis = self._basis(k)
            inside = basis @ matrices[k]
            found = dual_norm(inside, self._facets(k), floor=best, nodes=self.nodes)
            # G lies in the span of the rows, to rounding: what the basis leaves of it counts in full
            outside = float(np.linalg.norm(matrices[k] - basis.T @ inside))
            upper = max(upper, min(found.upper + outside, float(spectral[k])))
            if found.u is not None and found.v is not None:
                best = max(best, found.lower)
                if found.lower > threshold:
                    terms.append((found.lower, int(k), basis.T @ found.u, found.v))
        return Bounds(best, max(upper, best)), sorted(terms, key=lambda term: -term[0])

    def _basis(self, k: int) -> np.ndarray:
        return self._planes[self.block[k]].basis

    def _facets(self, k: int) -> np.ndarray:
        if k not in self._cones:
            planes = self._planes[self.block[k]]
            normals = planes.normals @ planes.basis.T
            self._cones[k] = facets(self._signs[k][:, None] * normals)
        return self._cones[k]


def frobenius(g: Tensor) -> Tensor:
    """(K,) the Frobenius norms of blocks (K, p, q), not below them in exact arithmetic; no square over- or underflows."""
    size = g.abs().amax((1, 2))
    scale = torch.where(torch.isfinite(size) & (size > 0), size, 1.0)
    norm = (g / scale.reshape(-1, 1, 1)).flatten(1).norm(dim=1) * scale
    return norm * (1 + (g[0].numel() + 8) * torch.finfo(g.dtype).eps) + TINY


@torch.no_grad()
def spectral_above(g: Tensor) -> Tensor:
    r"""(K,) numbers that no singular value of the blocks (K, p, q) exceeds, in exact arithmetic.

    .. math:: \|G\|_2 \le \sigma_1\, \|U\|_2 \|V\|_2 + \|G - U \Sigma V^\top\|_F, \qquad \|U\|_2^2 \le 1 + \|U^\top U - I\|_F

    for whatever U, Σ and V an algorithm returns: the residuals count, and what rounding may hide in them. Large blocks are bounded by
    :func:`top_singular` and Rump's shift of its Cholesky test. Infinite where an entry is not finite.

    Args:
        g: (K, p, q) float64 blocks.

    Source: Rump 2006, "Verification of positive definiteness", and 2011, "Verified bounds for singular values"; book, chapter "Certificates".
    """
    # a power of two scales without rounding, so that no square over- or underflows
    size = g.abs().amax((1, 2))
    finite = torch.isfinite(size)
    scale = torch.exp2(torch.floor(torch.log2(torch.where(finite, size, 1.0).clamp(min=TINY))))
    m = torch.where(finite.reshape(-1, 1, 1), g / scale.reshape(-1, 1, 1), 0.0)
    if min(g.shape[1:]) > LARGEST_EIGEN:
        above = torch.stack([g.new_tensor(_shifted(block)) for block in m])
    else:
        above = _by_residual(m)
    # entries that scaling makes subnormal lose at most so much
    above = (above + m[0].numel() * TINY) * scale
    return torch.where(finite & ~torch.isnan(above), above, torch.inf)


def _by_residual(m: Tensor) -> Tensor:
    """(K,) bounds on the singular values of blocks (K, p, q) from the residuals of their decompositions."""
    count, (p, q) = m[0].numel(), m.shape[1:]
    try:
        u, sigma, vh = torch.linalg.svd(m, full_matrices=False)
    except torch.linalg.LinAlgError:  # the algorithm did not converge: the Frobenius norm is a bound as well
        return m.flatten(1).norm(dim=1) * (1 + count * EPS)
    inner = sigma.shape[1]
    left = u * sigma.unsqueeze(1)
    residual = (m - left @ vh).flatten(1).norm(dim=1)
    rounding = (inner + 4) * EPS * (left.abs() @ vh.abs() + m.abs()).flatten(1).norm(dim=1)
    bounds = sigma.amax(1)
    for basis, length in ((u, p), (vh.mT, q)):
        defect = (basis.mT @ basis - torch.eye(inner, dtype=m.dtype, device=m.device)).flatten(1).norm(dim=1)
        bounds = bounds * (1 + (defect * (1 + inner**2 * EPS) + (length + 2) * EPS * inner) / 2)
    return (bounds + (residual + rounding) * (1 + count * EPS)) * (1 + 8 * EPS)


def _shifted(block: Tensor) -> float:
    """:func:`spectral_above` of one large block, from the bound t of :func:`top_singular`, whose test of t² I - M^T M rounds."""
    bound = top_singular(block, 16)[2]
    unit, q = EPS / 2, min(block.shape)
    products = 2 * (max(block.shape) + 2) * unit * float(block.norm()) ** 2 * (1 + 1e-9)
    factor = 2 * (q + 2) * unit * q * bound**2
    above = (bound**2 * (1 + 4 * EPS) + products + factor) ** 0.5 * (1 + 4 * EPS)
    return above if math.isfinite(above) else math.inf


@torch.no_grad()
def top_singular(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
    """The largest singular values of a matrix, the singular vectors of its shorter side, and a bound on all singular values.

    A block Krylov space bounds large matrices from below only; :math:`t^2 I - M^\\top M` has a Cholesky factor only if t bounds from above.

    Args:
        matrix: (p, q).
        count: how many.

    Returns:
        (count,) singular values, ascending; (min(p, q), count) vectors; the bound. The first two are in float64 and the matrix's dtype.

    Source: Musco and Musco 2015, Algorithm 2; book, chapter "The staircase".
    """
    require(bool(torch.isfinite(matrix).all()), "matrix", "finite entries", "NaN or infinite ones")
    tall = (matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix).double()
    gram = tall.mT @ tall
    if len(gram) <= LARGEST_EIGEN:
        squares, vectors = torch.linalg.eigh(gram)
    else:
        basis = _krylov(gram, count)
        squares, rotation = torch.linalg.eigh(basis.mT @ gram @ basis)
        vectors = basis @ rotation
    sigma, vectors = squares[-count:].clamp(min=0).sqrt(), vectors[:, -count:].to(matrix)
    largest = float(sigma[-1])
    if len(gram) <= LARGEST_EIGEN or largest == 0:
        return sigma, vectors, largest
    excess = CLOSE
    shifted = gram.neg_()
    shifted.diagonal().add_((largest * (1 + excess)) ** 2)
    while int(torch.linalg.cholesky_ex(shifted).info):
        last, excess = excess, 2 * excess
        shifted.diagonal().add_((largest * (1 + excess)) ** 2 - (largest * (1 + last)) ** 2)
    return sigma, vectors, largest * (1 + excess)


def _krylov(gram: Tensor, count: int) -> Tensor:
    """(q, r) an orthonormal basis of the block Krylov space of a symmetric matrix."""
    block = torch.randn(len(gram), count, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(gram)
    basis = torch.linalg.qr(block)[0]
    for _ in range(min(BLOCKS, len(gram) // count - 1)):
        block = gram @ basis[:, -count:]
        for _ in range(2):  # once leaves rounding behind
            block = torch.linalg.qr(block - basis @ (basis.mT @ block))[0]
        basis = torch.cat([basis, block], 1)
    return basis
