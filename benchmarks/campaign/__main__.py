"""``python -m benchmarks.campaign``: look for a certificate whose dual lies above the optimum; exits with 1 if there is one."""

from __future__ import annotations

import argparse
import signal
import sys
from importlib import metadata
from pathlib import Path
from time import perf_counter

from tqdm import tqdm

from benchmarks.campaign import judge
from benchmarks.campaign.kinds import KINDS
from cvxlib.ground.provenance import provenance, write_json

#: cases between two writings of the results
KEPT = 200


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 0 if every bound held, 1 if not, 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.campaign", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, help="in all, shared out among the kinds [20000]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument(
        "--kind", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND", help=", ".join(KINDS)
    )
    parser.add_argument("--case", type=int, help="only the case of this index, of every kind asked for")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/campaign.json"), help="[%(default)s]")
    chosen = parser.parse_args(arguments)
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)

    tallies = {kind: judge.Tally() for kind in chosen.kind}
    share = sum(KINDS[kind][1] for kind in chosen.kind)
    plan = [(kind, i) for kind in chosen.kind for i in range(round(chosen.cases * KINDS[kind][1] / share))]
    if chosen.case is not None:
        plan = [(kind, chosen.case) for kind in chosen.kind]
    start, complete, seconds = perf_counter(), False, dict.fromkeys(chosen.kind, 0.0)

    def keep() -> None:
        if chosen.case is not None:
            return
        origin = provenance(chosen.seed)
        origin["versions"]["mpmath"] = metadata.version("mpmath")
        kinds = {kind: tally.as_json() | {"seconds": seconds[kind]} for kind, tally in tallies.items()}
        found = {"provenance": origin, "complete": complete, "seconds": perf_counter() - start, "kinds": kinds}
        write_json(chosen.output, found)

    bar = tqdm(plan, disable=None)
    try:
        for done, (kind, index) in enumerate(bar):
            bar.set_description(kind)
            began = perf_counter()
            judge.play(kind, index, chosen.seed, tallies[kind])
            seconds[kind] += perf_counter() - began
            if done % KEPT == KEPT - 1:
                keep()
        complete = True
    except KeyboardInterrupt:
        bar.write("interrupted")
    finally:
        bar.close()
        keep()
    print(judge.table(tallies))
    if chosen.case is not None:
        for kind, tally in tallies.items():
            for example in tally.told:
                print(f"{kind} {example['case']}, {example['source']}: {example['end']}: {example['what']}")
    else:
        print(f"results: {chosen.output}")
    if not complete:
        return 130
    return int(any(tally.tried["crossed"] or tally.tried["error"] for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
