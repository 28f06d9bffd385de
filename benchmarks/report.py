"""What the rows of a problem say: ratios to ours, bars, fits, and the table that shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.bars import fits, pick
from benchmarks.problems import Problem

#: AdamW has arrived when its objective is within this fraction of the certified optimum
TARGET = 1e-3

COLUMNS = ("", "seconds", "x ours", "peak MiB", "extra MiB", "x ours", "eval.", "objective", "dual bound", "gap")


def summarise(problem: Problem, results: dict) -> None:
    """Fill in, from the rows of a problem's results, everything that follows from them."""
    rows = results["rows"]
    mine = pick(rows, "ours")
    results["ratios"] = {row["name"]: ratios(row, mine) for row in rows} if mine else {}
    results["bars"] = [bar.judge(rows) for bar in problem.bars]
    results["fits"] = fits(rows)
    results["limits"] = limits(rows)


def ratios(row: dict, mine: dict) -> dict:
    """A row's time and memory over ours, how far its objective lies above ours, and when it came close to the optimum (AdamW)."""
    found = {"seconds": row["seconds"] / mine["seconds"] if "seconds" in row else None}
    if row["status"] != "finished":
        return found
    found["extra_bytes"] = row["extra_bytes"] / mine["extra_bytes"] if mine["extra_bytes"] else None
    if row["objective"] is not None:
        found["objective_excess"] = row["objective"] / mine["objective"] - 1
    if "training_seconds" in row["details"]:
        found["seconds_to_target"] = seconds_to_target(row, mine["objective"])
    return found


def seconds_to_target(row: dict, optimum: float) -> float | None:
    """Training time after which AdamW first comes within :data:`TARGET` of the certified optimum; None if it never does."""
    pairs = zip(row["details"]["objective"], row["details"]["training_seconds"], strict=True)
    return next((seconds for value, seconds in pairs if value <= optimum * (1 + TARGET)), None)


def limits(rows: Sequence[dict]) -> dict | None:
    r"""The least time that bytes and flops allow for the evaluations that our solver took, at the rates of the same run.

    An evaluation is a head of the final rank and its gradient. For linear attention with the Gram matrices kept,
    :math:`\bar x_i^\top U_j G_i V_j` takes :math:`2n(2d^2 + dc)` flops for each neuron and reads :math:`n d^2` numbers; for gated
    attention with the gate-averaged queries :math:`h_b` kept, :math:`\sum_b (h_b^\top U_j x_b)\, x_b^\top V_j` takes
    :math:`2n(s d^2 + 2sd + dc)` flops and reads :math:`nsd(1 + P)` numbers. The gradient takes twice the flops and reads again.
    """
    rates, mine = pick(rows, "roofline"), pick(rows, "ours")
    if not rates or not mine:
        return None
    rates, (n, s, d, c) = rates["details"], (mine["sizes"][axis] for axis in "nsdc")
    gates, rank = mine["sizes"].get("gates", 0), mine["details"]["rank"]
    flops = 3 * rank * 2 * n * ((s * d**2 + 2 * s * d if gates else 2 * d**2) + d * c)
    read = 2 * 4 * n * (s * d * (1 + gates) if gates else d**2)
    by_bytes = mine["evaluations"] * read / rates["bytes_per_second"]
    by_flops = mine["evaluations"] * flops / rates["flops_per_second"]
    return {
        "seconds_by_bytes": by_bytes,
        "seconds_by_flops": by_flops,
        "seconds_by_tf32_flops": mine["evaluations"] * flops / rates["tf32_flops_per_second"],
        "times_the_limit": mine["seconds"] / max(by_bytes, by_flops),
    }


def table(results: dict) -> str:
    """The results of a problem as text: sizes, one line for each competitor, bars, fits and the note."""
    sizes = ", ".join(f"{key} = {value}" for key, value in results["size"].items() if key != "device")
    lines = [f"{results['problem']}: {results['title']}", f"  {sizes}; {results['threads']} threads"]
    cells = [COLUMNS] + [_cells(row, results["ratios"].get(row["name"], {})) for row in results["rows"]]
    full = [row for row in cells if len(row) == len(COLUMNS)]
    first, *widths = (max(len(row[k]) for row in full) for k in range(len(COLUMNS)))
    first = max(first, *(len(row[0]) for row in cells))
    for name, *values in cells:
        if len(values) == len(widths):  # else it is a message
            values = [value.rjust(width) for value, width in zip(values, widths, strict=True)]
        lines.append("  ".join(["", name.ljust(first), *values]))
    for name, found in results["ratios"].items():
        if "seconds_to_target" in found:
            when = found["seconds_to_target"]
            lines.append(f"  {name} within {TARGET:g} of the optimum: " + (f"{when:.3g} s" if when else "never"))
    for law in results["fits"]:
        spread = ", ".join(f"{r:+.0%}" for r in (math.expm1(r) for r in law["residuals"]))
        unit = {"seconds": "time", "extra_bytes": "memory"}.get(law["quantity"], law["quantity"])
        lines.append(f"  {unit} ~ {law['axis']}^{law['exponent']:.2f}   residuals {spread}")
    if results["limits"]:
        found = results["limits"]
        lines.append(
            f"  limit for these evaluations: {found['seconds_by_bytes']:.3g} s by bytes, {found['seconds_by_flops']:.3g} s by flops "
            f"({found['seconds_by_tf32_flops']:.3g} s in TF32); ours took {found['times_the_limit']:.1f} times the larger"
        )
    lines += [f"  {_bar(bar)}" for bar in results["bars"]]
    if results["quick"]:
        lines.append("  tiny sizes and few epochs: the bars are for the full ones")
    if results["note"]:
        lines.append(f"  {results['note']}")
    return "\n".join(lines)


def _cells(row: dict, found: dict) -> tuple[str, ...]:
    if row["status"] != "finished":
        return row["name"], f"{row['status']}: {row['message']}"
    gap = row["relative_gap"]
    return (
        row["name"],
        f"{row['seconds']:.3g}",
        _times(found.get("seconds")),
        f"{row['peak_bytes'] / 2**20:.0f}",
        f"{row['extra_bytes'] / 2**20:.0f}",
        _times(found.get("extra_bytes")),
        "-" if row["evaluations"] is None else str(row["evaluations"]),
        "-" if row["objective"] is None else f"{row['objective']:.7g}",
        "-" if row["dual"] is None else f"{row['dual']:.7g}",
        "-" if gap is None else f"{gap:.1e}",
    )


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3g}"


def _bar(bar: dict) -> str:
    wanted = " and ".join(
        f"{words} {bar[key]:g}"
        for key, words in (("at_least", "at least"), ("at_most", "at most"))
        if bar[key] is not None
    )
    measured = "not measured" if bar["measured"] is None else f"{bar['measured']:.4g}"
    verdict = {True: "met", False: "MISSED", None: "unknown"}[bar["met"]]
    return f"{bar['what']}: {measured} (bar: {wanted}; {verdict})"
