"""What is measured on the rows of a problem, and the bars it is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Rows = Sequence[dict]
Measure = Callable[[Rows], float | None]


@dataclass(frozen=True)
class Bar:
    """A measure and the interval it is required to lie in.

    Args:
        what: the measure in words.
        measure: from the rows of a problem to a number, or to None where a run that it needs did not finish.
        at_least, at_most: the ends of the interval, where it has them.
    """

    what: str
    measure: Measure
    at_least: float | None = None
    at_most: float | None = None

    def judge(self, rows: Rows) -> dict:
        """The measured value, the bar and whether it is met (None where that is not known), ready for JSON."""
        measured = self.measure(rows)
        met = None
        if measured is not None:
            met = (self.at_least is None or measured >= self.at_least) and (
                self.at_most is None or measured <= self.at_most
            )
        return {
            "what": self.what,
            "measured": measured,
            "at_least": self.at_least,
            "at_most": self.at_most,
            "met": met,
        }


def pick(rows: Rows, name: str) -> dict | None:
    """The finished row of a competitor; among variants ``"name ..."`` the one with the lowest objective."""
    found = [r for r in rows if r["status"] == "finished" and (r["name"] == name or r["name"].startswith(name + " "))]
    return min(found, key=lambda row: row["objective"], default=None)


def _of_both(value: Callable[[dict, dict], float | None], name: str) -> Measure:
    """A measure of our row and a competitor's."""

    def measure(rows: Rows) -> float | None:
        mine, other = pick(rows, "ours"), pick(rows, name)
        return value(mine, other) if mine and other else None

    return measure


def _of_ours(key: str) -> Measure:
    def measure(rows: Rows) -> float | None:
        mine = pick(rows, "ours")
        return mine[key] if mine else None

    return measure


certified_gap = _of_ours("relative_gap")
evaluations = _of_ours("evaluations")
time_to_solve = _of_ours("seconds")


def peak_memory(rows: Rows) -> float | None:
    """Our process's peak memory, imports and data included, in GiB."""
    mine = pick(rows, "ours")
    return mine["peak_bytes"] / 2**30 if mine else None


def same_value(name: str) -> Measure:
    """The relative difference of our objective to a competitor's."""
    return _of_both(lambda mine, other: abs(mine["objective"] - other["objective"]) / abs(other["objective"]), name)


def time_ratio(name: str) -> Measure:
    """A competitor's time over ours; one that was stopped at the limit counts with the time it had."""

    def measure(rows: Rows) -> float | None:
        stopped = (row for row in rows if row["status"] == "timed out" and row["name"].startswith(name))
        mine, other = pick(rows, "ours"), pick(rows, name) or next(stopped, None)
        return other["seconds"] / mine["seconds"] if mine and other else None

    return measure


def solver_time_ratio(name: str) -> Measure:
    """The time that a competitor's solver reports for itself, over ours."""
    return _of_both(lambda mine, other: other["details"]["solver_seconds"] / mine["seconds"], name)


def objective_ratio(name: str) -> Measure:
    """Our objective over a competitor's."""
    return _of_both(lambda mine, other: mine["objective"] / other["objective"], name)


def exponent(axis: str, key: str) -> Measure:
    """The fitted exponent of a quantity in one size."""

    def measure(rows: Rows) -> float | None:
        found = fit(rows, axis, key)
        return found["exponent"] if found else None

    return measure


def fit(rows: Rows, axis: str, key: str) -> dict | None:
    r"""The power law :math:`y = a x^k` through the runs in which one size grows, by least squares in the logarithms.

    Args:
        rows: of a problem whose competitors are named ``"axis = value"``.
        axis: the size that grows.
        key: the field of a row that is fitted.

    Returns:
        sizes and values, the exponent, the factor and the residuals :math:`\log(y / a x^k)`; None with fewer than three runs.
    """
    points = [
        (row["sizes"][axis], row[key])
        for row in rows
        if row["name"].startswith(f"{axis} = ") and row["status"] == "finished" and row[key]
    ]
    if len(points) < 3:
        return None
    x, y = np.log(np.array(points, dtype=float)).T
    slope, intercept = np.polyfit(x, y, 1)
    residuals = y - slope * x - intercept
    return {
        "axis": axis,
        "quantity": key,
        "sizes": [size for size, _ in points],
        "values": [value for _, value in points],
        "exponent": float(slope),
        "factor": float(np.exp(intercept)),
        "residuals": residuals.tolist(),
    }


def fits(rows: Rows) -> list[dict]:
    """Power laws of time, memory and evaluations for every size that grows."""
    axes = dict.fromkeys(row["name"].split(" = ")[0] for row in rows if " = " in row["name"])
    found = (fit(rows, axis, key) for axis in axes for key in ("seconds", "extra_bytes", "evaluations"))
    return [law for law in found if law]
