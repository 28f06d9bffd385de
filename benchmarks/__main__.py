"""``python -m benchmarks``: run the problems, print a table for each, and keep results and plots."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from tqdm import tqdm

from benchmarks import report, runner
from benchmarks.problems import available, problems


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status, 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(problems()), metavar="NAME", help=f"{', '.join(problems())}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument(
        "--output", type=Path, help="folder of the results [_build/benchmarks; with --quick its quick/]"
    )
    parser.add_argument("--threads", type=_positive(int), default=2, help="of every process [2]")
    parser.add_argument("--limit", type=_positive(float), default=1800.0, help="seconds for each competitor [1800]")
    chosen = parser.parse_args(arguments)
    folder = chosen.output or Path("_build/benchmarks") / ("quick" if chosen.quick else "")

    for stop in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs start with SIGINT ignored
        signal.signal(stop, signal.default_int_handler)
    entries = [p for name, p in problems(chosen.quick).items() if chosen.only is None or name in chosen.only]
    finished = []
    # the bar counts processes: one for the weight decay of each problem, one for each competitor
    bar = tqdm(total=sum(1 + len(p.competitors) for p in entries if available(p)), disable=None)
    try:
        for problem in entries:
            if not available(problem):
                bar.write(f"{problem.name}: skipped, there is no CUDA device\n")
                continue

            def progress(name: str, problem=problem) -> None:
                bar.set_description(f"{problem.name}: {name}")
                bar.update()

            finished.append(
                runner.run(
                    problem,
                    folder,
                    quick=chosen.quick,
                    threads=chosen.threads,
                    limit=chosen.limit,
                    progress=progress,
                )
            )
            bar.write(report.table(finished[-1]) + "\n")
    except KeyboardInterrupt:
        bar.write(f"interrupted; what was finished is in {folder}")
        return 130
    finally:
        bar.close()
        _draw(finished, folder)
    print(f"results and plots: {folder}")
    return 0


def _draw(finished: list[dict], folder: Path) -> None:
    """Plots of the bars and of the fits, where there are any."""
    from cvxlib.workflow import figures

    judged = {f"{r['problem']}: {b['what']}": b for r in finished for b in r["bars"] if b["measured"]}
    if judged:
        figures.benchmark_bars(judged).figure.savefig(folder / "bars.png", dpi=120)
    laws = [law for results in finished for law in results["fits"]]
    if laws:
        figures.power_laws(laws).savefig(folder / "growth.png", dpi=120)


def _positive(kind):
    def convert(text: str):
        number = kind(text)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return number

    convert.__name__ = kind.__name__
    return convert


if __name__ == "__main__":
    sys.exit(main())
