r"""Cone-constrained norms: what the weight decay of a ReLU network becomes on one cone of an arrangement.

On the cone :math:`C = \{u : K u \ge 0\}` of a sign pattern the penalty is the gauge

.. math:: \|Z\|_{C,*} &= \min \Big\{\sum_j \|u_j\|\,\|v_j\| : Z = \sum_j u_j v_j^\top,\ u_j \in C\Big\}, \\
   \|G\|_{C,\circ} &= \max_{u \in C,\ \|u\| \le 1} \|G^\top u\|_2 .

Both are NP-hard in general, so every function here returns bounds from both sides, which meet where the search is complete. All
searches run in float64 on the CPU: they are combinatorial and small.

Source: Sahiner et al. 2022, section 3; book, chapter "ReLU and its cones".
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

import numpy as np

from cvxlib.geometry.arrangements import inner_point
from cvxlib.geometry.nonnegative import least_squares
from cvxlib.ground.checks import require, wrong_value

#: how far a unit vector may stick out of a cone of unit rows and still be taken to lie in it
INSIDE = 1e-12
EPS = float(np.finfo(float).eps)
#: by how much the projection of a vector may stick out
STICKS_OUT = 1e-9
#: subspaces that one search may open before it settles for an interval
NODES = 3_000


@dataclass(frozen=True)
class Bounds:
    """A value known from both sides, and the rank-one matrix ``u v^T`` that attains the lower one."""

    lower: float
    upper: float
    u: np.ndarray | None = None
    v: np.ndarray | None = None

    def exact(self, tol: float = 1e-9) -> bool:
        """Whether the bounds meet to a relative tolerance."""
        return self.upper - self.lower <= tol * max(abs(self.upper), np.finfo(float).tiny)


def facets(cone: np.ndarray) -> np.ndarray:
    """The rows (k, p) of a cone with an inside that the others do not imply, scaled to unit length."""
    rows = cone / np.linalg.norm(cone, axis=1, keepdims=True)
    if rows.shape[1] == 2 and len(rows) > 2:  # in the plane the two outermost rows
        middle = rows.mean(0)
        angle = np.arctan2(middle[0] * rows[:, 1] - middle[1] * rows[:, 0], rows @ middle)
        return rows[[angle.argmin(), angle.argmax()]]
    kept = list(range(len(rows)))
    for index in range(len(rows)):
        others = [k for k in kept if k != index]
        if others:  # a row stays unless it is seen to be a combination of the others
            weights, _ = least_squares(rows[others].T, rows[index])
            if np.linalg.norm(rows[others].T @ weights - rows[index]) < INSIDE:
                kept = others
    return rows[kept]


def project(point: np.ndarray, cone: np.ndarray) -> np.ndarray:
    r"""The nearest point of a cone (k, p) to a point (p,): :math:`x + K^\top\lambda` with non-negative least squares for λ (Moreau)."""
    return _project(point, cone)[0]


def _project(point: np.ndarray, cone: np.ndarray) -> tuple[np.ndarray, float]:
    r"""The nearest point of a cone, and a bound on :math:`\max \{x^\top u : K u \ge 0, \|u\| \le 1\}`.

    Any :math:`\lambda \ge 0` bounds it by :math:`\|x + K^\top\lambda\|`, so that the bound does not rest on how λ was found.
    """
    if len(cone) == 0 or (cone @ point).min() >= 0:
        return point, float(np.linalg.norm(point)) * (1 + len(point) * EPS)
    weights, _ = least_squares(cone.T, -point)
    near = point + cone.T @ weights
    rounding = (len(cone) + len(point) + 2) * EPS * (np.abs(point) + np.abs(cone).T @ weights)
    return near, float(np.linalg.norm(near) * (1 + len(point) * EPS) + np.linalg.norm(rounding))


def dual_norm(g: np.ndarray, cone: np.ndarray, *, floor: float = 0.0, nodes: int = NODES) -> Bounds:
    r"""The dual norm of the cone-constrained nuclear norm, from both sides.

    .. math:: \|G\|_{C,\circ} = \max \{ u^\top G v : K u \ge 0,\ \|u\| \le 1,\ \|v\| \le 1 \}

    One column: two projections onto the cone. Otherwise a search over faces: the maximiser lies inside some face, where it must be
    the top singular vector of G restricted to the face's span; that singular value bounds all smaller faces. It ends after finitely
    many faces, and at ``nodes`` of them at the latest, then with an interval. The bound is the smaller of the search's and
    :func:`lagrangian_bound`.

    Args:
        g: (p, q) matrix.
        cone: (k, p) unit rows of K, best without redundant ones (:func:`facets`).
        floor: values up to this do not interest: the search stops once the maximum is proved not to exceed it.
        nodes: limit on the number of faces.

    Returns:
        bounds with unit vectors u (p,) in the cone and v (q,) that attain the lower one (``None`` where it is 0).
    """
    if g.shape[1] == 1:
        return _one_column(g, cone)
    best, point = 0.0, None
    for start in _starts(g):
        value, candidate = ascend(g, cone, start)
        if value > best:
            best, point = value, candidate
    order = itertools.count()  # breaks ties in the heap
    value, vector = _top_left(g)
    heap: list[tuple[float, int, np.ndarray, np.ndarray, frozenset[int]]] = [
        (-value, next(order), vector, np.eye(len(g)), frozenset())
    ]
    opened: set[frozenset[int]] = {frozenset()}
    upper = value
    while heap:
        value, _, vector, basis, active = heapq.heappop(heap)
        value = -value
        upper = max(value, best)
        if value <= max(best, floor) * (1 + INSIDE):
            break
        sides = [sign for sign in (1.0, -1.0) if not len(cone) or (sign * (cone @ vector)).min() >= -INSIDE]
        if sides:
            best, point = value, sides[0] * vector
            continue
        if len(opened) >= nodes:
            upper = max(best, min(upper, lagrangian_bound(g, cone, floor=max(best, floor))))
            break
        for index in range(len(cone)):
            normal = cone[index] @ basis
            size = np.linalg.norm(normal)
            child = active | {index}
            if index in active or size <= INSIDE or child in opened or basis.shape[1] == 1:
                continue
            opened.add(child)
            inner = basis @ _complement(normal / size)
            value, small = _top_left(inner.T @ g)
            if value > max(best, floor):
                heapq.heappush(heap, (-value, next(order), inner @ small, inner, child))
    else:
        upper = max(best, floor)
    # singular values, and the bases of faces that are products of so many reflections, are known to rounding
    upper = max(upper, best) + 8 * (sum(g.shape) + len(g) ** 2) * EPS * float(np.linalg.norm(g))
    if point is None:
        return Bounds(0.0, upper)
    v = g.T @ point
    return Bounds(float(np.linalg.norm(v)), upper, point, v / np.linalg.norm(v))


def ascend(g: np.ndarray, cone: np.ndarray, start: np.ndarray, steps: int = 50) -> tuple[float, np.ndarray | None]:
    r"""A local maximum of :math:`\|G^\top u\|` over unit vectors of a cone, by alternating :math:`v \propto G^\top u`, :math:`u \propto P_C(G v)`.

    Returns:
        the value and u, or 0 and ``None`` if the start leads nowhere.
    """
    u, value, best = project(start, cone), 0.0, None
    for _ in range(steps):
        size = np.linalg.norm(u)
        if size <= INSIDE:
            break
        u = u / size
        if not _inside(u, cone):
            break
        v = g.T @ u
        new = float(np.linalg.norm(v))
        if new <= value * (1 + 1e-9):
            break
        value, best = new, u
        u = project(g @ v, cone)
    return value, best


def lagrangian_bound(g: np.ndarray, cone: np.ndarray, *, floor: float = 0.0, steps: int = 300) -> float:
    r"""An upper bound on the dual norm, :math:`\sqrt{\lambda_{\max}(G G^\top + K^\top N K)}` for a symmetric :math:`N \ge 0` found by subgradient steps.

    On the cone :math:`u^\top K^\top N K u \ge 0`, so every such N gives a bound; N = 0 gives the spectral norm. The steps end early
    once the bound is down to ``floor``.
    """
    square = g @ g.T
    weights = np.zeros((len(cone), len(cone)))
    best = float(np.linalg.eigvalsh(square)[-1])
    scale, momentum = best, np.zeros_like(weights)
    for step in range(steps if len(cone) else 0):
        lifted = cone.T @ weights @ cone
        value, y = _top(square + lifted)
        # what rounding may have hidden: the two parts can cancel
        size = float(np.linalg.norm(g) ** 2 + np.linalg.norm(np.abs(cone).T @ weights @ np.abs(cone)))
        best = min(best, value + 8 * (len(g) + len(cone)) * EPS * size)
        if best <= floor**2 * (1 + INSIDE):
            break
        momentum = 0.9 * momentum + 0.1 * np.outer(cone @ y, cone @ y)
        weights = np.maximum(weights - scale * momentum / (1 + 0.05 * step), 0)
    return float(max(best, 0.0) ** 0.5)


def nuclear_norm(z: np.ndarray, cone: np.ndarray, *, tol: float = 1e-6, rounds: int = 300) -> Bounds:
    r"""The cone-constrained nuclear norm :math:`\|Z\|_{C,*}`, from both sides.

    Upper: a decomposition into rank-one terms with u in the cone. Lower: :math:`\langle G, Z\rangle / \|G\|_{C,\circ}` for the multipliers
    G of the decomposition. A linear program chooses among the terms known so far, the linear oracle adds the term that
    violates :math:`u^\top G v \le 1` most, until the bounds meet.

    Args:
        z: (p, q) matrix.
        cone: (k, p) unit rows of a cone with an inside.
        tol: relative gap at which to stop.
        rounds: limit on the number of linear programs.

    Raises:
        ValueError: the cone has no inside, so that Z may have no decomposition at all.
    """
    from scipy.optimize import linprog

    left, sigma, right = np.linalg.svd(z, full_matrices=False)
    keep = sigma > INSIDE * max(sigma[0], np.finfo(float).tiny)
    if not keep.any():
        return Bounds(0.0, 0.0)
    terms = []
    for a, b in zip(left.T[keep], right[keep], strict=True):
        for part, v in zip(split(a, cone), (b, -b), strict=True):
            if np.linalg.norm(part) > 0:
                terms.append(np.outer(part / np.linalg.norm(part), v).ravel())
    centre = left[:, keep] @ right[keep]
    centre = centre / dual_norm(centre, cone).upper
    lower, upper = float((centre * z).sum()), np.inf
    for _ in range(rounds):
        columns = np.stack(terms, 1)
        result = linprog(np.ones(columns.shape[1]), A_eq=columns, b_eq=z.ravel(), method="highs")
        # a decomposition counts only if its terms add up to Z
        if result.x is None or np.abs(columns @ np.maximum(result.x, 0) - z.ravel()).max() > 1e-7 * np.abs(z).max():
            break
        upper = min(upper, float(np.maximum(result.x, 0).sum()))
        if upper - lower <= tol * upper:
            break
        outer = result.eqlin.marginals.reshape(z.shape)
        # half way between the best feasible multipliers and the program's own: the latter alone jump about
        for trial in (0.5 * (centre + outer), outer):
            found = dual_norm(trial, cone)
            value = float((trial * z).sum()) / found.upper
            if value > lower:
                lower, centre = value, trial / found.upper
            if found.u is not None and found.v is not None:
                terms.append(np.outer(found.u, found.v).ravel())
    return Bounds(min(lower, upper), upper)


def split(u: np.ndarray, cone: np.ndarray, steps: int = 500) -> tuple[np.ndarray, np.ndarray]:
    r"""Write u as a difference of two points of a cone at the least added norm.

    .. math:: \min \{ \|u_+\| + \|u_-\| : u = u_+ - u_-,\ K u_+ \ge 0,\ K u_- \ge 0 \}

    A second-order cone program, solved by majorisation: each step is a least-distance problem, solved by non-negative least squares.

    Args:
        u: (p,) any vector.
        cone: (k, p) unit rows of a cone with an inside.

    Returns:
        the two parts; one of them is 0 where u or -u lies in the cone.

    Raises:
        ValueError: the cone has no inside, so that differences of its points need not reach u.
    """
    values = cone @ u
    size = np.linalg.norm(u)
    if len(cone) == 0 or values.min() >= -INSIDE * size:
        return u, np.zeros_like(u)
    if values.max() <= INSIDE * size:
        return np.zeros_like(u), -u
    inside = inner_point(cone)
    if inside is None:
        raise wrong_value("cone", "a cone with an inside", "one without: some rows force others to vanish on it")
    bound = np.maximum(values, 0)  # K u+ >= max(0, K u) says both memberships at once
    margin = cone @ inside
    plus = inside * (bound / margin).max()
    best = np.linalg.norm(plus) + np.linalg.norm(plus - u)
    point = plus
    for _ in range(steps):
        first, second = 1 / np.linalg.norm(point), 1 / np.linalg.norm(point - u)
        centre = u * second / (first + second)
        # the nearest point to the centre with K x >= bound (Lawson and Hanson 1974, chapter 23)
        need = (bound - cone @ centre) / size
        if need.max() <= 0:
            point = centre
        else:
            matrix = np.vstack([cone.T, need])
            target = np.zeros(len(matrix))
            target[-1] = 1.0
            residual = matrix @ least_squares(matrix, target)[0] - target
            if residual[-1] >= 0:  # of a solver's answer that is none
                break
            point = centre - size * residual[:-1] / residual[-1]
        point = point + inside * max(((bound - cone @ point) / margin).max(), 0.0)  # rounding
        value = np.linalg.norm(point) + np.linalg.norm(point - u)
        done = value >= best * (1 - 1e-12)
        if value < best:
            best, plus = value, point
        if done:
            break
    return plus, plus - u


def any_pattern_bound(rows: np.ndarray, weights: np.ndarray, steps: int = 100) -> float:
    r"""An upper bound on :math:`\max_{\|u\| \le 1} \|\sum_r \max(l_r^\top u, 0)\, w_r\|` that needs no pattern at all.

    With :math:`\max(z, 0) = \tfrac12 (z + |z|)` and any positive diagonal scaling S,

    .. math:: \Big\|\sum_r \max(l_r^\top u, 0)\, w_r\Big\| \le \tfrac12 \|L^\top W\|_2 + \tfrac12 \|S L\|_2\, \|S^{-1} W\|_2 ;

    S is improved by gradient steps.

    Args:
        rows: (R, p) the :math:`l_r`.
        weights: (R, q) the :math:`w_r`.
    """
    require(len(rows) == len(weights), "weights", f"{len(rows)} rows", weights)
    linear = np.linalg.norm(rows.T @ weights, 2)
    long, wide = np.linalg.norm(rows, axis=1), np.linalg.norm(weights, axis=1)
    keep = (long > 0) & (wide > 0)
    if not keep.any():
        return 0.5 * float(linear)
    rows, weights = rows[keep], weights[keep]
    log_scale = np.log(wide[keep] / long[keep])
    best, momentum, speed = np.inf, 0.0, 0.0
    for step in range(1, steps + 1):
        scale = np.exp(log_scale)[:, None]
        first, y = _top(rows.T @ (scale * rows))
        second, x = _top(weights.T @ (weights / scale))
        best = min(best, (first * second) ** 0.5)
        gradient = scale[:, 0] * (rows @ y) ** 2 / first - (weights @ x) ** 2 / scale[:, 0] / second
        momentum, speed = 0.9 * momentum + 0.1 * gradient, 0.99 * speed + 0.01 * gradient**2
        log_scale = log_scale - 0.1 * (momentum / (1 - 0.9**step)) / (np.sqrt(speed / (1 - 0.99**step)) + 1e-12)
    return 0.5 * float(linear + best)


def _one_column(g: np.ndarray, cone: np.ndarray) -> Bounds:
    sides = [(sign, *_project(sign * g[:, 0], cone)) for sign in (1.0, -1.0)]
    upper = max(bound for _, _, bound in sides)
    sign, point, _ = max(sides, key=lambda side: float(np.linalg.norm(side[1])))
    size = float(np.linalg.norm(point))
    if size <= INSIDE * np.linalg.norm(g) or not _inside(point / size, cone):
        return Bounds(0.0, upper)
    u = point / size
    lower = float(sign * (g[:, 0] @ u))
    return Bounds(lower, max(lower, upper), u, np.array([sign])) if lower > 0 else Bounds(0.0, upper)


def _inside(unit: np.ndarray, cone: np.ndarray) -> bool:
    """Whether a unit vector lies in a cone of unit rows, as far as a projection can tell."""
    return len(cone) == 0 or bool((cone @ unit).min() >= -STICKS_OUT)


def _starts(g: np.ndarray) -> list[np.ndarray]:
    left, sigma, _ = np.linalg.svd(g, full_matrices=False)
    return [sign * vector for vector in left.T[sigma > INSIDE * sigma[0]][:3] for sign in (1.0, -1.0)]


def _top_left(g: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest singular value of a matrix, and its left vector."""
    left, sigma, _ = np.linalg.svd(g, full_matrices=False)
    return float(sigma[0]), left[:, 0]


def _top(square: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest eigenvalue of a symmetric matrix, and its vector."""
    values, vectors = np.linalg.eigh(square)
    return float(values[-1]), vectors[:, -1]


def _complement(unit: np.ndarray) -> np.ndarray:
    """An orthonormal basis (d, d - 1) of the complement of a unit vector, by a Householder reflection."""
    pivot = unit.copy()
    pivot[0] += np.copysign(1.0, unit[0])
    return (np.eye(len(unit)) - 2 * np.outer(pivot, pivot) / (pivot @ pivot))[:, 1:]
