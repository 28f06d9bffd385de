"""Benchmarks: tiny runs end to end, ratios and fits that follow from the rows, and results that survive an interrupt."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import bars, report, runner  # noqa: E402
from benchmarks.problems import problems  # noqa: E402


def command(folder, *options):
    return [sys.executable, "-m", "benchmarks", "--quick", "--threads", "1", "--output", str(folder), *options]


def row(name, seconds=1.0, status="finished", **fields):
    return {"name": name, "status": status, "seconds": seconds, "extra_bytes": 1, "details": {}, **fields}


def test_a_tiny_run_writes_a_table_results_and_a_plot(tmp_path):
    pytest.importorskip("cvxpy")
    pytest.importorskip("matplotlib")
    run = subprocess.run(
        command(tmp_path, "--only", "clarabel", "gated-attention"), cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name, competitors in {
        "clarabel": ["ours", "Clarabel"],
        "gated-attention": ["ours", "AdamW 0.005", "AdamW 0.001"],
    }.items():
        results = json.loads((tmp_path / f"{name}.json").read_text())
        assert results["complete"] and results["quick"] and results["provenance"]["versions"]["torch"]
        assert [r["name"] for r in results["rows"]] == competitors
        mine, *others = results["rows"]
        assert all(r["status"] == "finished" for r in results["rows"])
        assert mine["dual"] <= mine["objective"] <= mine["dual"] * (1 + 1e-3)
        assert all(r["beta"] == mine["beta"] and r["objective"] >= mine["dual"] for r in others)
        for r in results["rows"]:
            assert r["extra_bytes"] == r["peak_bytes"] - r["baseline_bytes"] >= 0
            assert results["ratios"][r["name"]]["seconds"] == r["seconds"] / mine["seconds"]
            assert results["ratios"][r["name"]]["objective_excess"] == r["objective"] / mine["objective"] - 1
            assert any(r["name"] in line and f"{r['objective']:.7g}" in line for line in run.stdout.splitlines())
        for bar, definition in zip(results["bars"], problems(True)[name].bars, strict=True):
            assert bar == definition.judge(results["rows"])
            assert f"{bar['what']}: {bar['measured']:.4g}" in run.stdout
    clarabel = json.loads((tmp_path / "clarabel.json").read_text())
    by_name = {r["name"]: r for r in clarabel["rows"]}
    # two solvers of their own tolerances, and the conic solver's own value: one optimum
    assert by_name["Clarabel"]["objective"] == pytest.approx(by_name["ours"]["objective"], rel=1e-5)
    assert by_name["Clarabel"]["details"]["reported_objective"] == pytest.approx(by_name["ours"]["objective"], rel=1e-5)
    faster = next(bar for bar in clarabel["bars"] if "CVXPY" in bar["what"])
    assert faster["measured"] == by_name["Clarabel"]["seconds"] / by_name["ours"]["seconds"]
    assert (tmp_path / "bars.png").stat().st_size > 0


def test_an_interrupt_leaves_valid_results(tmp_path):
    results = tmp_path / "gated-attention.json"
    # a session of its own: the signal must not reach the tests
    process = subprocess.Popen(
        command(tmp_path, "--only", "gated-attention"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        while process.poll() is None:
            # the next competitor needs seconds to import torch, which leaves time to interrupt it
            if results.exists() and json.loads(results.read_text())["rows"]:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.05)
        output = process.communicate()[0]
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted" in output
    left = json.loads(results.read_text())
    assert not left["complete"]
    assert [(r["name"], r["status"]) for r in left["rows"]] == [("ours", "finished")]
    assert os.listdir(tmp_path) == [results.name]


def test_a_competitor_that_takes_too_long_is_a_row_that_says_so(tmp_path):
    results = runner.run(problems(True)["digits"], tmp_path, quick=True, threads=1, limit=0.2)
    assert results["complete"] and [r["status"] for r in results["rows"]] == ["timed out"] * 4
    assert all(r["seconds"] >= 0.2 for r in results["rows"])
    assert report.table(results).count("timed out: stopped after 0.2 s") == 4
    assert all(bar["met"] is None for bar in results["bars"])
    # a weight decay that cannot be found is every competitor's failure
    results = runner.run(problems(True)["clarabel"], tmp_path, quick=True, threads=1, limit=0.2)
    assert [r["message"] for r in results["rows"]] == ["weight decay: stopped after 0.2 s"] * 2


def test_a_failing_job_names_its_error():
    job = {"problem": "clarabel", "competitor": "nobody", "quick": True, "threads": 1, "beta": 1.0, "earlier": []}
    outcome = runner.launch(job, limit=100)
    assert outcome["status"] == "failed" and outcome["message"].startswith("ValueError")


def test_power_laws_are_recovered_and_need_three_sizes():
    rows = [row(f"n = {n}", 3.0 * n**1.5, sizes={"n": n}, evaluations=10) for n in (100, 200, 400, 800)]
    law = bars.fit(rows, "n", "seconds")
    assert law["exponent"] == pytest.approx(1.5) and law["factor"] == pytest.approx(3.0)
    assert max(map(abs, law["residuals"])) < 1e-9
    assert bars.fit(rows[:2], "n", "seconds") is None and bars.fit(rows, "d", "seconds") is None
    assert bars.exponent("n", "evaluations")(rows) == pytest.approx(0.0, abs=1e-9)


def test_the_better_adamw_counts_and_one_stopped_counts_with_its_time():
    mine, slow, fast = (
        row("ours", 2.0, objective=1.0),
        row("AdamW a", 9.0, objective=1.1),
        row("AdamW b", 3.0, objective=1.2),
    )
    bar = bars.Bar("times faster", bars.time_ratio("AdamW"), at_least=4)
    assert bar.judge([mine, slow, fast])["measured"] == 4.5 and bar.judge([mine, slow, fast])["met"] is True
    assert bar.judge([mine, fast])["met"] is False
    assert bar.judge([mine, row("AdamW a", 10.0, "timed out")])["measured"] == 5.0
    assert bar.judge([mine])["met"] is None and bar.judge([slow])["measured"] is None


def test_time_to_come_near_the_optimum():
    details = {"objective": [3.0, 2.0, 1.0005, 1.0], "training_seconds": [0.0, 1.0, 2.5, 4.0]}
    assert report.seconds_to_target(row("AdamW", objective=1.0, details=details), 1.0) == 2.5
    assert report.seconds_to_target(row("AdamW", objective=1.0, details=details), 0.5) is None


def test_scnn_has_the_same_value(tmp_path):
    pytest.importorskip("scnn")
    results = runner.run(problems(True)["scnn"], tmp_path, quick=True, threads=1, limit=600)
    same = next(bar for bar in results["bars"] if "difference" in bar["what"])
    assert same["met"] and math.isfinite(same["measured"])


def test_the_planted_labels_are_learnable_and_the_data_repeat():
    from benchmarks.data import labelled_tokens

    tokens, labels = labelled_tokens(1200, 6, 4, 3, seed=5)
    again, same = labelled_tokens(1200, 6, 4, 3, seed=5)
    assert tokens.equal(again) and labels.equal(same)
    assert float(tokens.square().sum(2).mean()) == pytest.approx(1.0, rel=0.1)
    spectrum = tokens.flatten(0, 1).square().mean(0)
    assert float(spectrum[0] / spectrum[3]) == pytest.approx(4.0, rel=0.3)
    assert labels.bincount(minlength=3).min() > 120


#: the rows of the README's table, and the bar of the kept results that each of them quotes
QUOTED = (
    ("pooled linear attention", "attention", "times faster than 70 epochs of AdamW"),
    ("pooled gated attention", "gated-attention", "times faster than 70 epochs of AdamW"),
    ("handwritten digits", "digits", "times faster than 70 epochs of AdamW"),
    ("linear attention per token", "clarabel", "times faster than Clarabel, by CVXPY's time"),
    ("the same, 10 features", "scs", "times faster than SCS, by CVXPY's time"),
    ("gated two-layer network", "scnn", "times faster than scnn to the same certified gap"),
)


@pytest.mark.parametrize("start, problem, bar", QUOTED, ids=lambda value: value.split(" ")[0])
def test_the_readme_quotes_the_results_that_are_kept(start, problem, bar):
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {start}")]
    quoted = float(row.split("|")[3])
    kept = json.loads((ROOT / "benchmarks" / "results" / f"{problem}.json").read_text())
    (measured,) = [b["measured"] for b in kept["bars"] if b["what"] == bar]
    assert quoted == float(f"{measured:.2g}")
    higher = re.search(r"end ([\d.]+) % higher", row)
    if higher:
        values = {r["name"]: r["objective"] for r in kept["rows"] if r["objective"] is not None}
        ours = values.pop("ours")
        excess = 100 * (min(value for name, value in values.items() if "AdamW" in name) / ours - 1)
        assert float(higher[1]) == float(f"{excess:.{len(higher[1].partition('.')[2])}f}")


def test_the_readme_quotes_the_growth_that_is_kept():
    kept = json.loads((ROOT / "benchmarks" / "results" / "growth.json").read_text())
    exponents = {b["what"]: b["measured"] for b in kept["bars"]}
    time, memory = exponents["exponent of time in n"], exponents["exponent of memory in n"]
    counts = [r["evaluations"] for r in kept["rows"] if r["name"].startswith("n = ")]
    assert f"grows as n^{time:.2f}, its memory as n^{memory:.2f}, and the number" in (ROOT / "README.md").read_text()
    assert max(counts) <= counts[0]
