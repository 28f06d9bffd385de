"""The campaign against false certificates: a short run of it, and planted faults that it must find."""

import json
import sys
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

import cvxlib

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.campaign import adversary, judge
from benchmarks.campaign.__main__ import main
from benchmarks.campaign.exact import Dyadic, ExactProgram, mp
from benchmarks.campaign.kinds import KINDS
from benchmarks.campaign.optima import optimum
from tests import family

#: cases of each kind in the short form
SHORT = {"one-output": 120, "cross-entropy": 40, "attention": 60, "mixers": 30, "relu": 10}


def campaign(kind, cases, fault=None, seed=1):
    tally = judge.Tally()
    for index in range(cases):
        judge.play(kind, index, seed, tally, fault)
    return tally


@pytest.mark.parametrize("kind", KINDS)
def test_no_bound_lies_above_the_optimum(kind):
    tally = campaign(kind, SHORT[kind])
    assert tally.tried.total() == SHORT[kind] and tally.bounds >= SHORT[kind]
    assert not tally.tried["crossed"] and not tally.tried["error"], tally.told
    assert all(gap < 1e-40 for gap in tally.gaps)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "relu"])
def test_a_dual_raised_by_a_billionth_is_found(kind):
    def raised(exact, certificate):
        return certificate.dual + 1e-9 * abs(certificate.dual)

    assert campaign(kind, 25, raised).tried["crossed"]


@pytest.mark.parametrize("kind", ["one-output", "attention", "mixers"])
def test_a_spectral_norm_that_is_too_small_is_found(kind):
    def swollen(exact, certificate):
        return exact.float_bound(certificate.dual_point.double().numpy(), shrink=1 - 1e-4)

    assert campaign(kind, 40, swollen).tried["crossed"]


@pytest.mark.parametrize("kind", ["one-output", "attention", "mixers"])
def test_bounds_with_room_to_spare_are_not_called_crossings(kind):
    def cautious(exact, certificate):
        bound = exact.float_bound(certificate.dual_point.double().numpy(), shrink=1 + 1e-6)
        return bound - 1e-11 * abs(bound)

    found = campaign(kind, 25, cautious)
    # a history holds bare numbers, which no fault changes
    assert found.bounds and not [source for source in found.sources if "history" not in source]


def test_a_relu_bound_above_a_head_is_found():
    def loss_at_zero(exact, certificate):
        return certificate.dual + 0.5 * abs(certificate.primal - certificate.dual) + 1e-3 * certificate.primal

    assert campaign("relu", 6, loss_at_zero).tried["crossed"]


@pytest.mark.parametrize("given, end", [(float("nan"), "error"), (float("inf"), "error"), (-float("inf"), "held")])
def test_bounds_that_are_no_numbers(given, end):
    assert campaign("one-output", 3, lambda exact, certificate: given).tried[end] == 3


def test_dyadic_numbers_are_exact():
    floats = np.array([1e-30, -1e30, 0.0, 0.1, 5e-324, 1 / 3])
    exact = Dyadic.of(floats)
    assert exact.floats().tolist() == floats.tolist()
    assert [Fraction(int(x)) * Fraction(2) ** exact.exponent for x in exact.integers] == [Fraction(x) for x in floats]
    square = Dyadic(exact.integers**2, 2 * exact.exponent).numbers()
    assert square[3] == mp.mpf(0.1) ** 2 and square[3] != mp.mpf(0.1**2)


@pytest.mark.parametrize("mixer", family.MIXERS, ids=family.name)
@pytest.mark.parametrize("activation", ["linear", "gated", "relu"])
@pytest.mark.parametrize("loss", family.LOSSES, ids=family.name)
@pytest.mark.parametrize("pool", family.POOLS, ids=family.name)
def test_the_exact_objective_is_the_networks_own(mixer, activation, loss, pool):
    program = family.program(mixer, "linear" if activation == "relu" else activation, loss, pool, samples=3)
    if activation == "relu":
        program = cvxlib.ConvexProgram(mixer, cvxlib.ReLU(), loss, program.tokens, program.targets, 0.1, pool)
    exact = ExactProgram(program)
    head = cvxlib.Head.random(mixer, program.activation, 2, pool=pool, seed=3, dtype=torch.float64)
    length = head.u.flatten(1).norm(dim=1), head.v.flatten(1).norm(dim=1)
    with torch.no_grad():
        value = family.objective(program, head) + program.beta * ((length[0] * length[1]).sum() - head.weight_decay())
    assert float(exact.objective(head)) == pytest.approx(float(value), rel=1e-12)
    if activation != "relu":
        point = family.normal(len(program.rows), mixer.outputs, seed=4)
        adjoint = torch.tensor(np.stack(exact.float_adjoint(point.numpy()))).flatten()
        assert adjoint.norm() == pytest.approx(float(program.adjoint(point).norm()) / 3, rel=1e-12)


def test_the_secular_equation_against_a_closed_form():
    program = cvxlib.ConvexProgram(
        cvxlib.MLP(1, 1),
        cvxlib.Linear(),
        cvxlib.SquaredLoss(),
        torch.ones(1, 1, 1).double(),
        torch.ones(1, 1) * 3.0,
        1.0,
    )
    found = optimum(ExactProgram(program))  # (z - 3)^2 / 2 + |z| at z = 2
    assert abs(found.value - mp.mpf("2.5")) < mp.mpf(10) ** -60 and found.gap < 1e-60


def test_the_entropy_optimum_against_a_closed_form():
    program = cvxlib.ConvexProgram(
        cvxlib.MLP(1, 2), cvxlib.Linear(), cvxlib.CrossEntropy(), torch.ones(1, 1, 1).double(), torch.tensor([0]), 0.25
    )
    found = optimum(ExactProgram(program))
    with mpmath.workdps(60):  # z = t (1, -1) / sqrt 2, where sqrt 2 (1 - p) = 1/4
        p = 1 - mpmath.mpf(1) / 4 / mpmath.sqrt(2)
        t = mpmath.log(p / (1 - p)) / mpmath.sqrt(2)
        assert abs(mpmath.mpf(found.value) - (t / 4 - mpmath.log(p))) < mpmath.mpf(10) ** -50
    assert found.gap < 1e-50


def test_the_adversary_finds_the_neuron_that_a_relu_needs():
    rng = np.random.default_rng(0)
    x = np.stack([1.7e9 + rng.uniform(0, 3e7, 8), rng.standard_normal(8)], 1)
    y = torch.tensor(np.maximum(-4 * x[:, 1:], 0))
    program = cvxlib.ConvexProgram(
        cvxlib.MLP(2, 1), cvxlib.ReLU(), cvxlib.SquaredLoss(), torch.tensor(x)[:, None], y, 1e-3
    )
    exact = ExactProgram(program)
    best = min(exact.objective(head) for head in adversary.relu_heads(exact, rng))
    aligned = 1e-3 * 4  # beta |u| |v| of the neuron that is the target; the optimum shrinks it a little
    assert best <= 3 * aligned < float((y**2).mean()) / 100


def test_the_command_writes_a_table_and_results(tmp_path, capsys):
    output = tmp_path / "campaign.json"
    code = main(["--cases", "6", "--kind", "one-output", "attention", "--output", str(output)])
    found = json.loads(output.read_text())
    kinds = found["kinds"]
    assert found["complete"] and found["provenance"]["seed"] == 0 and found["provenance"]["versions"]["mpmath"]
    assert sum(kind["cases"] for kind in kinds.values()) == 6
    assert code == int(any(kind["crossed"] or kind["error"] for kind in kinds.values()))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [[name, str(kind["cases"])] for name, kind in kinds.items()]


def test_an_interrupt_keeps_what_was_counted(tmp_path, monkeypatch, capsys):
    played = []

    def play(kind, index, seed, tally):
        if index == 2:
            raise KeyboardInterrupt
        played.append(index)
        tally.tried["held"] += 1

    monkeypatch.setattr(judge, "play", play)
    output = tmp_path / "campaign.json"
    assert main(["--cases", "9", "--kind", "attention", "--output", str(output)]) == 130
    found = json.loads(output.read_text())
    assert not found["complete"] and found["kinds"]["attention"]["held"] == len(played) == 2
