"""Comparing bounds with references, and counting."""

from __future__ import annotations

import collections
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

import cvxlib
from benchmarks.campaign.exact import ExactProgram, Undecided
from benchmarks.campaign.kinds import KINDS

#: the one form of the package's complaints about arguments
COMPLAINT = re.compile(r"^[\w.]+: expected .*; got ", re.DOTALL)
#: crossings and failures of a kind that are told one by one
TOLD = 20


@dataclass
class Tally:
    """What became of the cases of a kind.

    Args:
        tried: cases, by how they ended.
        bounds: how many bounds were compared.
        crossed: how many of these lay above the reference.
        worst: the largest relative excess of a bound over its reference; negative if all held.
        losses: relative losses of bounds against the plain float bound along the same ray.
        gaps: relative gaps of the references, where these are known.
        told: examples of what failed.
        messages: complaints and errors, and how often.
    """

    tried: collections.Counter = field(default_factory=collections.Counter)
    bounds: int = 0
    crossed: int = 0
    worst: float = -math.inf
    losses: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    told: list[dict] = field(default_factory=list)
    messages: collections.Counter = field(default_factory=collections.Counter)
    sources: collections.Counter = field(default_factory=collections.Counter)

    def as_json(self) -> dict:
        """The counts, ready for JSON."""
        return {
            "cases": self.tried.total(),
            **{end: self.tried[end] for end in ENDS},
            "bounds": self.bounds,
            "bounds_crossed": self.crossed,
            "worst_relative_excess": _finite(self.worst),
            "median_loss": statistics.median(self.losses) if self.losses else None,
            "losses": len(self.losses),
            "widest_reference_gap": max(self.gaps, default=None),
            "references_wider_than_1e-40": sum(gap > 1e-40 for gap in self.gaps),
            "crossed_by_source": dict(self.sources.most_common()),
            "messages": dict(self.messages.most_common(TOLD)),
            "examples": self.told,
        }


#: how a case can end, the worst first
ENDS = ("crossed", "error", "refused", "undecided", "held")


def play(
    kind: str,
    index: int,
    seed: int,
    tally: Tally,
    fault: Callable[[ExactProgram, cvxlib.Certificate], float] | None = None,
) -> None:
    """One case, counted.

    Args:
        kind: a name among :data:`KINDS`.
        index: of the case; kind, index and seed make it again.
        seed: of the campaign.
        tally: what it is counted in.
        fault: for a test of the campaign itself, what to take for a certificate's dual.
    """
    rng = np.random.default_rng([seed, list(KINDS).index(kind), index])
    try:
        case = KINDS[kind][0](rng)
    except Undecided:
        tally.tried["undecided"] += 1
        return
    except Exception as error:
        tally.tried[_excuse(tally, error, index, "making the case")] += 1
        return
    if case.gap is not None:
        tally.gaps.append(case.gap)
    ends = {"held"}
    for bound in case.bounds:
        try:
            certificate = bound.ask()
        except Exception as error:
            ends.add(_excuse(tally, error, index, bound.source))
            continue
        ends.add(_compare(case, bound.source, certificate, index, tally, fault))
    tally.tried[next(end for end in ENDS if end in ends)] += 1


def _compare(case, source: str, certificate, index: int, tally: Tally, fault) -> str:
    """How one bound ends."""
    bare = not isinstance(certificate, cvxlib.Certificate)
    dual = certificate if bare else certificate.dual
    point = None if bare else certificate.dual_point
    if point is not None:
        point = point.detach().double().numpy()
        if fault is not None:
            dual = fault(case.exact, certificate)
    tally.bounds += 1
    if math.isnan(dual) or dual == math.inf:
        return _failed(tally, index, source, f"dual is {dual}", "error")
    if math.isfinite(dual):
        # the reference is positive: a loss that is not negative plus a norm
        excess = float((dual - case.value) / max(abs(case.value), abs(dual)) if case.value or dual else case.value)
        tally.worst = max(tally.worst, excess)
        if dual > case.value:
            tally.crossed += 1
            tally.sources[source] += 1
            kind = str(case.exact.program.tokens.dtype).removeprefix("torch.")
            text = f"dual {dual!r} above {float(case.value)!r}, {excess:.1e} relative: {case.exact.program!r}, {kind}"
            return _failed(tally, index, source, text, "crossed", excess)
    if point is not None and not case.exact.relu:
        plain = case.exact.float_bound(point)
        if math.isfinite(plain) and plain > 0:
            tally.losses.append((plain - dual) / plain if math.isfinite(dual) else math.inf)
    return "held"


def _excuse(tally: Tally, error: Exception, index: int, source: str) -> str:
    """A complaint in the package's one form is a refusal, all else an error."""
    clear = isinstance(error, ValueError | TypeError) and COMPLAINT.match(str(error))
    text = f"{type(error).__name__}: {error}"
    tally.messages[re.sub(r"-?\d[\d.e+-]*", "#", text)[:160]] += 1
    return _failed(tally, index, source, text[:300], "refused" if clear else "error")


def _failed(tally: Tally, index: int, source: str, text: str, end: str, excess: float = 0.0) -> str:
    """Tell it, unless there are enough that are as bad."""
    tally.told.append({"case": index, "end": end, "source": source, "what": text, "excess": excess})
    alike = [example for example in tally.told if example["end"] == end]
    if len(alike) > TOLD:
        tally.told.remove(min(reversed(alike), key=lambda example: example["excess"]))
    return end


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def table(tallies: dict[str, Tally]) -> str:
    """The counts as text, one line for each kind."""
    head = ("kind", "cases", *reversed(ENDS), "bounds", "crossed", "worst excess", "median loss", "reference gap")
    lines = [head]
    for kind, tally in tallies.items():
        found = tally.as_json()
        numbers = (found["worst_relative_excess"], found["median_loss"], found["widest_reference_gap"])
        lines.append(
            (
                kind,
                str(found["cases"]),
                *(str(found[end]) for end in reversed(ENDS)),
                str(found["bounds"]),
                str(found["bounds_crossed"]),
                *("-" if number is None else f"{number:.1e}" for number in numbers),
            )
        )
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


torch.set_num_threads(1)
