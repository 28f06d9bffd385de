r"""Non-negative least squares, with a check of the answer.

Some versions of SciPy's solver return wrong answers at times (1.15, mended in 1.16), so that what comes back is held against the
conditions that an answer satisfies; where it fails them another method is asked.
"""

from __future__ import annotations

import numpy as np

#: relative violation of the optimality conditions that rounding may leave
TOLERANCE = 1e-9


def least_squares(matrix: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, bool]:
    r"""The minimiser of :math:`\|A x - b\|` over :math:`x \ge 0`, and whether it satisfies the conditions of optimality.

    .. math:: x \ge 0, \qquad A^\top (A x - b) \ge 0, \qquad x_j\, \big(A^\top (A x - b)\big)_j = 0

    Args:
        matrix: (m, k) A.
        target: (m,) b.

    Returns:
        x (k,), non-negative whatever the solver says, and whether it is optimal to rounding.

    Source: Lawson and Hanson 1974, chapter 23.
    """
    best, done = np.zeros(matrix.shape[1]), False
    for method in (_active_set, _bounded):
        try:
            weights = np.maximum(method(matrix, target), 0.0)
        except RuntimeError:  # out of iterations
            continue
        if np.isfinite(weights).all():
            done = is_optimal(matrix, target, weights)
            best = weights
        if done:
            break
    return best, done


def is_optimal(matrix: np.ndarray, target: np.ndarray, weights: np.ndarray) -> bool:
    """Whether non-negative weights minimise the residual, to rounding."""
    residual = matrix @ weights - target
    size = np.linalg.norm(matrix, axis=0)
    scale = TOLERANCE * (np.linalg.norm(target) + size @ weights)
    gradient = matrix.T @ residual
    return bool(
        (gradient >= -scale * size).all() and (np.abs(gradient[weights > 0]) <= scale * size[weights > 0]).all()
    )


def _active_set(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    from scipy import optimize  # takes a while to import, and only a ReLU needs it

    return optimize.nnls(matrix, target, maxiter=50 * matrix.shape[1] + 100)[0]


def _bounded(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    from scipy import optimize

    return optimize.lsq_linear(matrix, target, bounds=(0, np.inf), method="bvls", max_iter=50 * matrix.shape[1] + 100).x
