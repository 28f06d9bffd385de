r"""Newton's method with a logarithmic barrier: a local minimum of a ReLU network whose neurons are held in their cones.

Inside its cone a neuron is linear, so the network is smooth and its Hessian is at hand. The barrier does not mind thin cones, where
first-order methods crawl.

Source: Nocedal and Wright 2006, chapter 19 (barrier methods); book, chapter "ReLU and its cones".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cvxlib.program.program import ConvexProgram


@dataclass
class HeldNetwork:
    r"""The training objective as a function of the weights, with gates and cones fixed.

    .. math:: \phi_\mu(u, v) = \frac1n \sum_i \ell(f_i, y_i) + \frac\beta2 \big(\|u\|^2 + \|v\|^2\big)
       - \mu \sum_j \sum_r \log (K_j u_j)_r

    Args:
        program: loss, targets and beta.
        designs: for each block of the mixer the design tensor (rows, m_b, p, w) of its neurons.
        members: for each block the indices (m_b,) of its neurons.
        walls: (m, f, p) unit rows of the cones, padded with zeros.
    """

    program: ConvexProgram
    designs: list[Tensor]
    members: list[Tensor]
    walls: Tensor

    def slack(self, u: Tensor) -> Tensor:
        """(m, f) distances to the walls; 1 for padding."""
        return torch.einsum("mfp,mp->mf", self.walls, u) + (self.walls == 0).all(2)

    def value(self, u: Tensor, v: Tensor, mu: float) -> float:
        slack = self.slack(u)
        if not bool((slack > 0).all()):
            return float("inf")
        decay = self.program.beta / 2 * float(u.square().sum() + v.square().sum())
        return self.program.data_loss(self.forward(u, v)) + decay - mu * float(slack.log().sum())

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """(rows, c) predictions."""
        w = self.program.mixer.width
        return torch.cat(
            [
                torch.einsum("rmpw,mp,mwc->rc", design, u[mine], v[mine].unflatten(1, (w, -1)))
                for design, mine in zip(self.designs, self.members, strict=True)
            ],
            1,
        )

    def newton(self, u: Tensor, v: Tensor, mu: float) -> tuple[Tensor, Tensor]:
        """(N,) gradient and (N, N) Hessian in the stacked weights of all neurons, (u_j, v_j) one neuron after the other."""
        program, n, (m, p), q = self.program, self.program.samples, u.shape, v.shape[1]
        loss, rows, beta = program.loss, program.rows, program.beta
        predictions = self.forward(u, v)
        residual = loss.gradient(predictions, rows) / n
        outputs = predictions.shape[1]
        jacobian = u.new_zeros(len(predictions), outputs, m, p + q)
        cross = u.new_zeros(m, p, q)
        columns = torch.arange(outputs, device=u.device).chunk(len(self.designs))
        for design, mine, own in zip(self.designs, self.members, columns, strict=True):
            weights = v[mine].unflatten(1, (design.shape[3], len(own)))
            hidden = torch.einsum("rmpw,mp->rmw", design, u[mine])
            by_u = torch.einsum("rmpw,mwc->rcmp", design, weights)
            # each output sees its own column of V only
            by_v = torch.einsum("rmw,co->rcmwo", hidden, torch.eye(len(own), dtype=u.dtype, device=u.device)).flatten(3)
            jacobian[:, own[:, None], mine[None, :]] = torch.cat([by_u, by_v], 3)
            cross[mine] = torch.einsum("rmpw,rc->mpwc", design, residual[:, own]).flatten(2)
        flat = jacobian.flatten(2)
        directions = torch.eye(outputs, dtype=u.dtype, device=u.device)
        curved = torch.stack([loss.hessian_product(predictions, e.expand_as(predictions)) for e in directions], 1)
        weighted = torch.einsum("rco,roN->rcN", curved, flat)
        hessian = (flat.flatten(0, 1).mT @ weighted.flatten(0, 1)) / n
        gradient = torch.einsum("rcN,rc->N", flat, residual).unflatten(0, (m, p + q)) + beta * torch.cat([u, v], 1)
        inverse = (~(self.walls == 0).all(2)) / self.slack(u)
        gradient[:, :p] -= mu * torch.einsum("mfp,mf->mp", self.walls, inverse)

        blocks = u.new_zeros(m, p + q, p + q)
        blocks[:, :p, :p] = mu * torch.einsum("mfp,mf,mfs->mps", self.walls, inverse.square(), self.walls)
        blocks[:, :p, p:], blocks[:, p:, :p] = cross, cross.mT
        blocks += beta * torch.eye(p + q, dtype=u.dtype, device=u.device)
        index = torch.arange(m, device=u.device)
        hessian.view(m, p + q, m, p + q)[index, :, index, :] += blocks
        return gradient.flatten(), hessian


def polish(
    network: HeldNetwork, u: Tensor, v: Tensor, precision: float, evaluated: Callable[[], None], steps: int = 25
) -> tuple[Tensor, Tensor]:
    """Weights at a local minimum inside the cones, to an absolute precision of the objective.

    Args:
        network: what to minimise.
        u: (m, p) weights strictly inside the cones.
        v: (m, q) weights.
        precision: what the barrier may cost in the end.
        evaluated: called once per evaluation of the network.
        steps: Newton steps per barrier.
    """
    (m, p), q = u.shape, v.shape[1]
    walls = max(int((~(network.walls == 0).all(2)).sum()), 1)
    last = precision / walls
    mu = max(last, 1e-3 * network.value(u, v, 0.0) / walls)
    shift = 0.0
    while True:
        value = network.value(u, v, mu)
        for _ in range(steps):
            gradient, hessian = network.newton(u, v, mu)
            evaluated()
            size = float(hessian.diagonal().abs().amax())
            while True:  # the bilinear term makes the Hessian indefinite away from a minimum
                shifted = hessian + shift * torch.eye(len(hessian), dtype=u.dtype, device=u.device)
                factor, bad = torch.linalg.cholesky_ex(shifted)
                if int(bad) == 0:
                    break
                shift = max(4 * shift, 1e-8 * size)
            step = -torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1)
            slope = float(gradient @ step)
            move = step.unflatten(0, (m, p + q))
            change = torch.einsum("mfp,mp->mf", network.walls, move[:, :p]) / network.slack(u)
            length = min(1.0, 0.99 / max(float(-change.amin()), 1e-300))
            for _ in range(30):
                trial = network.value(u + length * move[:, :p], v + length * move[:, p:], mu)
                evaluated()
                if trial <= value + 1e-4 * length * slope + 1e-15 * abs(value):
                    break
                length /= 2
            else:
                break
            u, v, value = u + length * move[:, :p], v + length * move[:, p:], trial
            shift = shift / 4 if shift > 1e-12 * size else 0.0
            if -slope <= 0.1 * max(mu, 1e-16):
                break
        if mu <= last:
            return u, v
        mu = max(last, mu / 8)
