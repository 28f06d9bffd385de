"""Runs problems, one competitor at a time, each in a fresh process; the results file is rewritten after every one."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from time import perf_counter

from benchmarks import report
from benchmarks.problems import Problem
from cvxlib.ground.provenance import provenance, write_json

ROOT = Path(__file__).parent.parent
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
#: packages of competitors, besides those that every results file names
PACKAGES = ("clarabel", "scs", "pyscnn")


def run(
    problem: Problem,
    folder: Path,
    *,
    quick: bool,
    threads: int,
    limit: float,
    progress: Callable[[str], None] = lambda name: None,
) -> dict:
    """Run all competitors of a problem and keep ``folder/NAME.json`` up to date.

    Args:
        problem: from :func:`benchmarks.problems.problems`.
        folder: where the results file goes.
        quick: whether the problem is the tiny one; the worker builds the same.
        threads: of every process.
        limit: seconds for one process, data and imports included.
        progress: told the name of each competitor before it runs.

    Returns:
        The results, as in the file. A competitor that fails or takes too long is a row that says so.

    Raises:
        KeyboardInterrupt: after the file has been written with the rows so far and ``complete`` false.
    """
    results = {
        "problem": problem.name,
        "title": problem.title,
        "quick": quick,
        "complete": False,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": threads,
        "limit": limit,
        "size": dict(problem.size),
        "fraction": problem.fraction,
        "note": problem.note,
        "rows": [],
        "bars": [],
        "fits": [],
        "provenance": _provenance(problem),
    }

    def save() -> None:
        report.summarise(problem, results)
        write_json(folder / f"{problem.name}.json", results)

    def job(competitor: str | None, beta: float | None) -> dict:
        description = {
            "problem": problem.name,
            "competitor": competitor,
            "quick": quick,
            "threads": threads,
            "beta": beta,
            "earlier": results["rows"],
        }
        return launch(description, limit)

    save()
    try:
        progress("weight decay")
        setup = {"betas": dict.fromkeys((c.name for c in problem.competitors), problem.beta)}
        if problem.beta is None:
            setup = job(None, None)
        for competitor in problem.competitors:
            progress(competitor.name)
            if "betas" in setup:
                row = job(competitor.name, setup["betas"][competitor.name])
            else:
                row = {"status": setup["status"], "message": f"weight decay: {setup['message']}"}
            results["rows"].append({"name": competitor.name, **row})
            save()
    except KeyboardInterrupt:
        save()
        raise
    results["complete"] = True
    save()
    return results


def launch(description: dict, limit: float) -> dict:
    """Run one job in a fresh process and return what it wrote, or a status and a message that say why there is nothing."""
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(description["threads"]))
    with tempfile.TemporaryDirectory() as folder:
        job, result, log = (Path(folder) / name for name in ("job.json", "result.json", "log.txt"))
        job.write_text(json.dumps(description))
        command = [sys.executable, "-m", "benchmarks.worker", str(job), str(result)]
        start = perf_counter()
        with log.open("w") as stream:
            # a session of its own: Ctrl-C is for the runner, which then ends the worker
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                return {
                    "status": "timed out",
                    "message": f"stopped after {limit:g} s",
                    "seconds": perf_counter() - start,
                }
            finally:
                process.kill()
                process.wait()
        if code == 0:
            return json.loads(result.read_text())
        return {"status": "failed", "message": _reason(code, log.read_text(errors="replace"))}


def _reason(code: int, log: str) -> str:
    if code < 0:
        return f"ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    lines: Sequence[str] = log.strip().splitlines() or [f"exit code {code}"]
    return lines[-1]


def _provenance(problem: Problem) -> dict:
    where = provenance(seed=0, device="cuda" if problem.cuda else "cpu")
    for package in PACKAGES:
        try:
            where["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return where
