r"""Arrangements: which sign patterns :math:`\mathbb 1\{L_X u \ge 0\}` the stacked data allow.

Every row :math:`l_r` of the stacked data is a hyperplane through the origin of u-space; together they cut it into open cones, on each
of which a ReLU network is linear. Patterns that occur only on the boundary between cones are not listed: their u lie in the closure
of a listed cone. Rows of zeros (zero tokens) cut nothing, and parallel rows (repeated tokens) are one hyperplane.

Which rows are parallel, what rank they have and which patterns occur is decided in exact arithmetic (:mod:`cvxlib.geometry.exact`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cvxlib.geometry import exact
from cvxlib.geometry.nonnegative import least_squares
from cvxlib.ground.checks import float_tensor, positive_int, require

#: distance up to which directions may differ by the rounding of whoever made the data: a ReLU's bound then counts what was moved
PARALLEL = 1e-13
#: rows that are compared in exact arithmetic before the count of different ones is looked at
STRIPE = 4096


def cover_count(hyperplanes: int, rank: int) -> int:
    r"""The number of cones that hyperplanes through the origin cut out in general position, :math:`2\sum_{k<r}\binom{N-1}{k}`.

    In any other position there are fewer: it is always an upper bound.

    Args:
        hyperplanes: N, the number of distinct hyperplanes.
        rank: r, the dimension that their normals span.

    Source: Cover 1965, Theorem 1.
    """
    hyperplanes, rank = positive_int("hyperplanes", hyperplanes, 0), positive_int("rank", rank, 0)
    return 2 * sum(math.comb(hyperplanes - 1, k) for k in range(rank)) if hyperplanes else 1


@dataclass(frozen=True)
class Arrangement:
    """Sign patterns of stacked data, each with a direction from the inside of its cone.

    Args:
        patterns: (P, R) boolean, ``patterns[g, r]`` where row r is at least 0 on cone g.
        directions: (P, p) unit vectors inside the cones, to rounding: in a cone thinner than that a direction may miss its pattern.
        rank: r, the dimension that the rows span.
        hyperplanes: N, the number of distinct hyperplanes.
        complete: every pattern is listed; this is proved in exact arithmetic.
    """

    patterns: Tensor = field(repr=False)
    directions: Tensor = field(repr=False)
    rank: int
    hyperplanes: int
    complete: bool

    def __len__(self) -> int:
        return len(self.directions)


class Hyperplanes:
    """The distinct hyperplanes of stacked data, as they are: no row is too small and no two are too close to count.

    Args:
        rows: (R, p) stacked data, floating point numbers, or an object array of fractions.
        most: stop reading when there are more hyperplanes than this.
        merge: take a row whose direction is within this distance of an earlier one's for parallel to it; :attr:`off` says what was moved.
    """

    def __init__(self, rows: np.ndarray, most: float = math.inf, merge: float = 0.0) -> None:
        self.dimension = rows.shape[1]
        #: rows of whole numbers that are proportional to one row each
        self.whole: list[exact.Vector] = []
        #: of each direction met: its hyperplane, to which side it points, and by how much it was moved
        seen: dict[exact.Vector, tuple[int, int, float]] = {}
        normals: list[np.ndarray] = []
        plane, side, off = [], [], []
        for start in range(0, len(rows), STRIPE):
            for row in exact.whole_numbers(rows[start : start + STRIPE]):
                facing, sign = exact.facing(row)
                if sign and facing not in seen:
                    unit = exact.unit(facing)
                    seen[facing] = _nearest(unit, normals, merge) or (len(self.whole), 1, 0.0)
                    if seen[facing][0] == len(self.whole):
                        self.whole.append(facing)
                        normals.append(unit)
                index, flip, moved = seen.get(facing, (0, 1, 0.0))
                plane.append(index)
                side.append(sign * flip)
                off.append(moved)
            if len(self.whole) > most:
                break
        #: (R,) the hyperplane of each row, and to which of its sides the row points: -1 or 1, and 0 for a row of zeros
        self.plane, self.side = np.array(plane, dtype=int), np.array(side, dtype=int)
        #: (R,) by how much, as a fraction of its length, a row was moved to be parallel to its hyperplane's normal
        self.off = np.array(off, dtype=float)
        self.rank = len(exact.pivots(self.whole))
        #: (N, p) unit normals
        self.normals = np.array(normals).reshape(-1, self.dimension)

    def __len__(self) -> int:
        return len(self.whole)

    @functools.cached_property
    def basis(self) -> np.ndarray:
        """(r, p) an orthonormal basis of the span of the normals, to rounding; the unit vectors where they span everything."""
        if self.rank == self.dimension:
            return np.eye(self.dimension)
        return np.linalg.svd(self.normals, full_matrices=False)[2][: self.rank]

    def patterns(self, signs: np.ndarray) -> np.ndarray:
        """(P, R) which rows are at least 0, for the signs (P, N) of the hyperplanes."""
        if len(self) == 0:
            return np.ones((len(signs), len(self.side)), dtype=bool)
        return signs[:, self.plane] * self.side >= 0

    def signs_at(self, point: np.ndarray) -> np.ndarray:
        """(N,) the exact signs of the hyperplanes at a float vector (p,)."""
        (whole,) = exact.whole_numbers(point[None])
        return np.array(exact.signs(self.whole, whole), dtype=int)


def enumerate_patterns(rows: Tensor | np.ndarray, limit: int = 20_000, merge: float = 0.0) -> Arrangement:
    r"""All sign patterns of :math:`L u`, :math:`u \in \mathbb R^p`, found and counted in exact arithmetic.

    Hyperplanes are added one at a time; those before cut the new one into cones of one dimension less, each of which is where it cuts
    an old cone in two (:func:`cvxlib.geometry.exact.cells`). No linear program is asked, so none can be wrong.

    Args:
        rows: (R, p) stacked data; an object array of :class:`fractions.Fraction` where they are known without rounding.
        limit: stop when more patterns than this are found; some are then returned, with ``complete=False``.
        merge: rows whose directions are within this distance are taken for parallel; by default none that are not.

    Returns:
        The arrangement; ``len(enumerate_patterns(rows)) == cover_count(N, r)`` for N rows in general position.

    Raises:
        TypeError, ValueError: ``rows`` is not such an array, or not finite; ``limit`` is not a whole number above 0.

    Source: Zaslavsky 1975 (deletion and restriction); Pilanci and Ergen 2020, section 2; book, chapter "ReLU and its cones".
    """
    positive_int("limit", limit)
    matrix = _matrix(rows)
    # N hyperplanes cut out at least 2 N cones, if they are more than one
    planes = Hyperplanes(matrix, limit // 2 + 1, merge)
    found = exact.cells(planes.whole, limit) if 2 * len(planes) <= max(limit, 2) else None
    if found is None:
        return sample_patterns(rows, 4 * limit)
    signs = np.array(list(found), dtype=int).reshape(len(found), len(planes))
    inner = np.array([_inside(planes, sign, point) for sign, point in zip(signs, found.values(), strict=True)])
    device = rows.device if isinstance(rows, Tensor) else None
    return Arrangement(
        torch.as_tensor(planes.patterns(signs), device=device),
        torch.as_tensor(inner.reshape(len(found), planes.dimension), dtype=torch.float64, device=device),
        planes.rank,
        len(planes),
        len(found) <= limit,
    )


def sample_patterns(rows: Tensor | np.ndarray, draws: int, seed: int = 0) -> Arrangement:
    """The sign patterns met by normally distributed directions; ``len`` of the result counts the different ones.

    The result is ``complete`` if the count reaches Cover's upper bound, which proves that none is missing.

    Args:
        rows: (R, p) stacked data.
        draws: how many directions.
        seed: of the generator.
    """
    matrix = _matrix(rows)
    planes = Hyperplanes(matrix)
    inner = np.random.default_rng(seed).standard_normal((positive_int("draws", draws), planes.dimension))
    inner /= np.maximum(np.linalg.norm(inner, axis=1, keepdims=True), np.finfo(float).tiny)
    hidden = inner @ planes.normals.T
    inner, hidden = (array[(np.abs(hidden) > _rounding(planes.dimension)).all(1)] for array in (inner, hidden))
    signs, first = np.unique(np.sign(hidden).astype(int), axis=0, return_index=True)
    device = rows.device if isinstance(rows, Tensor) else None
    return Arrangement(
        torch.as_tensor(planes.patterns(signs), device=device),
        torch.as_tensor(inner[first], dtype=torch.float64, device=device),
        planes.rank,
        len(planes),
        len(first) == cover_count(len(planes), planes.rank),
    )


def inner_point(cone: np.ndarray) -> np.ndarray | None:
    r"""A unit vector with :math:`K u > 0` for unit rows (k, p), far from the walls, or ``None`` if none was found.

    The nearest point to the origin in the convex hull of the rows, by non-negative least squares, is such a u where there is one. The
    answer is checked: what is returned lies inside. That nothing is returned proves nothing.
    """
    if len(cone) == 0:
        return np.zeros(cone.shape[1])
    target = np.zeros(cone.shape[1] + 1)
    target[-1] = 1.0
    matrix = np.vstack([cone.T, np.ones(len(cone))])
    weights, _ = least_squares(matrix, target)
    point = (matrix @ weights - target)[:-1]
    size = np.linalg.norm(point)
    if size == 0 or (cone @ point).min() <= _rounding(cone.shape[1]) * size:
        return None
    return point / size


def _nearest(unit: np.ndarray, normals: list[np.ndarray], merge: float) -> tuple[int, int, float] | None:
    """The first of some unit vectors that another, or its negative, is within a distance of: its place, the sign, and the distance."""
    if not normals or merge == 0:
        return None
    products = np.array(normals) @ unit
    index = int(np.abs(products).argmax())
    sign = 1 if products[index] > 0 else -1
    distance = float(np.linalg.norm(unit - sign * normals[index])) + 16 * np.finfo(float).eps
    return (index, sign, distance) if distance <= merge else None


def _matrix(rows: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(rows, np.ndarray) and rows.dtype == object:
        require(rows.ndim == 2, "rows", "an array of fractions of shape (R, p)", rows)
        return rows
    return float_tensor("rows", rows, ("R", "p")).detach().double().cpu().numpy()


def _rounding(dimension: int) -> float:
    """By how much a product of unit vectors can be off, with room to spare."""
    return 64 * dimension * np.finfo(float).eps


def _inside(planes: Hyperplanes, sign: np.ndarray, point: exact.Vector) -> np.ndarray:
    """A unit vector inside the cone with these signs: a central one where rounding lets it be found, else the exact point rounded."""
    if len(planes) == 0:
        return np.zeros(planes.dimension)
    centre = inner_point(sign[:, None] * planes.normals)
    if centre is not None and np.array_equal(planes.signs_at(centre), sign):
        return centre
    return exact.unit(point)
