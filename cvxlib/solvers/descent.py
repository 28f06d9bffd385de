r"""Descent on the factors: preconditioned L-BFGS whose line search costs nothing.

Minimises :math:`\frac1n\sum_i \ell\big(\sum_j \phi_i(u_j) V_j, y_i\big) + \frac\beta2 \sum_j (\|u_j\|^2 + \|V_j\|_F^2)`, which is not convex: it is
the step that turns the subspaces, and the convex core (see :mod:`cvxlib.solvers.staircase`) is what makes the result global.

Attention's features are cubic in the tokens, so gradients in u and V are scaled by an approximate inverse Hessian: for V the second moment
of each head's features, for u the Kronecker product of the second moments of the design tensor along each axis of u.

Source: Liu and Nocedal 1989 (L-BFGS); Gupta, Koren and Singer 2018 (one factor per axis).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cvxlib.operators.factored import FactoredOperator
from cvxlib.program.program import ConvexProgram

LBFGS_PAIRS = 20
PROBES = 48  # random vectors that estimate the design tensor's second moments
READ_EVERY = 10  # iterations between two times that the host reads the objective


class AxisMoments:
    r"""Second moments of the design tensor along the axes of u: :math:`\frac1n\sum_i T_i T_i^\top \approx \bigotimes_a M_a`, in its eigenbasis."""

    def __init__(self, program: ConvexProgram, operator: FactoredOperator) -> None:
        shape = operator.mixer.shape
        generator = torch.Generator().manual_seed(operator.reduce.rank)
        gates = torch.arange(PROBES) % len(operator.gate)
        probes = torch.zeros(PROBES, operator.mixer.p, dtype=operator.dtype, device=operator.device)
        blocks = operator.block[gates]
        for part in operator.parts():
            rows = part.rows.stop - part.rows.start
            signs = torch.randint(2, (rows, PROBES, operator.mixer.width), generator=generator) * 2 - 1
            signs = signs.to(probes)
            for b, contraction in enumerate(part.blocks):
                mine = (blocks == b).nonzero().squeeze(1)
                if len(mine):
                    probes[mine] += contraction.transpose(signs[:, mine], operator.gate[gates[mine]])
        # independent signs on every process: the second moments add up, not the probes
        probes = probes.double().reshape(PROBES, *shape)
        moments = []
        for axis in range(len(shape)):
            unfolded = probes.movedim(axis + 1, 0).flatten(1)
            moments.append(operator.reduce(unfolded @ unfolded.mT) / (PROBES * program.samples))
        trace = float(moments[0].trace())
        pairs = [torch.linalg.eigh(moment) for moment in moments]
        self.bases = [basis.to(probes.device, operator.dtype) for _, basis in pairs]
        spectrum = torch.ones((), dtype=torch.float64, device=probes.device)
        for values, _ in pairs:
            spectrum = spectrum.unsqueeze(-1) * values.clamp(min=0)
        self.spectrum = (spectrum / max(trace, 1e-300) ** (len(shape) - 1)).to(operator.dtype)

    def solve(self, u: Tensor, weight: Tensor, shift: float) -> Tensor:
        r"""(m, p) the solutions of :math:`(a_j M + \beta I) x_j = u_j` for weights a (m,)."""
        x = self._rotate(u.reshape(-1, *self.spectrum.shape), transpose=True)
        x = x / (weight.reshape(-1, *[1] * self.spectrum.ndim) * self.spectrum + shift)
        return self._rotate(x, transpose=False).reshape(u.shape)

    def _rotate(self, x: Tensor, transpose: bool) -> Tensor:
        for axis, basis in enumerate(self.bases, start=1):
            x = torch.tensordot(x, basis if transpose else basis.mT, dims=([axis], [0])).movedim(-1, axis)
        return x


class Preconditioner:
    """An approximate inverse Hessian at given factors: a matrix per head for V, :class:`AxisMoments` for u; arguments as :func:`minimise`."""

    def __init__(
        self,
        program: ConvexProgram,
        operator: FactoredOperator,
        moments: AxisMoments,
        u: Tensor,
        v: Tensor,
        k: Tensor,
        predictions: Tensor,
        features: list[list[Tensor]] | None,
    ) -> None:
        curvature = program.loss.curvature(predictions, program.rows).mean(1)  # (rows,)
        m, w, _ = v.shape
        grams = v.new_zeros(m, w, w)
        for index, part in enumerate(operator.parts()):
            phis = features[index] if features else operator.features(part, u, k)
            for phi, mine in zip(phis, operator.heads(k), strict=True):
                weighted = (phi * curvature[part.rows, None, None]).transpose(0, 1)  # (m, rows, w)
                grams[mine] += weighted.mT @ phi.transpose(0, 1)
        grams = operator.reduce(grams) / program.samples
        mean = float(operator.reduce(curvature.sum()) / program.samples)
        grams.diagonal(dim1=1, dim2=2).add_(program.beta)
        self.factor = torch.linalg.cholesky(grams)
        self.weight = v.square().sum((1, 2)) / w * mean
        self.moments, self.beta = moments, program.beta

    def __call__(self, gu: Tensor, gv: Tensor) -> tuple[Tensor, Tensor]:
        """The approximate Newton direction of gradients (m, p) and (m, w, c / B)."""
        return self.moments.solve(gu, self.weight, self.beta), torch.cholesky_solve(gv, self.factor)


@torch.no_grad()
def minimise(
    program: ConvexProgram,
    operator: FactoredOperator,
    moments: AxisMoments,
    u: Tensor,
    v: Tensor,
    k: Tensor,
    iterations: int,
    tol: float,
    keep_features: bool,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Descend from factors (m, p), (m, w, c / B) in blocks k.

    Args:
        program: what to minimise.
        operator: its factored operator.
        moments: for the preconditioner.
        u: left factors.
        v: right factors.
        k: their lifted blocks.
        iterations: at most so many.
        tol: stop once ten iterations lower the objective by less than this fraction of it.
        keep_features: hold the features of all samples in memory instead of computing them anew.

    Returns:
        u, v, the predictions (rows, c), and the number of evaluations.
    """
    loss, rows, beta, n, reduce = program.loss, program.rows, program.beta, program.samples, operator.reduce
    kept = [operator.features(part, u, k) for part in operator.parts()] if keep_features else None
    f = operator.predictions(u, v, k, kept)
    precondition = Preconditioner(program, operator, moments, u, v, k, f, kept)

    def gradient() -> tuple[Tensor, Tensor]:
        gu, gv = operator.gradients(u, v, k, loss.gradient(f, rows) / n, kept)
        return gu + beta * u, gv + beta * v

    def value(f: Tensor) -> Tensor:
        total = reduce(loss.value(f, rows).sum()) / n + beta / 2 * (u.square().sum() + v.square().sum())
        return reduce.agree(total)[0]

    gu, gv = gradient()
    pairs: list[tuple[Tensor, ...]] = []
    last, evaluations = value(f), 2
    for iteration in range(1, iterations + 1):
        du, dv = _direction(pairs, gu, gv, precondition)
        moved = [operator.features(part, du, k) for part in operator.parts()] if keep_features else None
        f1, f2 = operator.line(u, v, du, dv, k, kept, moved)
        step = _search(program, reduce, f, f1, f2, (u, v), (du, dv))
        u, v, f = u + step * du, v + step * dv, f + step * f1 + step**2 * f2
        if keep_features:
            kept = [
                [phi + step * change for phi, change in zip(*pair, strict=True)]
                for pair in zip(kept, moved, strict=True)
            ]
        old_u, old_v = gu, gv
        gu, gv = gradient()
        evaluations += 1
        pairs.append((step * du, step * dv, gu - old_u, gv - old_v))
        del pairs[:-LBFGS_PAIRS]
        if iteration % READ_EVERY == 0:  # the only time the host waits for the device
            now = value(f)
            if float(last - now) <= tol * abs(float(now)):
                break
            last = now
    u, v = reduce.agree(u, v)
    # the predictions were updated along the way: take away what rounding has added up
    return u, v, operator.predictions(u, v, k), evaluations


def _direction(pairs, gu: Tensor, gv: Tensor, precondition: Preconditioner) -> tuple[Tensor, Tensor]:
    """The L-BFGS direction, by the two-loop recursion; a pair without positive curvature counts for nothing."""
    qu, qv, weights = gu, gv, []
    for su, sv, yu, yv in reversed(pairs):
        curvature = (su * yu).sum() + (sv * yv).sum()
        size = ((yu.square().sum() + yv.square().sum()) * (su.square().sum() + sv.square().sum())).sqrt()
        rho = torch.where(curvature > 1e-8 * size, 1 / curvature, 0.0)
        a = rho * ((su * qu).sum() + (sv * qv).sum())
        qu, qv = qu - a * yu, qv - a * yv
        weights.append((rho, a))
    qu, qv = precondition(qu, qv)
    if pairs:
        su, sv, yu, yv = pairs[-1]
        zu, zv = precondition(yu, yv)
        scale = ((su * yu).sum() + (sv * yv).sum()) / ((zu * yu).sum() + (zv * yv).sum())
        scale = torch.where(weights[0][0] > 0, scale, 1.0)
        qu, qv = scale * qu, scale * qv
    for (su, sv, yu, yv), (rho, a) in zip(pairs, reversed(weights), strict=True):
        b = rho * ((yu * qu).sum() + (yv * qv).sum())
        qu, qv = qu + (a - b) * su, qv + (a - b) * sv
    return -qu, -qv


def _search(program, reduce, f: Tensor, f1: Tensor, f2: Tensor, point, direction) -> Tensor:
    r"""The best step along :math:`f + t f_1 + t^2 f_2`: three Newton steps from 1, against a few shorter steps and none at all."""
    loss, rows, beta, n = program.loss, program.rows, program.beta, program.samples
    (u, v), (du, dv) = point, direction
    cross = (u * du).sum() + (v * dv).sum()
    square = du.square().sum() + dv.square().sum()
    step = torch.ones((), dtype=f.dtype, device=f.device)
    for _ in range(3):
        at, slope = f + step * f1 + step**2 * f2, f1 + 2 * step * f2
        residual = loss.gradient(at, rows)
        first = reduce(
            torch.stack(
                [(residual * slope).sum(), (slope * loss.hessian_product(at, slope)).sum(), (residual * f2).sum()]
            )
        )
        slope = first[0] / n + beta * (cross + step * square)
        bend = first[1] / n + 2 * first[2] / n + beta * square
        step = torch.where(bend > 0, step - slope / bend, 2 * step).clamp(1e-3, 8.0)
    steps = [
        step,
        torch.ones_like(step),
        torch.full_like(step, 0.25),
        torch.full_like(step, 0.03),
        torch.zeros_like(step),
    ]
    values = reduce(torch.stack([loss.value(f + t * f1 + t**2 * f2, rows).sum() for t in steps])) / n
    steps = torch.stack(steps)
    best = (values + beta * (steps * cross + steps.square() * square / 2)).argmin()
    return reduce.agree(steps.take(best))[0]  # an index in brackets would make the host wait
