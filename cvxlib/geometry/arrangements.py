r"""Arrangements: which sign patterns :math:`\mathbb 1\{L_X u \ge 0\}` the stacked data allow.

Every row :math:`l_r` of the stacked data is a hyperplane through the origin of u-space; together they cut it into open cones, on each
of which a ReLU network is linear. Patterns that occur only on the boundary between cones are not listed: their u lie in the closure
of a listed cone. Rows of zeros (zero tokens) cut nothing, and parallel rows (repeated tokens) are one hyperplane.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cvxlib.ground.checks import float_tensor, positive_int, require

#: rows whose directions agree to this are one hyperplane, and a cone thinner than this is taken for its boundary
RESOLUTION = 1e-10


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
        directions: (P, p) unit vectors inside the cones.
        rank: r, the dimension that the rows span.
        hyperplanes: N, the number of distinct hyperplanes.
        complete: every pattern is listed, and this is proved.
    """

    patterns: Tensor = field(repr=False)
    directions: Tensor = field(repr=False)
    rank: int
    hyperplanes: int
    complete: bool

    def __len__(self) -> int:
        return len(self.directions)


def enumerate_patterns(rows: Tensor, limit: int = 20_000, progress: bool | None = None) -> Arrangement:
    r"""All sign patterns of :math:`L u`, :math:`u \in \mathbb R^p`, with a proof for each pattern left out.

    Hyperplanes are added one at a time; a cone is cut in two where the linear system of its other side is strictly feasible. Each
    answer carries its certificate (Gordan's alternative): an inner point, or non-negative multipliers with :math:`K^\top\lambda = 0`.
    Half of the cones are searched, the others are their antipodes. In the plane the hyperplanes are sorted by angle.

    Args:
        rows: (R, p) stacked data.
        limit: stop when more patterns than this are found; what is found is returned with ``complete=False``.
        progress: show a bar; by default only on a terminal.

    Returns:
        The arrangement; ``len(enumerate_patterns(rows)) == cover_count(N, r)`` for N rows in general position.

    Source: Pilanci and Ergen 2020, section 2 (arrangements); book, chapter "ReLU and its cones".
    """
    rows = float_tensor("rows", rows, ("R", "p"))
    positive_int("limit", limit)
    normals, basis = hyperplanes(rows)
    if len(normals) == 0:
        inner, complete = np.zeros((1, 0)), True
    elif normals.shape[1] == 1:
        inner, complete = np.array([[1.0], [-1.0]]), True
    elif 2 * len(normals) > limit:  # N hyperplanes cut out at least 2 N cones
        inner, complete = normals[:1], False
    elif normals.shape[1] == 2:
        inner, complete = _plane(normals), True
    else:
        inner, complete = _incremental(normals, limit, progress)
    return _arrangement(rows, inner @ basis, normals, complete and len(inner) <= limit)


def sample_patterns(rows: Tensor, draws: int, seed: int = 0) -> Arrangement:
    """The sign patterns met by normally distributed directions; ``len`` of the result counts the different ones.

    The result is ``complete`` if the count reaches Cover's upper bound, which proves that none is missing.

    Args:
        rows: (R, p) stacked data.
        draws: how many directions.
        seed: of the generator.
    """
    rows = float_tensor("rows", rows, ("R", "p"))
    normals, basis = hyperplanes(rows)
    inner = np.random.default_rng(seed).standard_normal((positive_int("draws", draws), normals.shape[1]))
    inner /= np.maximum(np.linalg.norm(inner, axis=1, keepdims=True), np.finfo(float).tiny)
    hidden = inner @ normals.T
    inner = inner[(np.abs(hidden) > RESOLUTION).all(1)]
    _, first = np.unique(inner @ normals.T > 0, axis=0, return_index=True)
    complete = len(first) == cover_count(*normals.shape)
    return _arrangement(rows, inner[np.sort(first)] @ basis, normals, complete)


def hyperplanes(rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The distinct hyperplanes of stacked data (R, p): unit normals (N, r), and an orthonormal basis (r, p) of their span."""
    matrix = rows.detach().double().cpu().numpy()
    size = np.linalg.norm(matrix, axis=1)
    keep = size > RESOLUTION * size.max(initial=0.0)
    matrix = matrix[keep] / size[keep, None]
    if len(matrix) == 0:
        return np.zeros((0, 0)), np.zeros((0, rows.shape[1]))
    _, sigma, basis = np.linalg.svd(matrix, full_matrices=False)
    basis = basis[sigma > RESOLUTION * sigma[0] * max(matrix.shape) ** 0.5]
    normals = matrix @ basis.T
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    # parallel rows, all turned to one side, are neighbours in the order of any projection
    turn, key = np.random.default_rng(0).standard_normal((2, normals.shape[1]))
    side = np.where(normals @ turn >= 0, 1.0, -1.0)[:, None] * normals
    keys = side @ key
    distinct: list[int] = []
    recent: list[int] = []
    for index in np.argsort(keys, kind="stable"):
        recent = [k for k in recent if keys[index] - keys[k] <= RESOLUTION * np.linalg.norm(key)]
        if all(np.linalg.norm(side[index] - side[k]) > RESOLUTION for k in recent):
            distinct.append(index)
            recent.append(index)
    return normals[sorted(distinct)], basis


def inner_point(cone: np.ndarray) -> np.ndarray | None:
    r"""A unit vector with :math:`K u > 0` for unit rows (k, p), or ``None`` if there is none (a cone without an inside).

    The nearest point to the origin in the convex hull of the rows, by non-negative least squares, is either such a u or 0.
    """
    from scipy.optimize import nnls

    if len(cone) == 0:
        return np.zeros(cone.shape[1])
    target = np.zeros(cone.shape[1] + 1)
    target[-1] = 1.0
    matrix = np.vstack([cone.T, np.ones(len(cone))])
    weights, _ = nnls(matrix, target, maxiter=50 * len(cone) + 100)
    point = (matrix @ weights - target)[:-1]
    size = np.linalg.norm(point)
    if size <= RESOLUTION or (cone @ point).min() <= RESOLUTION * size:
        return None
    return point / size


def _plane(normals: np.ndarray) -> np.ndarray:
    """Inner points of all cones in the plane: between neighbouring lines."""
    lines = np.sort(np.mod(np.arctan2(normals[:, 0], -normals[:, 1]), np.pi))
    middle = (lines + np.append(lines[1:], lines[0] + np.pi)) / 2
    half = np.stack([np.cos(middle), np.sin(middle)], 1)
    return np.concatenate([half, -half])


def _incremental(normals: np.ndarray, limit: int, progress: bool | None) -> tuple[np.ndarray, bool]:
    """Inner points of all cones, adding one hyperplane at a time; the cones with a positive first sign, then their antipodes."""
    count, rank = normals.shape
    # directions already at hand settle most of the cuts without a linear system
    drawn = np.random.default_rng(0).standard_normal((min(20 * limit, 20_000), rank))
    drawn *= np.sign(drawn @ normals[0])[:, None]
    seen = (drawn @ normals.T > 0).astype(np.uint8)
    met = list({row.tobytes(): index for index, row in enumerate(np.packbits(seen, axis=1))}.values())
    if 2 * len(met) > limit:
        return np.concatenate([drawn[met], -drawn[met]]) / np.linalg.norm(
            drawn[np.r_[met, met]], axis=1, keepdims=True
        ), False

    cells = [(np.array([1.0]), normals[0])]
    bar = tqdm(total=count - 1, desc="hyperplanes", disable=None if progress is None else not progress, delay=1)
    for k in range(1, count):
        witness = {row.tobytes(): index for index, row in enumerate(seen[:, : k + 1])}
        grown = []
        for signs, point in cells:
            value = normals[k] @ point
            here = 1.0 if value > 0 else -1.0
            for sign in (here, -here):
                longer = np.append(signs, sign)
                known = witness.get((longer > 0).astype(np.uint8).tobytes())
                if sign == here and abs(value) > RESOLUTION:
                    inside = point
                elif known is not None:
                    inside = drawn[known] / np.linalg.norm(drawn[known])
                else:
                    inside = inner_point(longer[:, None] * normals[: k + 1])
                if inside is not None:
                    grown.append((longer, inside))
        cells = grown
        bar.update()
        if 2 * len(cells) > limit:
            break
    bar.close()
    complete = 2 * len(cells) <= limit
    # points far from the walls keep their pattern when the hidden entries are computed in another order
    half = np.array([point for _, point in cells])
    if complete:
        centres = [inner_point(signs[:, None] * normals) for signs, _ in cells]
        half = np.array([old if new is None else new for old, new in zip(half, centres, strict=True)])
    return np.concatenate([half, -half]), complete


def _arrangement(rows: Tensor, directions: np.ndarray, normals: np.ndarray, complete: bool) -> Arrangement:
    inner = torch.as_tensor(directions, dtype=torch.float64, device=rows.device).reshape(-1, rows.shape[1])
    size = rows.double().norm(dim=1)
    hidden = inner @ (rows.double() * (size > RESOLUTION * size.max()).unsqueeze(1)).mT
    patterns = hidden >= 0
    require(complete or len(patterns) > 0, "rows", "rows that some direction does not touch", rows)
    return Arrangement(patterns, inner, normals.shape[1], len(normals), complete)
