r"""Gap-safe screening: lifted blocks that a certificate proves to be zero at every optimum, before the optimum is known.

The loss of a row is L-smooth, so the dual :math:`D(\rho) = -\tfrac1n \sum_i \ell^*(\rho_i, y_i)` is
:math:`\tfrac{1}{nL}`-strongly concave, and a feasible point with duality gap G lies within :math:`r = \sqrt{2nLG}` of its maximiser
:math:`\rho^\star`. A block whose constraint :math:`\|A_k^*\rho\|_2 \le n\beta` holds strictly on that ball is zero.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cvxlib.ground.checks import instance, require
from cvxlib.ground.one_process import require_alone
from cvxlib.model.activations import GatedReLU
from cvxlib.model.mixers import Mixer
from cvxlib.operators.lifted import block_design, chunks
from cvxlib.program.certificate import Certificate, Factors
from cvxlib.program.program import ConvexProgram
from cvxlib.program.solution import Solution

#: values of theta that are tried besides the one that gives the triangle inequality
SHARES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99, 0.999)


def screen(program: ConvexProgram, certificate: Certificate) -> Tensor:
    r"""The lifted blocks that are proved to be zero at every optimum of a program.

    Args:
        program: the program.
        certificate: of this program at this beta, with its dual point; the smaller its gap, the more it proves.

    Returns:
        (K,) booleans in the order of ``program.operator.gate`` and ``program.operator.block``; true means zero.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: the certificate has no dual point, or one that is not feasible here (of another program, or a larger beta).

    Source: Ndiaye, Fercoq, Gramfort and Salmon 2017; book, chapter "The regularisation path".
    """
    instance("program", program, ConvexProgram, "a ConvexProgram")
    return GapSafeRule(program)(program, certificate)


class GapSafeRule:
    r"""The rule of :func:`screen` for one program at any beta: what depends on the data alone is computed once.

    On the ball of radius r around a feasible :math:`\rho`, for every unit u and V and every :math:`\theta \in (0, 1)`,

    .. math:: &\big(\langle uV, A_k^*\rho\rangle + r \|A_k(uV)\|_F\big)^2
        \le \tfrac1\theta \|G_k V\|^2 + \tfrac{r^2}{1 - \theta} \langle V, S_k V \rangle, \\
        &G_k = A_k^*\rho, \quad S_k = \sum_i T_{i,k}^\top T_{i,k} \otimes I,

    so the largest eigenvalue of :math:`G_k^\top G_k / \theta + r^2 S_k / (1 - \theta)` bounds the squared constraint. The least of
    these over :math:`\theta` is never worse than the triangle inequality :math:`\|G_k\|_2 + r \|S_k\|_2^{1/2}`.

    Args:
        program: the program, at any beta.
    """

    def __init__(self, program: ConvexProgram) -> None:
        self.squares = _squares(program)

    @torch.no_grad()
    def __call__(self, program: ConvexProgram, certificate: Certificate) -> Tensor:
        """(K,) the blocks that are zero; arguments as :func:`screen`."""
        instance("certificate", certificate, Certificate, "a Certificate")
        point = certificate.dual_point
        require(point is not None, "certificate", "one with its dual point", certificate)
        shape = (len(program.rows), program.mixer.outputs)
        require(tuple(point.shape) == shape, "certificate", f"a dual point of shape {shape}", point)
        point = program.loss.to_domain(point.to(program.tokens), program.rows)
        gradient = program.adjoint(point) / program.samples
        rounding = 1e3 * torch.finfo(point.dtype).eps
        largest = program.dual_norm(point) / program.beta
        require(
            largest <= 1 + rounding,
            "certificate",
            f"one of this program at beta = {program.beta:.4g}",
            f"a dual point whose dual norm exceeds that by {largest - 1:.1e} of it",
        )
        gap = max(certificate.primal - program.dual_value(point), 0.0) + rounding * abs(certificate.primal)
        reach = 2 * program.loss.smoothness * gap / program.samples  # (r / n)^2
        limit = (program.beta * (1 - rounding)) ** 2
        ball = reach * torch.linalg.eigvalsh(self.squares)[:, -1]
        zero = ball < limit  # otherwise the ball alone is too large
        few = zero.nonzero().squeeze(1)
        if len(few):
            centre, size = gradient[few].mT @ gradient[few], program.norm.spectral(gradient[few])
            one = torch.eye(program.mixer.block_outputs).to(centre)
            spread = reach * torch.stack([torch.kron(square, one) for square in self.squares[few]])
            triangle = (size / (size + ball[few].sqrt())).clamp(1e-6, 1 - 1e-6)
            shares = [triangle, *(torch.full_like(triangle, share) for share in SHARES)]
            bounds = [
                torch.linalg.eigvalsh(centre / t[:, None, None] + spread / (1 - t)[:, None, None])[:, -1]
                for t in shares
            ]
            zero[few] = torch.stack(bounds).amin(0) < limit
        return zero


def restrict(program: ConvexProgram, gates: Tensor) -> ConvexProgram:
    """The program of a gated ReLU with some of its gates only.

    Args:
        program: a program with the activation :class:`cvxlib.GatedReLU`.
        gates: (P',) indices of the gates to keep, or (P,) booleans.

    Raises:
        TypeError: the activation is another.
        ValueError: no gate is kept.
    """
    instance("activation", program.activation, GatedReLU, "a GatedReLU")
    require_alone("program", program.reduce)
    directions = program.activation.directions
    kept = GatedReLU(directions[gates.to(directions.device)])
    return ConvexProgram(
        program.mixer, kept, program.loss, program.tokens, program.targets, program.beta, program.pool, copy=False
    )


def separable(program: ConvexProgram) -> bool:
    """Whether gates can be left out one by one: there are several, and none is merged with another in one of the mixer's blocks only."""
    gates = len(program.operator.gate.unique())
    return gates > 1 and len(program.operator.gate) == gates * program.mixer.blocks


def move(solution: Solution, program: ConvexProgram) -> Solution:
    """A solution as a point of a program with more or fewer of the same gates; terms on gates that it lacks are left out."""
    if program is solution.program:
        return solution
    places = _places(solution.program, program)[solution.factors.block]
    here = places >= 0
    factors = Factors(solution.factors.u[here], solution.factors.v[here], places[here])
    return dataclasses.replace(solution, program=program, factors=factors)


def _squares(program: ConvexProgram) -> Tensor:
    r"""(K, w, w) :math:`\sum_i T_{i,k}^\top T_{i,k}` over the rows of the design tensor, in chunks of samples."""
    mixer, operator, totals = program.mixer, program.operator, []
    for b, seen in enumerate(mixer.split(program.tokens)):
        kept = operator.gate[operator.block == b]
        total = seen.new_zeros(len(kept), mixer.width, mixer.width)
        start = 0
        for part in chunks(mixer, seen, mixer.p + 2 * program.gates.count):
            masks = program.frozen.masks(b, start, start + len(part))[:, kept]
            start += len(part)
            total += _chunk_squares(mixer, part, masks, program.pool == "mean")
        totals.append(total)
    return program.reduce(torch.cat(totals))


def _chunk_squares(mixer: Mixer, tokens: Tensor, masks: Tensor, pooled: bool) -> Tensor:
    """(K_b, w, w) the sum over some samples (n, s, d), as one block sees them, through masks (n, K_b, a, h)."""
    design = block_design(mixer, tokens, masks, pooled)
    return torch.einsum("ngpw,ngpx->gwx", *[design if pooled else design.flatten(0, 1)] * 2)


def _places(source: ConvexProgram, target: ConvexProgram) -> Tensor:
    """(K,) for each lifted block of one program the block of the other with the same direction, or -1."""
    index = {name: k for k, name in enumerate(_names(target))}
    return torch.tensor([index.get(name, -1) for name in _names(source)], device=source.tokens.device)


def _names(program: ConvexProgram) -> list[tuple[int, bytes]]:
    """The mixer's block and the direction of each lifted block."""
    operator, directions = program.operator, program.activation.directions.cpu().numpy()
    return [(b, directions[g].tobytes()) for g, b in zip(operator.gate.tolist(), operator.block.tolist(), strict=True)]
