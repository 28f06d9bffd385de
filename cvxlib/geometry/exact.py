r"""Arrangements in exact arithmetic: floating point numbers are fractions, and whole numbers do not round.

A row of stacked data stands for the whole numbers that are proportional to it. Whether two hyperplanes are one, what rank they have
and which sign patterns occur are then facts about whole numbers, and no answer of a floating point solver is believed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

Vector = tuple[int, ...]


def whole_numbers(matrix: np.ndarray) -> list[Vector]:
    """Rows of whole numbers without a common divisor, each a positive multiple of a row of a float or object matrix (R, p)."""
    rows = []
    for row in matrix.tolist():
        ratios = [value.as_integer_ratio() for value in row]
        denominator = math.lcm(*(below for _, below in ratios))
        rows.append(_primitive(tuple(above * (denominator // below) for above, below in ratios)))
    return rows


def facing(row: Vector) -> tuple[Vector, int]:
    """A row turned to the side on which its first entry that is not zero is positive, and whether it was: 1, -1, or 0 for a row of zeros."""
    lead = next((value for value in row if value), 0)
    return (tuple(-value for value in row), -1) if lead < 0 else (row, int(lead > 0))


def distinct(rows: Sequence[Vector]) -> list[Vector]:
    """Each hyperplane through the origin once: parallel rows are one, and rows of zeros none."""
    return list({turned: None for turned, side in map(facing, rows) if side})


def pivots(rows: Sequence[Vector]) -> list[int]:
    """Columns that the rows are determined by: as many as the rank, found by elimination without fractions."""
    columns: list[int] = []
    reduced: list[Vector] = []
    for row in rows:
        for column, other in zip(columns, reduced, strict=True):
            if row[column]:
                row = _primitive(
                    tuple(value * other[column] - row[column] * by for value, by in zip(row, other, strict=True))
                )
        lead = next((index for index, value in enumerate(row) if value), None)
        if lead is not None:
            columns.append(lead)
            reduced.append(row)
    return columns


def signs(rows: Sequence[Vector], point: Vector) -> tuple[int, ...]:
    """The sign, -1, 0 or 1, of each row's product with a point."""
    products = (sum(map(int.__mul__, row, point)) for row in rows)
    return tuple((value > 0) - (value < 0) for value in products)


def cells(rows: Sequence[Vector], limit: int) -> dict[tuple[int, ...], Vector] | None:
    r"""The open cones that distinct hyperplanes cut out: for each its signs, and a point inside.

    Hyperplanes come one at a time. Those before cut the new one into cones of one dimension less, and each of these is where it cuts
    one of the cones found so far in two (deletion and restriction, Zaslavsky 1975): nothing is searched for, so nothing can be missed.

    Args:
        rows: distinct, none zero.
        limit: the largest number of cones.

    Returns:
        the cones, or ``None`` where there are more than ``limit``.
    """
    if not rows:
        return {(): ()}
    columns = pivots(rows)
    if len(columns) < len(rows[0]):  # columns that the others determine change no sign
        small = cells([tuple(row[c] for c in columns) for row in rows], limit)
        if small is None:
            return None
        spread = {c: index for index, c in enumerate(columns)}
        return {
            sign: tuple(point[spread[c]] if c in spread else 0 for c in range(len(rows[0])))
            for sign, point in small.items()
        }
    if len(columns) == 1:
        return {(1,): rows[0], (-1,): (-rows[0][0],)}
    if len(columns) == 2:
        return _plane(rows) if 2 * len(rows) <= limit else None
    found: dict[tuple[int, ...], Vector] = {(1,): rows[0], (-1,): tuple(-value for value in rows[0])}
    for k in range(1, len(rows)):
        walls = _cut(rows[:k], rows[k], limit)
        if walls is None:
            return None
        grown: dict[tuple[int, ...], Vector] = {}
        for sign, point in found.items():
            if sign not in walls:
                grown[*sign, *signs(rows[k : k + 1], point)] = point
        for sign, point in walls.items():
            grown[*sign, 1], grown[*sign, -1] = _beside(rows[:k], point, rows[k])
        if len(grown) > limit:
            return None
        found = grown
    return found


def _cut(rows: Sequence[Vector], normal: Vector, limit: int) -> dict[tuple[int, ...], Vector] | None:
    """The cones that rows cut out of the hyperplane with this normal: their signs, and a point of the hyperplane in each."""
    pivot = max(range(len(normal)), key=lambda index: abs(normal[index]))
    size, side = abs(normal[pivot]), 1 if normal[pivot] > 0 else -1
    rest = [index for index in range(len(normal)) if index != pivot]
    # a u_pivot is determined by the others on the hyperplane; multiplying by a positive number keeps the signs
    restricted = [_primitive(tuple(size * row[i] - side * row[pivot] * normal[i] for i in rest)) for row in rows]
    smaller = cells(distinct(restricted), limit)
    if smaller is None:
        return None
    walls: dict[tuple[int, ...], Vector] = {}
    for inside in smaller.values():
        products = -side * sum(normal[i] * value for i, value in zip(rest, inside, strict=True))
        entries = [size * value for value in inside]
        entries.insert(pivot, products)
        point = _primitive(tuple(entries))
        walls[signs(rows, point)] = point
    return walls


def _beside(rows: Sequence[Vector], point: Vector, normal: Vector) -> tuple[Vector, Vector]:
    """Points to both sides of a hyperplane, from a point on it, with the same signs for all rows."""
    scale = 1
    for row in rows:
        away, across = abs(sum(map(int.__mul__, row, point))), abs(sum(map(int.__mul__, row, normal)))
        scale = max(scale, 2 * across // away + 1)
    one, other = (
        _primitive(tuple(scale * at + side * step for at, step in zip(point, normal, strict=True))) for side in (1, -1)
    )
    return one, other


def _plane(rows: Sequence[Vector]) -> dict[tuple[int, ...], Vector]:
    """Cones in the plane: between neighbours among the lines, sorted by angle."""
    lines = [(-b, a) if (a, b) < (0, 0) else (b, -a) for a, b in rows]
    lines.sort(key=functools.cmp_to_key(_turn))
    found: dict[tuple[int, ...], Vector] = {}
    for one, other in zip(lines, [*lines[1:], (-lines[0][0], -lines[0][1])], strict=True):
        # of like length, so that the middle is not too near to either
        shift = max(map(abs, one)).bit_length() - max(map(abs, other)).bit_length()
        left, right = max(-shift, 0), max(shift, 0)
        middle = _primitive(((one[0] << left) + (other[0] << right), (one[1] << left) + (other[1] << right)))
        pattern = signs(rows, middle)
        found[pattern] = middle
        found[tuple(-sign for sign in pattern)] = tuple(-value for value in middle)
    return found


def _turn(one: tuple[int, int], other: tuple[int, int]) -> int:
    """Above 0 where the first is further round than the second, by less than half a turn."""
    return other[0] * one[1] - one[0] * other[1]


def _primitive(row: Vector) -> Vector:
    divisor = math.gcd(*row)
    return tuple(value // divisor for value in row) if divisor > 1 else row


def unit(point: Vector) -> np.ndarray:
    """A vector of whole numbers, however large, as a float vector of length 1."""
    shift = max(max(map(abs, point)).bit_length() - 900, 0)
    vector = np.array([float(value >> shift) if shift else float(value) for value in point])
    vector /= max(np.abs(vector).max(), 1.0)
    size = np.linalg.norm(vector)
    return vector / size if size > 0 else vector
