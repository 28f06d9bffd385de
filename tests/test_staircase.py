"""Contractions, the factored operator and the staircase: they agree with the lifted operator and the other solvers, in any memory."""

import family
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import cvxlib
from cvxlib.operators.factored import FactoredOperator
from cvxlib.solvers import descent, staircase
from cvxlib.solvers.cost import choose

CASES = [(mixer, kind, pool) for mixer in family.MIXERS for kind in ("linear", "gated") for pool in family.POOLS]


def operators(program):
    """The factored operator by every contraction that the program allows, kept and computed in every pass."""
    operator = program.operator
    for memory in (2**30, 0):
        built = FactoredOperator(
            program.frozen,
            program.pool == "mean",
            operator.gate,
            operator.block,
            operator.rows,
            memory=memory,
        )
        for way in built.every_way():
            way.step = 4
            yield way


@pytest.mark.parametrize("mixer, kind, pool", CASES, ids=lambda value: family.name(value))
def test_every_contraction_is_the_lifted_operator(mixer, kind, pool):
    program = family.program(mixer, kind, pool=pool)
    lifted = program.operator
    (blocks, p, q), m = lifted.shape, 5
    u, v = family.normal(m, p, seed=1), family.normal(m, mixer.width, mixer.block_outputs, seed=2)
    k = torch.randint(blocks, (m,), generator=torch.Generator().manual_seed(3))
    z = lifted.zeros().index_add_(0, k, u.unsqueeze(2) * v.flatten(1).unsqueeze(1))
    dual = family.normal(lifted.rows, mixer.outputs, seed=4)
    adjoint = lifted.adjoint(dual)
    left, right, core = (family.normal(blocks, *shape, seed=5) for shape in ((p, 2), (q, 3), (2, 3)))
    for operator in operators(program):
        for _ in range(2):  # the second pass may use what the first has kept
            assert torch.allclose(operator.predictions(u, v, k), lifted.forward(z))
        assert torch.allclose(operator.adjoint(dual), adjoint)
        gu, gv = operator.gradients(u, v, k, dual)
        assert torch.allclose(gu, (adjoint[k] @ v.flatten(1).unsqueeze(2)).squeeze(2))
        assert torch.allclose(gv.flatten(1), (adjoint[k].mT @ u.unsqueeze(2)).squeeze(2))
        restricted = operator.core(left, right, torch.arange(blocks))
        assert torch.allclose(restricted.forward(core), lifted.forward(left @ core @ right.mT))
        assert torch.allclose(restricted.adjoint(dual), left.mT @ adjoint @ right)
        for linear, point in ((restricted, core), (lifted, z)):
            for part, mine in zip(linear.maps, linear.split(point), strict=True):
                applied = (part.gram() @ mine.reshape(part.columns, part.copies)).reshape(mine.shape)
                assert torch.allclose(applied, part.adjoint(part.forward(mine)))
        du, dv = family.normal(m, p, seed=6), family.normal(*v.shape, seed=7)
        first, second = operator.line(u, v, du, dv, k)
        moved = operator.predictions(u + 0.3 * du, v + 0.3 * dv, k)
        assert torch.allclose(operator.predictions(u, v, k) + 0.3 * first + 0.09 * second, moved)


@pytest.mark.parametrize("mixer, kind, pool", CASES, ids=lambda value: family.name(value))
@pytest.mark.parametrize("loss", family.LOSSES, ids=family.name)
def test_staircase_reaches_the_optimum_of_every_program(mixer, kind, pool, loss):
    program = family.program(mixer, kind, loss, pool, samples=12)
    solution = cvxlib.solve(program, tol=1e-5, solver="staircase", max_iterations=20_000)
    other = cvxlib.solve(program, tol=1e-5, solver="splitting")
    assert solution.status is cvxlib.Status.CERTIFIED
    assert solution.certificate.dual <= other.objective and other.certificate.dual <= solution.objective
    assert solution.objective == pytest.approx(other.objective, rel=2e-5)
    audit = cvxlib.certify(program, solution.head(), solution.certificate.dual_point, independent=True)
    assert audit.primal == pytest.approx(solution.objective, rel=1e-9)
    assert audit.dual >= solution.certificate.dual * (1 - 1e-9)


def attention(n=200, s=6, d=6, c=4, gates=0, fraction=0.05, dtype=torch.float64, tokens=None):
    """Pooled attention on badly conditioned tokens."""
    spread = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    tokens = (family.normal(n, s, d) * spread).to(dtype) if tokens is None else tokens
    labels = torch.randint(c, (n,), generator=torch.Generator().manual_seed(1))
    mixer = cvxlib.SelfAttention(features=d, outputs=c)
    activation = cvxlib.GatedReLU.sample(mixer, gates) if gates else cvxlib.Linear()
    program = cvxlib.ConvexProgram(mixer, activation, cvxlib.CrossEntropy(), tokens, labels, beta=1.0)
    return program.with_beta(fraction * program.beta_max())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), gates=st.integers(0, 3), fraction=st.floats(0.03, 0.9))
def test_bounds_hold_at_every_round(seed, gates, fraction):
    tokens = family.normal(30, 4, 3, seed=seed)
    program = attention(n=30, s=4, d=3, c=3, gates=gates, fraction=fraction, tokens=tokens)
    solution = cvxlib.solve(program, tol=1e-4, solver="staircase")
    exact = cvxlib.solve(program, tol=1e-7)
    evaluations, primal, dual = solution.history.T
    assert (evaluations.diff() > 0).all() and (primal.diff() <= 0).all() and (dual.diff() >= 0).all()
    assert (dual <= exact.objective * (1 + 1e-12)).all() and (primal >= exact.certificate.dual * (1 - 1e-12)).all()


def test_float32_is_certified_in_double_precision():
    program = attention(dtype=torch.float32)
    solution = cvxlib.solve(program, tol=1e-3, solver="staircase")
    assert solution.status is cvxlib.Status.CERTIFIED and solution.certificate.dtype == torch.float64
    exact = cvxlib.solve(program.double(), tol=1e-6)
    assert solution.certificate.dual <= exact.objective and exact.certificate.dual <= solution.objective


@pytest.mark.parametrize("solver", ["staircase", "splitting"])
def test_float32_says_when_rounding_stops_it(solver, monkeypatch):
    monkeypatch.setattr("cvxlib.solvers.staircase.Staircase.patience", 10)
    solution = cvxlib.solve(
        attention(30, 4, 3, 2, dtype=torch.float32), tol=1e-10, solver=solver, max_iterations=100_000
    )
    assert solution.status is cvxlib.Status.STALLED and solution.evaluations < 20_000
    assert 0 <= solution.certificate.relative_gap < 1e-3


@pytest.mark.parametrize("gates", [0, 3])
def test_memory_makes_no_difference(gates, tmp_path, monkeypatch):
    program = attention(gates=gates)
    solution = cvxlib.solve(program, tol=1e-4, solver="staircase")
    numpy = pytest.importorskip("numpy")
    file = tmp_path / "tokens.npy"
    numpy.save(file, program.tokens.numpy())
    monkeypatch.setattr("cvxlib.operators.factored.MEMORY", 1000)
    monkeypatch.setattr("cvxlib.model.contractions.WORKSPACE", 2**18)
    mapped = attention(gates=gates, tokens=torch.from_numpy(numpy.load(file, mmap_mode="r+")))
    assert not mapped.factored.stored and mapped.factored.step < 200
    streamed = cvxlib.solve(mapped, tol=1e-4, solver="staircase")
    assert "computed in every pass" in streamed.solver
    # sums in another order: the same up to the certified gap
    assert streamed.certificate.dual <= solution.objective and solution.certificate.dual <= streamed.objective
    assert streamed.certificate.relative_gap <= 1e-4


def test_interrupt_keeps_the_best_and_the_checkpoint_resumes_to_the_same_result(tmp_path, monkeypatch):
    program, file = attention(gates=2), tmp_path / "solve.safetensors"
    whole = cvxlib.solve(program, tol=1e-5, solver="staircase")
    rounds = iter(range(100))
    descend = staircase.Staircase.descend

    def interrupted(self, run):
        if next(rounds) == 2:
            raise KeyboardInterrupt
        return descend(self, run)

    with monkeypatch.context() as patch:
        patch.setattr(staircase.Staircase, "descend", interrupted)
        first = cvxlib.solve(program, tol=1e-5, solver="staircase", checkpoint=file)
    assert first.status is cvxlib.Status.INTERRUPTED
    assert first.certificate.dual <= whole.objective <= first.objective and first.evaluations < whole.evaluations
    second = cvxlib.solve(program, tol=1e-5, solver="staircase", checkpoint=file)
    assert second.status is cvxlib.Status.CERTIFIED and second.evaluations == whole.evaluations
    assert second.objective == pytest.approx(whole.objective, rel=1e-10)
    assert second.certificate.dual == pytest.approx(whole.certificate.dual, rel=1e-10)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("solver", ["splitting", "proximal", "staircase"])
def test_a_checkpoint_goes_on_and_belongs_to_one_solve(solver, tmp_path):
    program, file = attention(n=40), tmp_path / "solve.safetensors"
    early = cvxlib.solve(program, tol=1e-5, solver=solver, max_iterations=25, checkpoint=file)
    assert early.status is cvxlib.Status.ITERATION_LIMIT
    later = cvxlib.solve(program, tol=1e-3, solver=solver, checkpoint=file)
    assert later.status is cvxlib.Status.CERTIFIED and later.evaluations >= early.evaluations
    assert later.history[0, 0] == early.history[0, 0]
    with pytest.raises(ValueError, match="checkpoint: expected the file of an earlier solve of this program"):
        cvxlib.solve(program.with_beta(1e-3), solver=solver, checkpoint=file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"checkpoint: .*damaged"):
        cvxlib.solve(program, solver=solver, checkpoint=file)
    with pytest.raises(ValueError, match=r"checkpoint: expected a file's name; got the folder"):
        cvxlib.solve(program, solver=solver, checkpoint=tmp_path)


def test_warm_start_along_beta():
    program = attention(gates=2)
    solution = cvxlib.solve(program, tol=1e-4, solver="staircase")
    near = program.with_beta(0.95 * program.beta)
    warm = cvxlib.solve(near, tol=1e-3, solver="staircase", start=solution)
    cold = cvxlib.solve(near, tol=1e-3, solver="staircase")
    assert warm.evaluations < cold.evaluations
    assert warm.certificate.dual <= cold.objective and cold.certificate.dual <= warm.objective


@pytest.mark.parametrize("wide", [False, True])
def test_singular_values_of_large_blocks_are_bounded_from_above(wide, monkeypatch):
    matrix = family.normal(400, 300, seed=3) @ torch.diag(torch.linspace(1, 1.001, 300, dtype=torch.float64))
    matrix = matrix.mT if wide else matrix
    sigma = torch.linalg.svdvals(matrix)
    beta = float(sigma[5])
    exact, directions = staircase.violated(matrix.unsqueeze(0), beta)
    monkeypatch.setattr("cvxlib.geometry.norms.LARGEST_EIGEN", 10)
    for count, close in ((1, 0.1), (20, 1e-6)):
        monkeypatch.setattr("cvxlib.geometry.norms.BLOCKS", count)
        bound, found = staircase.violated(matrix.unsqueeze(0), beta)
        assert float(sigma[0]) <= bound <= float(sigma[0]) * (1 + close)
    assert exact == pytest.approx(float(sigma[0]), rel=1e-12)
    for (_, left, right), (_, left_too, right_too) in zip(directions, found, strict=True):
        assert torch.allclose(left_too.mT @ left_too, torch.eye(left.shape[1], dtype=torch.float64))
        top = left[:, -1] @ matrix @ right[:, -1]
        assert abs(float(top)) == pytest.approx(float(sigma[0]), rel=1e-9)
        assert right_too.shape == right.shape


def test_the_choice_follows_operations_and_memory(monkeypatch):
    small = attention()
    name, reason = choose(small)
    assert name == "splitting" and "operations" in reason and "MiB" in reason
    assert reason in cvxlib.solve(small, tol=1e-2).solver
    monkeypatch.setattr("cvxlib.solvers.cost.LARGEST_DESIGN", 1000)
    assert choose(small)[0] == "staircase"


class ScalarReads(TorchDispatchMode):
    """Counts the numbers that the host reads: with a GPU, each waits for it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep_features", [False, True])
def test_descent_reads_numbers_only_where_it_checks(keep_features):
    program = attention()
    operator = program.factored
    moments = descent.AxisMoments(program, operator)
    u, v = (
        family.normal(3, program.mixer.p, seed=1),
        family.normal(3, program.mixer.width, program.mixer.block_outputs, seed=2),
    )
    k = torch.zeros(3, dtype=torch.long)

    def reads(checks):
        iterations = checks * descent.READ_EVERY
        with ScalarReads() as mode:
            *_, evaluations = descent.minimise(program, operator, moments, u, v, k, iterations, -1.0, keep_features)
        assert evaluations == iterations + 2
        return mode.count

    assert reads(6) - reads(2) == 4 * 2  # two values a check


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gates", [0, 3])
def test_cuda_gives_the_same_certificate(gates):
    program = attention(gates=gates, dtype=torch.float32)
    on_device = cvxlib.ConvexProgram(
        program.mixer, program.activation, program.loss, program.tokens.cuda(), program.targets.cuda(), program.beta
    )
    here = cvxlib.solve(program, tol=1e-3, solver="staircase")
    there = cvxlib.solve(on_device, tol=1e-3, solver="staircase")
    assert there.status is cvxlib.Status.CERTIFIED and there.factors.u.is_cuda
    assert there.certificate.dual <= here.objective and here.certificate.dual <= there.objective


def test_cores_stay_within_their_memory(monkeypatch):
    program = attention(gates=2)
    sizes: list[int] = []
    core = FactoredOperator.core

    def recorded(self, left, right, k):
        sizes.append(len(k) * left.shape[2] * right.shape[2])
        return core(self, left, right, k)

    monkeypatch.setattr(FactoredOperator, "core", recorded)
    free = cvxlib.solve(program, tol=1e-3, solver="staircase")
    most = max(sizes)
    sizes.clear()
    monkeypatch.setattr("cvxlib.operators.factored.MEMORY", 0)
    monkeypatch.setattr(staircase, "CORE_BYTES", 0)
    tight = cvxlib.solve(attention(gates=2), tol=1e-3, solver="staircase")
    assert max(sizes) < most and tight.status is free.status is cvxlib.Status.CERTIFIED
