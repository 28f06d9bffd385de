"""Proof files: the checker proves what a certificate says, by its own code alone, and refuses whatever else it is given."""

import ast
import dataclasses
import decimal
import hashlib
import json
import shutil
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from family import EVERY_CASE, LOSSES, MIXERS, POOLS, build, name, normal, program

import cvxlib
from cvxlib import verify
from cvxlib.ground.one_process import OneProcess

SMALL = build(cvxlib.SelfAttention)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "proof.npz"


def certified(*case, **settings):
    """A program and the certificate of its solution, audited in float64."""
    problem = program(*case, **settings)
    return problem, cvxlib.certify(problem, cvxlib.solve(problem).head())


def rewritten(path, change, *, seal=True):
    """The file with its header and arrays changed, and with fitting digests if it is sealed again."""
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    if seal:
        header.pop("digest")
        header["sha256"] |= {key: verify.fingerprint(array) for key, array in arrays.items()}
        header["digest"] = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)


def run(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)


# what is proved


@pytest.mark.parametrize(("mixer", "activation", "loss", "pool"), EVERY_CASE, ids=name)
def test_the_bound_is_proved_again(path, mixer, activation, loss, pool):
    problem, certificate = certified(mixer, activation, loss, pool)
    written = cvxlib.save_certificate(path, problem, certificate)
    proof = verify.check(path)
    assert proof == written and proof.claimed == certificate.dual
    assert proof.bound <= certificate.primal
    assert proof.bound == pytest.approx(certificate.dual, rel=1e-9, abs=0)


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_float32_tokens_are_proved_as_they_are_stored(path, loss):
    problem, certificate = certified(SMALL, "gated", loss, tokens=normal(6, 4, 2).float())
    proof = cvxlib.save_certificate(path, problem, certificate)
    with np.load(path) as file:
        assert file["tokens"].dtype == np.float32
    assert proof.bound == pytest.approx(certificate.dual, rel=1e-9, abs=0)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_tokens_of_any_size(path, scale):
    problem, certificate = certified(build(cvxlib.FNO), "gated")
    bound = cvxlib.save_certificate(path, problem, certificate).bound

    def change(header, arrays):
        arrays["tokens"] = arrays["tokens"] * scale
        header["beta"] = (problem.beta * scale).hex()

    rewritten(path, change)
    assert verify.check(path).bound == pytest.approx(bound, rel=1e-12)


def test_a_point_outside_the_simplex_is_moved_inside(path):
    problem, certificate = certified(SMALL, "linear", LOSSES[1])
    cvxlib.save_certificate(path, problem, certificate)

    def change(header, arrays):
        arrays["dual"] = arrays["dual"] * 10
        header["bound"] = (0.0).hex()

    rewritten(path, change)
    assert 0 <= verify.check(path).bound <= certificate.primal


# against exact arithmetic


def fractions(array):
    return np.vectorize(Fraction, otypes=[object])(np.asarray(array, dtype=float))


def exact_adjoint(problem, x, block, gate):
    """(p, q) the adjoint at an exact x (n, 1 or a, c), from the definition of the mixer's maps in rational numbers."""
    mixer, seen = problem.mixer, problem.mixer.split(problem.tokens)[block]
    mask = problem.activation.masks(mixer, seen, block)[:, gate].numpy()
    n, p = len(seen), mixer.p
    a, h = mixer.hidden(seen, seen.new_zeros(1, *mixer.shape)).shape[2:]
    rows = mixer.exact_rows(fractions(seen)).reshape(n, a, h, p)
    values = fractions(mixer.values(seen))
    o = mixer.block_outputs
    x = np.broadcast_to(x[..., block * o : (block + 1) * o], (n, a, o))
    total = np.zeros((p, mixer.q), dtype=object) + Fraction(0)
    for i, j, k in np.argwhere(np.broadcast_to(mask, (n, a, h))):
        total = total + np.outer(rows[i, j, k], np.outer(values[i, k], x[i, j]).ravel())
    return total / Fraction(n * (a if problem.pool else 1))


def semidefinite(matrix):
    """Whether a symmetric matrix of fractions is positive semidefinite, by elimination."""
    matrix = matrix.copy()
    for k in range(len(matrix)):
        if matrix[k, k] < 0 or (matrix[k, k] == 0 and any(matrix[k, k:])):
            return False
        if matrix[k, k]:
            rest = matrix[k + 1 :, k]
            matrix[k + 1 :, k + 1 :] -= np.outer(rest, rest) / matrix[k, k]
    return True


def exact_conjugate(loss, x, targets):
    """The conjugates' sum at exact points (rows, c): a fraction, or for cross-entropy a number of 60 digits."""
    if isinstance(loss, cvxlib.SquaredLoss):
        return (x * (x / 2 + fractions(targets))).sum()
    probabilities = x + np.eye(x.shape[1], dtype=int).astype(object)[targets.numpy()]
    assert (probabilities >= 0).all()
    with decimal.localcontext(prec=60):
        exact = [decimal.Decimal(p.numerator) / p.denominator for p in map(Fraction, probabilities.ravel()) if p]
        return Fraction(sum((p * p.ln() for p in exact), decimal.Decimal(0)))


def test_semidefiniteness_is_told():
    gram = fractions([[1, 2], [2, 4]])
    assert semidefinite(gram) and not semidefinite(gram - fractions(np.eye(2)) / 10**40)
    assert not semidefinite(fractions([[0, 1], [1, 0]]))


@pytest.mark.parametrize("pool", POOLS, ids=name)
@pytest.mark.parametrize("loss", LOSSES, ids=name)
@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_each_step_bounds_what_is_exact(path, mixer, loss, pool):
    # tokens with an offset, so that sums cancel
    tokens = 1000 * (torch.arange(3) % 2 * 2 - 1).double().reshape(3, 1, 1) + normal(3, 4, 2)
    problem, certificate = certified(mixer, "gated", loss, pool, tokens=tokens)
    cvxlib.save_certificate(path, problem, certificate)
    header, arrays = verify.read_file(path)
    rows = problem.rows
    x, delta, terms, scale = verify.dual_point(header["loss"], arrays["dual"], rows.numpy())

    exact = fractions(x)
    if isinstance(loss, cvxlib.CrossEntropy):
        at = np.arange(len(rows)), rows.numpy()
        exact[at] = 0
        exact[at] = -exact.sum(1)
    assert (abs(exact - fractions(x)) <= fractions(delta)).all()
    value = verify.value_below(terms, scale, 3)
    assert Fraction(value) <= -exact_conjugate(loss, exact, rows) / 3

    sizes = verify.sizes_of(header["mixer"], 4, 2)
    shaped = [part.reshape(3, -1, mixer.outputs) for part in (x, delta)]
    t = Fraction(verify.norm_above(header, sizes, *shaped, tokens.numpy(), arrays["masks"]))
    largest = Fraction(0)
    for block in range(mixer.blocks):
        for gate in range(2):
            g = exact_adjoint(problem, exact.reshape(3, -1, mixer.outputs), block, gate)
            gram = g @ g.T if len(g) < g.shape[1] else g.T @ g
            identity = fractions(np.eye(len(gram)))
            assert semidefinite(t * t * identity - gram)
            largest = max(largest, Fraction(np.linalg.norm(g.astype(float), 2)))
    assert float(t) == pytest.approx(float(largest), rel=1e-9)  # and it is no wild bound
    assert Fraction(verify.check(path).bound) <= max(min(1, Fraction(problem.beta) / t) * Fraction(value), 0)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 6)])
@pytest.mark.parametrize("kind", ["normal", "equal singular values", "rank one", "nothing", "tiny"])
def test_the_spectral_norm_is_bounded_in_exact_arithmetic(shape, kind):
    g = normal(*shape, seed=sum(shape)).numpy()
    if kind == "equal singular values":
        u, _, v = np.linalg.svd(g, full_matrices=False)
        g = u @ v
    if kind == "rank one":
        g = np.outer(g[:, 0], g[0])
    g = g * {"nothing": 0.0, "tiny": 2.0**-300}.get(kind, 1.0)
    t = verify.spectral_above(g)
    exact = fractions(g)
    gram = exact @ exact.T
    assert semidefinite(Fraction(t) ** 2 * fractions(np.eye(len(gram))) - gram)
    assert t <= np.linalg.norm(g, 2) * (1 + 1e-13) + 1e-250


def test_what_overflows_proves_nothing_but_that_losses_are_not_negative(path):
    problem, certificate = certified(SMALL)
    cvxlib.save_certificate(path, problem, certificate)

    def change(header, arrays):
        arrays["dual"] = arrays["dual"] * 1e300
        header["bound"] = (0.0).hex()

    rewritten(path, change)
    assert verify.check(path).bound == 0


# what is refused


def test_every_flipped_bit_is_refused_or_harmless(path):
    problem, certificate = certified(SMALL, "gated", samples=2)
    bound = cvxlib.save_certificate(path, problem, certificate).bound
    whole, harmless = path.read_bytes(), 0
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            proof = verify.check(path)
        except verify.Refused:
            continue
        harmless += 1
        assert (proof.bound, proof.claimed) == (bound, certificate.dual)
    assert harmless < len(whole) / 4  # dates and attributes of the archive's members


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_a_truncated_file_is_refused(path, keep):
    cvxlib.save_certificate(path, *certified(SMALL))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep == 0.5 else keep])
    with pytest.raises(verify.Refused):
        verify.check(path)


def higher_bound(header, arrays):
    header["bound"] = (float.fromhex(header["bound"]) * (1 + 1e-8)).hex()


def higher_beta(header, arrays):
    header["beta"] = (float.fromhex(header["beta"]) * 1.01).hex()


def lower_beta(header, arrays):
    header["beta"] = (float.fromhex(header["beta"]) * 0.99).hex()


def other_gates(header, arrays):
    arrays["masks"] = ~arrays["masks"]


def other(key):
    def change(header, arrays):
        arrays[key] = arrays[key] * 1.001

    return change


@pytest.mark.parametrize(
    "change", [higher_bound, higher_beta, other_gates, other("tokens"), other("targets"), other("dual")]
)
def test_what_was_changed_is_refused(path, change):
    cvxlib.save_certificate(path, *certified(SMALL, "gated"))
    rewritten(path, change, seal=False)
    with pytest.raises(verify.Refused, match="changed after"):
        verify.check(path)


@pytest.mark.parametrize("change", [higher_bound, lower_beta, other("tokens")])
def test_a_claim_that_is_too_high_is_refused_whatever_its_digests(path, change):
    cvxlib.save_certificate(path, *certified(SMALL, "gated"))
    rewritten(path, change)
    with pytest.raises(verify.Refused, match="no more than"):
        verify.check(path)


def test_a_claim_that_is_too_low_is_answered_with_what_is_proved(path):
    problem, certificate = certified(SMALL)
    bound = cvxlib.save_certificate(path, problem, certificate).bound
    rewritten(path, lambda header, arrays: header.update(bound=(bound / 2).hex()))
    proof = verify.check(path)
    assert (proof.bound, proof.claimed) == (bound, bound / 2)
    assert repr(bound) in proof.statement and repr(bound / 2) in proof.statement


@pytest.mark.parametrize(
    "words",
    [
        {"beta": "nan"},
        {"beta": "-0x1p0"},
        {"bound": "inf"},
        {"bound": "nan"},
        {"gates": 2**40},
        {"gates": 0},
        {"pool": "max"},
        {"loss": "Hinge"},
        {"format": "cvxlib proof 2"},
        {"mixer": {"name": "Softmax", "features": 2, "outputs": 2}},
        {"mixer": {"name": "SelfAttention", "features": 3, "outputs": 2}},
        {"mixer": {"name": "SelfAttention", "features": 2, "outputs": 2**40}},
        {"mixer": {"name": "CrossAttention", "features": 2, "outputs": 2, "queries": 4}},
        {"mixer": {"name": "Convolution", "tokens": 4, "features": 2, "outputs": 2, "kernel": 5}},
        {"mixer": ["SelfAttention"]},
    ],
    ids=str,
)
def test_words_that_do_not_fit_are_refused(path, words):
    cvxlib.save_certificate(path, *certified(SMALL, "gated"))
    rewritten(path, lambda header, arrays: header.update(words))
    with pytest.raises(verify.Refused):
        verify.check(path)


@pytest.mark.parametrize("key", ["dual", "masks", "tokens", "targets"])
def test_arrays_that_do_not_fit_are_refused(path, key):
    for change in (
        lambda array: array[:, :1],
        lambda array: array.astype(np.float16),
        lambda array: array.astype(complex),
        lambda array: np.where(np.ones_like(array, bool), np.nan, array),
        lambda array: array.astype(object),
    ):
        cvxlib.save_certificate(path, *certified(SMALL, "gated"))
        with np.load(path) as file:
            changed = change(file[key])
        rewritten(path, lambda header, arrays, changed=changed: arrays.update({key: changed}))
        with pytest.raises(verify.Refused):
            verify.check(path)


def test_nothing_is_unpickled(path):
    np.savez(path, header=np.array([Bomb()], dtype=object), dual=np.zeros(3))
    with pytest.raises(verify.Refused, match="plain numbers"):
        verify.check(path)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("the checker unpickled an object",)


def test_a_shape_that_the_bytes_do_not_fill_allocates_nothing():
    stream = np.lib.format.magic(1, 0)
    words = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1152921504606846976,), }\n"
    with pytest.raises(verify.Refused, match="shape"):
        verify.read_array(stream + len(words).to_bytes(2, "little") + words + bytes(8), "dual")


def test_a_compressed_file_is_refused(path):
    np.savez_compressed(path, header=np.zeros(1000, np.uint8), dual=np.zeros(10**6))
    with pytest.raises(verify.Refused, match="compressed"):
        verify.check(path)


def test_foreign_files_are_refused(path):
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(verify.Refused, match="not a proof file"):
        verify.check(path)
    with pytest.raises(verify.Refused, match="FileNotFoundError"):
        verify.check(path.with_name("none.npz"))


# data that are given apart


def test_data_may_be_given_apart(path, tmp_path):
    problem, certificate = certified(SMALL, "gated", LOSSES[1])
    bound = cvxlib.save_certificate(path, problem, certificate, include_data=False).bound
    with np.load(path) as file:
        assert {"tokens", "targets"}.isdisjoint(file)
    with pytest.raises(verify.Refused, match="give them too"):
        verify.check(path)
    np.save(tmp_path / "x.npy", np.asfortranarray(problem.tokens))
    np.save(tmp_path / "y.npy", problem.targets)
    assert verify.check(path, tmp_path / "x.npy", tmp_path / "y.npy").bound == bound
    np.save(tmp_path / "x.npy", problem.tokens.flip(0))
    with pytest.raises(verify.Refused, match="not the tokens"):
        verify.check(path, tmp_path / "x.npy", tmp_path / "y.npy")


# the checker alone


def test_the_checker_imports_numpy_and_the_standard_library():
    tree = ast.parse(open(verify.__file__).read())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert set(names) - sys.stdlib_module_names == {"numpy"}


def test_the_checker_runs_where_the_package_cannot_be_imported(path, tmp_path):
    problem, certificate = certified(build(cvxlib.BlockFNO), "gated")
    bound = cvxlib.save_certificate(path, problem, certificate).bound
    script = shutil.copy(verify.__file__, tmp_path / "copied.py")
    code = (
        "import sys, runpy; sys.modules |= dict.fromkeys(['cvxlib', 'torch', 'scipy']); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    code = f"import sys; sys.argv = sys.argv[1:]; {code}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, script, str(path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PROVED: no head of this form") and repr(bound) in done.stdout
    assert len(done.stdout.splitlines()) == 2


def test_the_command_says_what_it_proved_or_why_not(path):
    cvxlib.save_certificate(path, *certified(SMALL))
    done = run("-m", "cvxlib.verify", path)
    assert (done.returncode, done.stdout[:7]) == (0, "PROVED:")
    rewritten(path, higher_bound)
    done = run("-m", "cvxlib.verify", path)
    assert (done.returncode, done.stdout[:8], done.stderr) == (1, "REFUSED:", "")
    assert run("-m", "cvxlib.verify").returncode == 2


# what is not written


def refused(path, problem, certificate, words):
    with pytest.raises(ValueError, match=words):
        cvxlib.save_certificate(path, problem, certificate)
    assert not list(path.parent.iterdir())


def test_a_bound_that_cannot_be_proved_is_not_written(path):
    problem, certificate = certified(SMALL)
    too_high = dataclasses.replace(certificate, dual=certificate.primal * 1.01, primal=certificate.primal * 2)
    refused(path, problem, too_high, "cvxlib.certify computes one in float64")


def test_programs_that_the_checker_does_not_know_are_not_written(path):
    class Own(cvxlib.SelfAttention):
        pass

    class OwnLoss(cvxlib.SquaredLoss):
        pass

    problem, certificate = certified(SMALL)
    refused(path, program(Own(2, 2)), certificate, "a mixer of this package")
    refused(path, program(SMALL, cvxlib.ReLU()), certificate, "gates of a ReLU are not fixed")
    refused(path, program(SMALL, loss=OwnLoss()), certificate, "SquaredLoss or CrossEntropy")
    refused(path, problem, dataclasses.replace(certificate, dual_point=None), "a dual point")
    refused(path, problem, dataclasses.replace(certificate, dual_point=torch.zeros(1, 2)), "a dual point")


def test_a_program_that_processes_share_is_not_written(path):
    problem, certificate = certified(SMALL)
    shared = problem.with_beta(problem.beta)
    shared.reduce = type("Two", (OneProcess,), {"size": 2, "alone": False})()
    refused(path, shared, certificate, "in this process")


def test_a_failed_write_leaves_the_old_file(path):
    problem, certificate = certified(SMALL)
    cvxlib.save_certificate(path, problem, certificate)
    before = path.read_bytes()
    too_high = dataclasses.replace(certificate, dual=certificate.primal * 1.01, primal=certificate.primal * 2)
    with pytest.raises(ValueError, match="no more than"):
        cvxlib.save_certificate(path, problem, too_high)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
