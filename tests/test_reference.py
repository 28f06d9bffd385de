"""Agreement with CVXPY: every mixer, linear and gated, both losses, pooled and per token; values are compared, not minimisers."""

import pytest
from family import EVERY_CASE, MIXERS, name, program
from parts import Frozen, Scaled, Threshold

import cvxlib

pytest.importorskip("cvxpy")
from cvxlib.audit import reference


def relative(one, other):
    return abs(one - other) / max(abs(one), abs(other))


@pytest.mark.parametrize("mixer, activation, loss, pool", EVERY_CASE, ids=name)
def test_the_certified_value_is_the_optimal_value(mixer, activation, loss, pool):
    case = program(mixer, activation, loss, pool)
    optimum = reference.solve(case)
    solution = cvxlib.solve(case, tol=1e-6)
    assert solution.status is cvxlib.Status.CERTIFIED
    assert relative(solution.objective, optimum) < 1e-5
    assert solution.certificate.dual <= optimum * (1 + 1e-6)  # Clarabel's own tolerance is 1e-8 absolute and relative


@pytest.mark.parametrize("mixer", MIXERS, ids=name)
@pytest.mark.parametrize("solver", ["proximal", "splitting"])
def test_every_solver_finds_it(mixer, solver):
    case = program(mixer, "gated", cvxlib.CrossEntropy(), fraction=0.4, seed=3)
    solution = cvxlib.solve(case, tol=1e-6, solver=solver)
    assert relative(solution.objective, reference.solve(case)) < 1e-5


@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_repeated_gates_leave_the_optimum(mixer):
    """Gates repeated in CVXPY's program, which merges none, leave the optimum where it was."""
    case = program(mixer, "gated", seed=5)
    directions = case.activation.directions
    repeated = cvxlib.GatedReLU(
        directions[[0, 1, 1, 0]] * directions.new_tensor([1, 1, 2, 3]).reshape(-1, *[1] * (directions.ndim - 1))
    )
    twice = cvxlib.ConvexProgram(mixer, repeated, case.loss, case.tokens, case.targets, case.beta, case.pool)
    assert twice.operator.shape == case.operator.shape
    assert relative(reference.solve(twice), reference.solve(case)) < 1e-6
    assert relative(cvxlib.solve(twice, tol=1e-7).objective, reference.solve(case)) < 1e-6


class MLP(cvxlib.MLP):
    """Of the built-in one's name, with another formula."""

    def hidden(self, tokens, u):
        return super().hidden(tokens, u) / 2


@pytest.mark.parametrize(
    "case",
    [
        lambda: program(MLP(2, 2)),
        lambda: program(Scaled(2, 2)),
        lambda: program(cvxlib.MLP(2, 2), "linear", Frozen(9.0)),
        lambda: program(cvxlib.MLP(2, 2), Threshold(0.0)),
        lambda: program(cvxlib.MLP(2, 2), cvxlib.ReLU(), samples=2),
    ],
)
def test_a_part_without_a_formula_is_refused_whatever_its_name(case):
    with pytest.raises(ValueError, match=r"program: expected one of .*, as cvxlib defines them; got "):
        reference.solve(case())
