"""What rows of the transfer experiment say: one line for each head, and each training's distance from its certified optimum."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from cvxlib.ground.checks import require
from cvxlib.program.certificate import Certificate
from cvxlib.vision.protocol import choose_rate

KEY = ("head", "activation", "beta")


def groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, float], list[dict[str, Any]]]:
    """Rows by head, activation and beta, in order of appearance."""
    found: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in KEY), []).append(row)
    return found


def summarise(rows: Sequence[dict[str, Any]], epochs: int) -> list[dict[str, Any]]:
    """One entry for each head, activation and beta: mean and spread over seeds of the trainings, and the certified optimum beside them.

    Args:
        rows: from :func:`cvxlib.vision.transfer.run`.
        epochs: the protocol's, of the trainings that count here.

    Returns:
        Entries with the key, ``"AdamW"`` (statistics as ``{"mean", "spread"}``, the spread being the standard deviation, 0 for one seed)
        and ``"optimum"`` (its row, or None).
    """
    table = []
    for key, mine in groups(rows).items():
        optimum = next((row for row in mine if row["method"] == "optimum"), None)
        full = [row for row in mine if row["method"] == "AdamW" and row["epochs"] == epochs]
        require(len(full) > 0, "epochs", "the number of epochs of some trainings", f"{epochs}")
        first = min(row["seed"] for row in full)
        rate = choose_rate({row["rate"]: row["train_top1"] for row in full if row["seed"] == first})
        chosen = [row | {"gap": gap(row, optimum)} for row in full if row["rate"] == rate]
        names = ("objective", "gap", "train_top1", "top1", "top5", "rank", "seconds")
        trained = {name: spread([row[name] for row in chosen]) for name in names}
        sizes = {name: chosen[0][name] for name in ("neurons", "parameters")}
        facts = {"rate": rate, "seeds": len(chosen)} | sizes
        table.append(dict(zip(KEY, key, strict=True)) | {"AdamW": facts | trained, "optimum": optimum})
    return table


def gap(row: dict[str, Any], optimum: dict[str, Any] | None) -> float | None:
    """The certified relative gap of a row: how far above the optimum's lower bound its objective is, as a fraction of the objective."""
    if optimum is None or row["objective"] is None:
        return None
    return Certificate(row["objective"], optimum["dual"]).relative_gap


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean and standard deviation; None where a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return {"mean": fmean(known), "spread": stdev(known) if len(known) > 1 else 0.0}
