r"""The convex side: positional attention with a free mixing matrix is the linear MLP-Mixer, whose optimum is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import cvxlib
from cvxlib.ground.checks import instance, positive_float, require
from cvxlib.program.certificate import Factors
from cvxlib.spatial.data import SpatialSample, SpatialTask


def patch_targets(sample: SpatialSample, task: SpatialTask, kind: str = "lit") -> Tensor:
    r"""Targets for each patch, (n, D, 1).

    ``"lit"`` asks each patch for the signal of its set, :math:`t_i = y\,\mathbb 1\{i \in S_l\}`; ``"label"`` asks every patch for y.
    Both sum to a multiple of the label; only the first tells the sets apart.

    Raises:
        ValueError: an unknown kind.

    Source: book, chapter "Spatial structure".
    """
    instance("sample", sample, SpatialSample, "a SpatialSample")
    require(kind in ("lit", "label"), "kind", "'lit' or 'label'", kind)
    labels = sample.labels.unsqueeze(1).expand(-1, task.patches)
    if kind == "lit":
        labels = labels * (task.membership == sample.lit.unsqueeze(1))
    return labels.unsqueeze(2).clone()


def mixer_program(task: SpatialTask, sample: SpatialSample, beta: float, targets: str = "lit") -> cvxlib.ConvexProgram:
    r"""The convex program of positional attention with free mixing matrices, :math:`f(X) = \sum_j W_j X V_j`, on a sample.

    Args:
        task: the distribution.
        sample: n draws.
        beta: weight decay.
        targets: ``"lit"`` or ``"label"`` per patch (:func:`patch_targets`), or ``"pooled"``: the label from the mean prediction.

    Returns:
        The program of a linear MLP-Mixer with one output, under the squared loss, in float64.

    Source: Sahiner et al. 2022, section 4; Jelassi, Sander and Li 2022, Definition 3.2; book, chapter "Spatial structure".
    """
    require(targets in ("lit", "label", "pooled"), "targets", "'lit', 'label' or 'pooled'", targets)
    pool = "mean" if targets == "pooled" else None
    values = sample.labels.unsqueeze(1) if pool else patch_targets(sample, task, targets)
    mixer = cvxlib.MLPMixer(tokens=task.patches, features=len(task.signal), outputs=1)
    tokens = sample.tokens.double()
    return cvxlib.ConvexProgram(mixer, cvxlib.Linear(), cvxlib.SquaredLoss(), tokens, values.double(), beta, pool=pool)


def mixing_matrix(factors: Factors, index: int = 0) -> Tensor:
    r"""(s, s) the mixing matrix :math:`W_j` of a term, with the sign that makes its entries sum to a positive number.

    A term :math:`W_j \otimes V_j` determines :math:`W_j` up to sign only. Terms are sorted: index 0 has the largest singular value.
    An optimum that is zero has no terms and gives the zero-information answer, a matrix of zeros, if ``factors.u`` is empty.
    """
    if len(factors) == 0:
        return factors.u.new_zeros(factors.u.shape[1:])
    matrix = factors.u[index]
    return matrix * (1 if float(matrix.sum()) >= 0 else -1)


@dataclass(frozen=True)
class PopulationOptimum:
    r"""The optimum of the per-patch program for infinitely many samples: :math:`Z^\star = \zeta\,\operatorname{vec}(B)\,w^{\star\top}`.

    Args:
        zeta: the scale, 0 from ``beta_max`` on.
        blocks: (D, D) B, 1 within sets and 0 between.
        objective: the optimal value.
        beta_max: :math:`C/\sqrt L`.
    """

    zeta: float
    blocks: Tensor
    objective: float
    beta_max: float


def population_optimum(task: SpatialTask, beta: float) -> PopulationOptimum:
    r"""The global optimum of the per-patch program (targets ``"lit"``, squared loss, linear MLP-Mixer) in the population.

    .. math:: Z^\star = \zeta\, \operatorname{vec}(B)\, w^{\star\top}, \qquad
        \zeta = \frac{\big(C/\sqrt L - \beta\big)_+}{C \sqrt L\,\big(\tfrac CL + (1 - \tfrac1L) q\big)}

    Args:
        task: the distribution; the noise does not enter.
        beta: weight decay.

    Returns:
        The optimum and its value.

    Source: book, chapter "Spatial structure", Theorem "The population optimum".
    """
    count, size = task.sets.shape
    beta = positive_float("beta", beta)
    beta_max, norm = size / count**0.5, size * count**0.5  # norm: the Frobenius norm of B
    energy = size / count + (1 - 1 / count) * task.q
    zeta = max(0.0, beta_max - beta) / (norm * energy)
    index = task.membership
    blocks = (index.unsqueeze(1) == index).to(torch.float64)
    objective = size / 2 - zeta * size**2 + zeta**2 * energy * norm**2 / 2 + beta * zeta * norm
    return PopulationOptimum(zeta, blocks, objective, beta_max)
