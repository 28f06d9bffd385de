"""One job in a process of its own: ``python -m benchmarks.worker JOB RESULT`` reads a job from JSON and writes its row."""

from __future__ import annotations

import gc
import json
import math
import resource
import sys
from pathlib import Path
from time import perf_counter

import torch

import cvxlib
from benchmarks.problems import Competitor, Problem, problems
from cvxlib.audit.certificates import predict
from cvxlib.ground.provenance import write_json


def main(job: str, result: str) -> None:
    """Run a job and write what came of it."""
    job = json.loads(Path(job).read_text())
    torch.set_num_threads(job["threads"])
    problem = problems(job["quick"])[job["problem"]]
    if job["competitor"] is None:
        write_json(result, {"betas": betas(problem)})
        return
    (competitor,) = (c for c in problem.competitors if c.name == job["competitor"])
    write_json(result, measure(problem, competitor, job["beta"], job["earlier"]))


def betas(problem: Problem) -> dict[str, float]:
    """The weight decay of every competitor, a fraction of ``beta_max``; found beforehand, so that no solve profits from it."""
    found: dict[str, float] = {}
    for competitor in problem.competitors:
        key = json.dumps(problem.sizes(competitor))
        if key not in found:
            program = cvxlib.ConvexProgram(**problem.build(**problem.sizes(competitor)), beta=1.0)
            found[key] = problem.fraction * program.beta_max()
    return {c.name: found[json.dumps(problem.sizes(c))] for c in problem.competitors}


def measure(problem: Problem, competitor: Competitor, beta: float, earlier: list[dict]) -> dict:
    """The row of one competitor: times, memory, and the values recomputed from the network that it found."""
    sizes = problem.sizes(competitor)
    start = perf_counter()
    arguments = problem.build(**sizes)
    data_seconds = perf_counter() - start
    start = perf_counter()
    program = cvxlib.ConvexProgram(**arguments, beta=beta)
    construction_seconds = perf_counter() - start
    run = competitor.prepare(program, earlier, **competitor.options)

    device = program.tokens.device
    gc.collect()
    reset_peak(device)
    baseline = peak_bytes(device)
    start = perf_counter()
    outcome = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = perf_counter() - start
    peak = peak_bytes(device)

    row = {
        "name": competitor.name,
        "status": "finished",
        "sizes": sizes,
        "beta": beta,
        "data_seconds": data_seconds,
        "construction_seconds": construction_seconds,
        "seconds": seconds if outcome.seconds is None else outcome.seconds,
        "whole_seconds": seconds,
        "baseline_bytes": baseline,
        "peak_bytes": peak,
        "extra_bytes": peak - baseline,
        "evaluations": outcome.evaluations,
        "objective": None,
        "dual": outcome.dual,
        "relative_gap": None,
        "details": outcome.details,
    }
    if outcome.head is not None:
        head = outcome.head()
        row["objective"] = objective(program, head)
        if outcome.certify:
            row["dual"] = cvxlib.certify(program, head).dual
        if row["dual"] is not None:
            row["relative_gap"] = cvxlib.Certificate(row["objective"], row["dual"]).relative_gap
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


@torch.no_grad()
def objective(program: cvxlib.ConvexProgram, head: cvxlib.Head) -> float:
    """The regularised objective of any head, in float64 from its own forward pass: one function for all competitors."""
    exact = program.double()
    head = head.to(exact.tokens)
    predictions = predict(head, exact.tokens).reshape(-1, program.mixer.outputs)
    return exact.data_loss(predictions) + exact.beta * float(head.weight_decay())


def peak_bytes(device: torch.device) -> int:
    """The most memory held at once since the last reset: of the device where that is CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    """Forget the peaks of imports and of building the data; where the system does not allow that, they stay in the baseline."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


if __name__ == "__main__":
    main(*sys.argv[1:])
