r"""Optima to fifty digits, of programs with one block in which p or q is 1: there the nuclear norm is the Euclidean norm.

Squared loss: :math:`\min_z \tfrac1{2n}\|Ez - y\|^2 + \beta\|z\|` has :math:`z = (H + \mu I)^{-1} g` with :math:`\mu\|z\| = \beta`, where
:math:`H = E^\top E/n` and :math:`g = E^\top y/n`: the secular equation. Cross-entropy of one number per row: convex in :math:`z \in \mathbb R^c`.

Every value is the objective at a point, so it is an upper bound on the optimum whatever went wrong on the way there; the dual value at the
point's residual says how far above it can be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import numpy as np

from benchmarks.campaign.exact import ExactProgram, logs, mp


@dataclass(frozen=True)
class Optimum:
    """A reference value: an upper bound on the optimum, how tight it is, and where it is taken.

    Args:
        value: the objective at ``z``.
        gap: value minus a lower bound, relative to the value.
        z: (p w, c) the point, in many bits.
        residual: (rows, c) the loss's gradient there, in many bits.
    """

    value: mpmath.mpf
    gap: float
    z: np.ndarray
    residual: np.ndarray


def optimum(exact: ExactProgram) -> Optimum:
    """The optimum of a program with one block and p or q equal to 1; for cross-entropy with p w = 1."""
    ((_, lifted),) = exact.design()
    design = lifted.numbers().reshape(len(lifted.integers), -1)
    if exact.pooled:
        design = design / exact.positions
    z = _secular(exact, design) if exact.squared else _entropy(exact, design[:, 0])
    predictions = design @ z
    value = exact.data_loss(predictions) + exact.beta * _norm(z)
    residual = predictions - exact.exact_targets if exact.squared else _softmax_residual(predictions, exact.targets)
    return Optimum(value, _gap(exact, design, residual, value), z, residual)


def _gap(exact: ExactProgram, design: np.ndarray, residual: np.ndarray, value: mpmath.mpf) -> float:
    """The relative gap that the residual, scaled into the ball, leaves."""
    spectral = _norm(design.T @ residual) / exact.n
    step = min(mp.one, exact.beta / spectral) if spectral else mp.one
    point = residual * step
    if exact.squared:
        conjugate = sum((x * (x / 2 + y) for x, y in zip(point.flat, exact.exact_targets.flat, strict=True)), mp.zero)
    else:
        probabilities = point.copy()
        probabilities[np.arange(len(point)), exact.targets] += 1
        conjugate = sum((x * logs.log(x) for x in probabilities.flat if x > 0), mp.zero)
    dual = -conjugate / exact.n
    return float(abs(value - dual) / value) if value else float(abs(dual))


def _secular(exact: ExactProgram, design: np.ndarray) -> np.ndarray:
    """(p w, c) the minimiser, by Newton's method on the secular equation, which comes from the right and never overshoots."""
    gram, gradient = design.T @ design / exact.n, design.T @ exact.exact_targets / exact.n
    size, beta, zero = _norm(gradient), exact.beta, gradient * 0
    if size <= beta:
        return zero
    mu = sum(gram.diagonal(), mp.zero) * beta / (size - beta)
    for _ in range(300):
        factor = _cholesky(gram, mu)
        z = _solve(factor, gradient)
        length = _norm(z)
        # psi = 1/|z| - mu/beta is concave; its derivative has <z, (H + mu)^-1 z> / |z|^3
        curved = (z * _solve(factor, z)).sum()
        step = (1 / length - mu / beta) / (curved / length**3 - 1 / beta)
        if abs(step) <= mu * mp.ldexp(mp.one, -260):
            break
        mu = mu - step if mu - step > 0 else mu / 2
    return z


def _cholesky(gram: np.ndarray, shift: mpmath.mpf) -> np.ndarray:
    size = len(gram)
    factor = np.full((size, size), mp.zero, dtype=object)
    for i in range(size):
        for j in range(i + 1):
            left = gram[i, j] + (shift if i == j else 0) - sum((factor[i, k] * factor[j, k] for k in range(j)), mp.zero)
            # rounding may leave a diagonal entry below the shift, which it is not below in truth
            factor[i, j] = mp.sqrt(max(left, shift)) if i == j else left / factor[j, j]
    return factor


def _solve(factor: np.ndarray, right: np.ndarray) -> np.ndarray:
    z, size = right.copy(), len(factor)
    for i in range(size):
        z[i] = (z[i] - sum((factor[i, k] * z[k] for k in range(i)), mp.zero)) / factor[i, i]
    for i in reversed(range(size)):
        z[i] = (z[i] - sum((factor[k, i] * z[k] for k in range(i + 1, size)), mp.zero)) / factor[i, i]
    return z


def _entropy(exact: ExactProgram, numbers: np.ndarray) -> np.ndarray:
    """(1, c) the minimiser for predictions ``numbers[r] z``: along the steepest ray first, then by Newton's method in all c entries."""
    c, n, beta, targets = exact.mixer.outputs, exact.n, logs.mpf(exact.beta), exact.targets
    numbers = np.array([logs.mpf(x) for x in numbers], dtype=object)

    def gradient(z: np.ndarray) -> np.ndarray:
        return (_softmax_residual(numbers[:, None] * z, targets) * numbers[:, None]).sum(0) / n

    start = gradient(np.full(c, logs.zero, dtype=object))
    size = _norm(start)
    if size <= beta:
        return np.full((1, c), mp.zero, dtype=object)
    ray = -start / size
    z = _along(lambda t: (gradient(ray * t) * ray).sum() + beta, max(abs(x) for x in numbers))
    z = ray * z
    for _ in range(0 if c == 2 else 60):
        z, done = _newton(gradient(z), z, numbers, beta, n)
        if done:
            break
    return np.array([[mp.mpf(x) for x in z]], dtype=object)


def _along(slope: Callable, scale: mpmath.mpf) -> mpmath.mpf:
    """The zero of an increasing function of t > 0 that is negative near 0, to 150 bits, which leave an error of 300 bits in the value.

    Halved on a logarithmic scale until the bracket is narrow, then the Illinois rule.
    """
    low = high = 1 / scale
    while slope(high) < 0 and high < low * 2**400:
        high = high * 16
    while slope(low) > 0:
        low = low / 16
    at_low, at_high = slope(low), slope(high)
    before = high
    for _ in range(200):
        apart = high > 2 * low  # the rule of false position would crawl over many magnitudes
        middle = logs.sqrt(low * high) if apart else (low * at_high - high * at_low) / (at_high - at_low)
        value = slope(middle)
        if value == 0 or (not apart and abs(middle - before) <= logs.ldexp(middle, -150)):
            break
        before = middle
        # the end that stays counts half the next time
        if value < 0:
            low, at_low, at_high = middle, value, at_high if apart else at_high / 2
        else:
            high, at_high, at_low = middle, value, at_low if apart else at_low / 2
    return middle


def _newton(gradient: np.ndarray, z: np.ndarray, numbers: np.ndarray, beta, n: int) -> tuple[np.ndarray, bool]:
    """One step of Newton's method on the loss plus beta |z|, of at most half z's length; true where it has converged."""
    c, length = len(z), _norm(z)
    total = gradient + z * (beta / length)
    p = _softmax(numbers[:, None] * z)
    hessian = np.full((c, c), logs.zero, dtype=object)
    for number, row in zip(numbers, p, strict=True):
        hessian = hessian + (np.diag(row) - np.outer(row, row)) * (number * number / n)
    identity = np.eye(c, dtype=int).astype(object)
    hessian = hessian + (identity - np.outer(z, z) / length**2) * (beta / length)
    hessian = hessian + np.full((c, c), hessian.diagonal().max() / c, dtype=object)  # the shift of all logits
    step = np.array(list(logs.lu_solve(logs.matrix(hessian.tolist()), logs.matrix(total.tolist()))), dtype=object)
    if _norm(step) <= length * logs.ldexp(logs.one, -180):
        return z - step, True
    share = min(logs.one, length / (2 * _norm(step)))
    return z - step * share, False


def _softmax(predictions: np.ndarray) -> np.ndarray:
    out = np.empty(predictions.shape, dtype=object)
    for r, row in enumerate(predictions):
        top = max(row)
        exponentials = [logs.exp(entry - top) for entry in row]
        total = sum(exponentials)
        out[r] = [x / total for x in exponentials]
    return out


def _softmax_residual(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    out = _softmax(predictions)
    for r, target in enumerate(targets):
        # 1 - p as the sum of the others: nothing cancels
        out[r, target] = -sum(out[r, k] for k in range(out.shape[1]) if k != target)
    return out


def _norm(array: np.ndarray) -> mpmath.mpf:
    total = sum((x * x for x in array.flat), mp.zero)
    return mp.sqrt(total)
