"""Parts are values: equal when class and fields are, in memory, in checkpoints, in audits and after copies; and programs own their data."""

import copy
import enum
import functools
import pickle

import numpy as np
import pytest
import torch
from family import MIXERS, build, name, normal, program
from parts import Frozen, Ordinary, Picking, Scaled, Threshold

import cvxlib
from cvxlib.ground.identity import Part, fields, fingerprint, qualified
from cvxlib.operators.projections import GraphProjection
from cvxlib.solvers.cost import gram_side
from cvxlib.testing import check_mixer


def weighed(loss, seed=0):
    mixer = build(cvxlib.MLP)
    tokens, targets = normal(6, 4, 2, seed=seed), normal(6, 2, seed=seed + 1)
    return cvxlib.ConvexProgram(mixer, cvxlib.Linear(), loss, tokens, targets, 0.05)


# equality, hash, and what they rest on

ONE = torch.tensor([1.0, 2.0], dtype=torch.float64)

PAIRS = {
    "losses with an attribute": (lambda: Ordinary(2.0), lambda: Ordinary(3.0)),
    "losses with a field": (lambda: Frozen(2.0), lambda: Frozen(3.0)),
    "losses of two classes": (lambda: Frozen(2.0), lambda: Ordinary(2.0)),
    "the package's losses": (cvxlib.SquaredLoss, cvxlib.CrossEntropy),
    "activations": (lambda: Threshold(0.0), lambda: Threshold(1.5)),
    "directions": (lambda: cvxlib.GatedReLU(torch.ones(1, 2)), lambda: cvxlib.GatedReLU(torch.tensor([[1.0, 2.0]]))),
    "directions of two types": (
        lambda: cvxlib.GatedReLU(torch.ones(1, 2)),
        lambda: cvxlib.GatedReLU(torch.ones(1, 2, dtype=torch.float64)),
    ),
    "mixers with a tensor": (lambda: Scaled(2, 2, ONE.clone()), lambda: Scaled(2, 2, ONE + 1)),
    "mixers with a tuple": (lambda: Picking(2, 2, (0, 1)), lambda: Picking(2, 2, (0,))),
    "mixers with a number": (lambda: Picking(2, 2, scale=0.5), lambda: Picking(2, 2, scale=0.25)),
    "sizes": (lambda: cvxlib.MLP(2, 2), lambda: cvxlib.MLP(2, 3)),
    "a class and its own subclass": (lambda: cvxlib.MLP(2, 2), lambda: Picking(2, 2)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_parts_are_equal_when_class_and_fields_are(pair):
    one, other = PAIRS[pair]
    assert one() == one() and hash(one()) == hash(one()) and fingerprint(one()) == fingerprint(one())
    assert one() != other() and fingerprint(one()) != fingerprint(other())
    assert len({one(), one(), other()}) == 2
    assert one() != "another thing"


@pytest.mark.parametrize("pair", PAIRS)
def test_parts_survive_copies_and_pickles(pair):
    for part in (make() for make in PAIRS[pair]):
        for again in (copy.copy(part), copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
            assert again == part and hash(again) == hash(part) and repr(again) == repr(part)


def test_parts_are_frozen_and_their_tensors_are_their_own():
    mine, scale = torch.ones(1, 2), ONE.clone()
    gates, mixer = cvxlib.GatedReLU(mine), Scaled(2, 2, scale)
    mine.mul_(-1)
    scale.mul_(5)
    assert torch.equal(gates.directions, torch.ones(1, 2)) and torch.equal(mixer.scale, ONE)
    array = np.ones((1, 2))
    gates = cvxlib.GatedReLU(array)
    array[:] = -1
    assert bool((gates.directions == 1).all())
    for part, attribute in ((gates, "directions"), (cvxlib.ReLU(), "limit"), (cvxlib.SquaredLoss(), "smoothness")):
        with pytest.raises(AttributeError):
            setattr(part, attribute, 3)


def test_a_mixer_with_other_fields_than_whole_numbers_is_sound():
    for mixer in (Scaled(2, 2, ONE), Picking(2, 2, (1,), 0.5)):
        check_mixer(mixer, normal(4, 3, 2))
    with pytest.raises(TypeError, match="features: expected a whole number"):
        Picking(2.5, 2)


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Slots:
    __slots__ = ("one", "other")

    def __init__(self, one):
        self.one = one


class Cached(Part):
    def __init__(self, x):
        self.x = x

    @functools.cached_property
    def square(self):
        return self.x**2


def adding(amount):
    return lambda x: x + amount


def holding_itself():
    loop = [1]
    loop.append(loop)
    return loop


DIFFERENT = [
    None,
    True,
    1,
    1.0,
    1j,
    "1",
    b"1",
    float("inf"),
    (),
    (1,),
    [1],
    (1, (2,)),
    ((1,), 2),
    {1: 2},
    {2: 1},
    {1},
    frozenset({1}),
    np.ones(2),
    np.ones((2, 1)),
    np.ones(2, dtype=np.float32),
    np.array([1, None], dtype=object),
    torch.ones(2),
    torch.ones(2, 1),
    torch.ones(2, dtype=torch.bfloat16),
    torch.ones((), dtype=torch.float64),
    torch.ones(0, 2),
    torch.ones(0, 3),
    torch.float32,
    torch.float64,
    Colour.RED,
    Colour.BLUE,
    Colour,
    Slots(1),
    Slots(2),
    adding(1),
    adding(2),
    lambda x: x - 1,
    functools.partial(adding, 1),
    functools.partial(adding, 2),
    torch.relu,
    torch.sin,
    holding_itself(),
    cvxlib.Linear(),
]


def test_different_values_have_different_fingerprints():
    found = [fingerprint(value) for value in DIFFERENT]
    assert len(set(found)) == len(DIFFERENT)
    assert [fingerprint(value) for value in DIFFERENT] == found
    assert fingerprint(1, 2) != fingerprint((1, 2)) != fingerprint([1, 2])
    assert fingerprint({1: 2, 3: 4}) == fingerprint({3: 4, 1: 2})
    assert fingerprint(np.float64(0.5), np.int64(3)) == fingerprint(0.5, 3)


def test_how_a_tensor_lies_in_memory_plays_no_part():
    x = normal(5000, 3)
    parts = (x, x.mT.contiguous().mT, x.clone().requires_grad_(), torch.stack([x, x])[0])
    assert len({fingerprint(part) for part in parts}) == 1
    assert fingerprint(x.to_sparse()) == fingerprint(x)


def test_caches_play_no_part():
    part = Cached(3)
    before = fingerprint(part)
    assert part.square == 9 and vars(part) == {"x": 3, "square": 9}
    assert fields(part) == {"x": 3} and fingerprint(part) == before and repr(part) == "Cached(x=3)"


def test_a_fields_own_word_on_comparison_counts():
    assert cvxlib.ReLU(limit=5) == cvxlib.ReLU(limit=6)  # the same network


def test_what_shows_no_value_has_no_fingerprint():
    with pytest.raises(TypeError, match="fingerprint: expected values with fields"):
        fingerprint(x for x in ())


def test_qualified_names():
    assert qualified(Frozen) == "parts.Frozen"
    assert qualified(cvxlib.MLP) == "cvxlib.MLP" and qualified(cvxlib.GatedReLU) == "cvxlib.GatedReLU"
    kinds, waiting = set(), [Part]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        kinds |= {kind} if kind.__module__.startswith("cvxlib.") else set()
    assert len({qualified(kind) for kind in kinds}) == len(kinds) > 12


# checkpoints and the audit


@pytest.mark.parametrize("kind", [Ordinary, Frozen])
@pytest.mark.parametrize("solver", ["splitting", "proximal"])
def test_a_checkpoint_of_another_loss_is_refused(tmp_path, kind, solver):
    file = tmp_path / "solve"
    cvxlib.solve(weighed(kind(9.0)), solver=solver, checkpoint=file)
    with pytest.raises(ValueError, match=r"checkpoint: expected the file of an earlier solve of this program"):
        cvxlib.solve(weighed(kind(1.0)), solver=solver, checkpoint=file)
    again = cvxlib.solve(weighed(kind(9.0)), solver=solver, checkpoint=file)
    assert again.status is cvxlib.Status.CERTIFIED


@pytest.mark.parametrize("kind", [Ordinary, Frozen])
def test_points_of_another_loss_are_refused(tmp_path, kind):
    cvxlib.path(weighed(kind(9.0)), betas=[0.1, 0.05], checkpoint=tmp_path)
    with pytest.raises(ValueError, match="checkpoint: expected a folder with points of this program"):
        cvxlib.path(weighed(kind(1.0)), betas=[0.1, 0.05], checkpoint=tmp_path)
    assert len(cvxlib.path(weighed(kind(9.0)), betas=[0.1, 0.05], checkpoint=tmp_path)) == 2


@pytest.mark.parametrize("pair", ["activations", "directions", "mixers with a tensor", "mixers with a tuple"])
def test_a_head_of_another_part_is_not_certified(pair):
    one, other = (make() for make in PAIRS[pair])
    mixers = [part if isinstance(part, cvxlib.Mixer) else cvxlib.MLP(2, 2) for part in (one, other)]
    gates = [part if isinstance(part, cvxlib.Activation) else cvxlib.Linear() for part in (one, other)]
    case = program(mixers[0], gates[0])
    mine = cvxlib.Head.random(mixers[0], gates[0], 2)
    assert cvxlib.certify(case, mine).gap >= 0
    with pytest.raises(ValueError, match="head: expected"):
        cvxlib.certify(case, cvxlib.Head.random(mixers[1], gates[1], 2))


# data of one's own


@pytest.mark.parametrize("of", [torch.from_numpy, np.asarray], ids=["torch", "numpy"])
@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_a_program_is_about_the_data_that_it_was_given(of, loss):
    mixer = build(cvxlib.SelfAttention)
    tokens = normal(6, 4, 2).numpy()
    targets = normal(6, 2, seed=1).numpy() if loss == "squared" else np.arange(6) % 2
    losses = {"squared": cvxlib.SquaredLoss(), "cross-entropy": cvxlib.CrossEntropy()}

    def build_program(tokens, targets):
        return cvxlib.ConvexProgram(mixer, cvxlib.Linear(), losses[loss], of(tokens), of(targets), 0.05)

    case = build_program(tokens, targets)
    twin = build_program(tokens.copy(), targets.copy())
    tokens *= 0.5
    targets[:] = targets[::-1].copy()
    solution, expected = cvxlib.solve(case, tol=1e-6), cvxlib.solve(twin, tol=1e-6)
    assert solution.certificate == expected.certificate
    audit = cvxlib.certify(twin, solution.head(), solution.certificate.dual_point)
    assert audit.primal == pytest.approx(solution.objective, rel=1e-9) and audit.relative_gap <= 2e-6


def test_without_a_copy_a_change_in_place_is_refused():
    tokens, targets = normal(6, 4, 2), normal(6, 2, seed=1)
    parts = (build(cvxlib.MLP), cvxlib.Linear(), cvxlib.SquaredLoss())
    for changed, word in ((tokens, "tokens"), (targets, "targets")):
        case = cvxlib.ConvexProgram(*parts, tokens, targets, 0.05, copy=False)
        assert case.tokens.data_ptr() == tokens.data_ptr()
        solution = cvxlib.solve(case, tol=1e-6)
        twins = copy.deepcopy(case), pickle.loads(pickle.dumps(case))
        changed.mul_(0.5)
        for refused in (
            lambda case=case: cvxlib.solve(case),
            lambda case=case: cvxlib.solve(case.with_beta(0.1)),
            lambda case=case, solution=solution: cvxlib.certify(case, solution.head()),
            lambda case=case: case.beta_max(),
        ):
            with pytest.raises(ValueError, match=rf"{word}: expected the data that .* changed in place 1 times"):
                refused()
        for twin in twins:  # which have data of their own
            assert cvxlib.solve(twin, tol=1e-6).certificate == solution.certificate


def test_a_memory_map_is_not_copied(tmp_path):
    np.save(tmp_path / "tokens.npy", normal(6, 4, 2).numpy())
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r+")
    parts = (build(cvxlib.MLP), cvxlib.Linear(), cvxlib.SquaredLoss())
    targets = normal(6, 2, seed=1)
    case = cvxlib.ConvexProgram(*parts, mapped, targets, 0.05)
    assert np.shares_memory(case.tokens.numpy(), mapped)
    assert not np.shares_memory(cvxlib.ConvexProgram(*parts, mapped, targets, 0.05, copy=True).tokens.numpy(), mapped)
    with pytest.raises(TypeError, match="copy: expected True, False or None"):
        cvxlib.ConvexProgram(*parts, mapped, targets, 0.05, copy="yes")


# copies of programs


def gram(block, processes):
    """The shape of the Gram matrix that is factored for a block."""
    return tuple(GraphProjection(block, processes).gram.shape)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("mixer", [m for m in MIXERS if type(m) in (cvxlib.SelfAttention, cvxlib.MLP)], ids=name)
@pytest.mark.parametrize("kind", ["linear", "gated"])
def test_a_copied_program_solves_by_the_same_steps(mixer, kind, used):
    case = program(mixer, kind, samples=3)
    solution = cvxlib.solve(case, tol=1e-6, solver="splitting")
    if not used:
        case = program(mixer, kind, samples=3)
    for again in (copy.deepcopy(case), pickle.loads(pickle.dumps(case))):
        assert gram_side(again) == gram_side(case)
        assert [gram(block, again.operator.reduce) for block in again.operator.maps] == [
            gram(block, case.operator.reduce) for block in case.operator.maps
        ]
        other = cvxlib.solve(again, tol=1e-6, solver="splitting")
        assert other.certificate == solution.certificate and other.evaluations == solution.evaluations
        assert torch.equal(other.lifted, solution.lifted)
    back = pickle.loads(pickle.dumps(solution))
    assert back.certificate == solution.certificate and torch.equal(back.lifted, solution.lifted)
