"""What is saved comes back, exactly; what is no whole file of ours is refused in one sentence; nothing in a file is executed."""

import json
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import safetensors.torch
import torch
from family import LOSSES, MIXERS, POOLS, activation_of, build, name, normal, program
from parts import Frozen, Ordinary, Picking, Scaled, Threshold

import cvxlib
from cvxlib.ground.tensor_files import CHECKSUM, KEY, _checksum
from cvxlib.workflow.storage import FORMAT


@pytest.fixture
def path(tmp_path):
    return tmp_path / "saved.safetensors"


@pytest.fixture
def saved(path):
    """A head and its file."""
    head = random_head(build(cvxlib.BlockFNO))
    cvxlib.save(path, head)
    return head


def random_head(mixer, kind="gated", pool="mean", dtype=torch.float64):
    return cvxlib.Head.random(mixer, activation_of(kind, mixer), 2, pool=pool, dtype=dtype)


def rewritten(path, change):
    """The file with its header (a dict) and its tensors changed, and a checksum of what they are now."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["cvxlib"])
    tensors = safetensors.torch.load_file(path)
    header = change(header, tensors) or header
    text = header if isinstance(header, str) else json.dumps(header)
    metadata = {KEY: text, CHECKSUM: _checksum(text, tensors)}
    safetensors.torch.save_file(tensors, path, metadata=metadata)


def in_format_1(path):
    """The file as it was written before classes had modules and files had checksums."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["cvxlib"])
    tensors = safetensors.torch.load_file(path)
    for part in ("mixer", "activation"):
        old = {"name": header[part]["class"].split(".")[-1], **header[part]["fields"]}
        if old.pop("directions", None):
            tensors["directions"] = tensors.pop("activation.directions")
        header[part] = old
    if "loss" in header:
        header["loss"] = header["loss"]["class"].split(".")[-1]
    safetensors.torch.save_file(tensors, path, metadata={KEY: json.dumps(header | {"format": 1})})


# there and back


@pytest.mark.parametrize("kind", ["linear", "gated"])
@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_a_head_comes_back(path, mixer, kind):
    head = random_head(mixer, kind, None, torch.float32)
    cvxlib.save(path, head)
    back = cvxlib.load(path)
    tokens = normal(3, 4, 2).float()
    assert type(back) is cvxlib.Head
    assert (back.mixer, back.pool, back.u.dtype) == (head.mixer, None, torch.float32)
    assert torch.equal(back(tokens), head(tokens))
    assert back.u.requires_grad


@pytest.mark.parametrize("pool", POOLS, ids=name)
@pytest.mark.parametrize("loss", LOSSES, ids=name)
@pytest.mark.parametrize("kind", ["linear", "gated"])
@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_a_solution_comes_back_and_can_be_audited(path, mixer, kind, loss, pool):
    solution = cvxlib.solve(program(mixer, kind, loss, pool), tol=1e-3)
    cvxlib.save(path, solution)
    back = cvxlib.load(path)
    assert (back.status, back.solver, back.evaluations) == (solution.status, solution.solver, solution.evaluations)
    # bounds are computed anew: the weaker of two that differ by rounding counts
    assert back.certificate.primal == pytest.approx(solution.certificate.primal, rel=1e-12)
    assert back.certificate.dual == pytest.approx(solution.certificate.dual, rel=1e-12)
    assert back.certificate.dual <= solution.certificate.dual and back.objective >= solution.objective
    assert torch.equal(back.history, solution.history)
    assert torch.equal(back.lifted, solution.lifted)
    assert repr(back.program) == repr(solution.program)
    audit = cvxlib.certify(back.program, back.head(), back.certificate.dual_point)
    assert audit.relative_gap <= 1.001e-3


def test_merged_gates_find_their_blocks_again(path):
    mixer = build(cvxlib.MLP)
    directions = cvxlib.GatedReLU.sample(mixer, count=3, seed=1).directions
    case = program(mixer, cvxlib.GatedReLU(torch.cat([directions[:1], directions])), fraction=0.05)
    solution = cvxlib.solve(case, tol=1e-6)
    assert len(case.operator.gate) == 3
    cvxlib.save(path, solution)
    assert torch.equal(cvxlib.load(path).head().gate, solution.head().gate)


def test_a_relu_head_and_solution_come_back(path):
    mixer = build(cvxlib.MLP)
    case = program(mixer, cvxlib.ReLU(limit=500), samples=3, fraction=0.3)
    solution = cvxlib.solve(case, tol=1e-3)
    cvxlib.save(path, solution)
    back = cvxlib.load(path)
    assert back.program.activation.limit == 500
    assert back.certificate.dual == pytest.approx(solution.certificate.dual, rel=1e-12)
    assert torch.equal(back.head()(case.tokens), solution.head()(case.tokens))
    cvxlib.save(path, solution.head())
    assert torch.equal(cvxlib.load(path)(case.tokens), solution.head()(case.tokens))


def test_an_empty_head_comes_back(path):
    case = program(build(cvxlib.MLP), fraction=2.0)
    cvxlib.save(path, cvxlib.solve(case))
    assert len(cvxlib.load(path).head()) == 0


def test_a_warm_start_from_a_file(path):
    case = program(build(cvxlib.SelfAttention), "gated")
    cvxlib.save(path, cvxlib.solve(case, tol=1e-6))
    again = cvxlib.solve(case, tol=1e-6, start=cvxlib.load(path))
    assert again.evaluations < cvxlib.solve(case, tol=1e-6).evaluations


@dataclass(frozen=True)
class Mine(cvxlib.MLP):
    """A mixer of one's own."""

    scale: int

    def hidden(self, tokens, u):
        return self.scale * super().hidden(tokens, u)


def test_a_mixer_of_ones_own_must_be_named_at_the_door(path):
    head = random_head(Mine(features=2, outputs=2, scale=3))
    cvxlib.save(path, head)
    with pytest.raises(ValueError, match=r"load\(path, parts=\[...\]\); got test_storage\.Mine$"):
        cvxlib.load(path)
    assert cvxlib.load(path, mixers=[Mine]).mixer == head.mixer
    assert cvxlib.load(path, parts=[Mine]).mixer == head.mixer


@dataclass(frozen=True)
class MLP(cvxlib.MLP):
    """Of the built-in one's name, but half as large."""

    def hidden(self, tokens, u):
        return super().hidden(tokens, u) / 2


@pytest.mark.parametrize(
    "mixer", [MLP(2, 2), Scaled(2, 2, torch.tensor([1.0, 3.0])), Picking(2, 2, (1,), 0.5)], ids=repr
)
def test_a_mixer_of_ones_own_never_comes_back_as_another(path, mixer):
    solution = cvxlib.solve(program(mixer, "gated"), tol=1e-4)
    for value in (solution, solution.head()):
        cvxlib.save(path, value)
        with pytest.raises(ValueError, match=rf"given in load\(path, parts=\[...\]\); got .*{type(mixer).__name__}$"):
            cvxlib.load(path)
        with pytest.raises(ValueError, match="got .*" + type(mixer).__name__):
            cvxlib.load(path, parts=[cvxlib.MLP, Mine])
        back = cvxlib.load(path, parts=[type(mixer)])
        head = back if isinstance(back, cvxlib.Head) else back.head()
        assert type(head.mixer) is type(mixer) and head.mixer == mixer and hash(head.mixer) == hash(mixer)
        tokens = normal(3, 4, 2)
        assert torch.equal(head(tokens), solution.head()(tokens))


@pytest.mark.parametrize("loss", [Frozen(9.0), Ordinary(9.0)], ids=repr)
def test_a_loss_and_an_activation_of_ones_own_come_back(path, loss):
    solution = cvxlib.solve(program(build(cvxlib.MLP), Threshold(-0.5), loss), tol=1e-4)
    cvxlib.save(path, solution)
    with pytest.raises(ValueError, match=r"an activation of this package, or one given in .*Threshold"):
        cvxlib.load(path, parts=[type(loss)])
    with pytest.raises(ValueError, match=f"a loss of this package, or one given in .*{type(loss).__name__}"):
        cvxlib.load(path, parts=[Threshold])
    back = cvxlib.load(path, parts=[type(loss), Threshold])
    assert back.program.loss == loss and back.program.activation == Threshold(-0.5)
    assert back.certificate.relative_gap <= 1.001e-4


class Late(cvxlib.MLP):
    """Something in it is not given to its constructor."""

    def __init__(self, features, outputs):
        super().__init__(features, outputs)
        object.__setattr__(self, "late", torch.rand(3))


@dataclass(frozen=True)
class Holding(cvxlib.MLP):
    """Something in it is no number, string or tensor."""

    what: object = None


@pytest.mark.parametrize(
    "mixer, word",
    [
        (Late(2, 2), "not make anew from its fields"),
        (Holding(2, 2, print), "one whose mixer.what is builtin"),
        (Holding(2, 2, {1, 2}), "one whose mixer.what is set"),
        (Holding(2, 2, ({1: 2},)), "one whose mixer.what.0 is dict"),
    ],
    ids=range(4),
)
def test_what_a_file_cannot_hold_is_not_written(path, mixer, word):
    with pytest.raises(ValueError, match=f"value: expected a mixer of numbers, strings and tensors; got .*{word}"):
        cvxlib.save(path, random_head(mixer, "linear"))
    assert not path.exists()


FIELDS = {
    "numbers": (1, -2.5, True, None, "text"),
    "infinite": (float("inf"), float("-inf"), float("nan")),
    "nested": ((1, [2, (3,)]), {"a": (4,), "b": {}}),
    "tensors": (torch.ones(2, 2), [torch.arange(3)], torch.ones((), dtype=torch.bfloat16)),
    "arrays": np.ones((2, 3), dtype=np.float32),
    "types": (torch.float32, torch.int64),
    "parts": cvxlib.GatedReLU(torch.ones(1, 2)),
}


@pytest.mark.parametrize("what", FIELDS)
def test_every_field_that_is_written_comes_back(path, what):
    head = random_head(Holding(2, 2, FIELDS[what]), "linear")
    cvxlib.save(path, head)
    back = cvxlib.load(path, parts=[Holding]).mixer
    assert back == head.mixer and type(back.what) is type(FIELDS[what])


@pytest.mark.parametrize("kind", [int, dict, "MLP", cvxlib.Head])
def test_parts_are_classes_of_parts(path, saved, kind):
    with pytest.raises(ValueError, match="parts: expected classes of mixers, activations and losses"):
        cvxlib.load(path, parts=[kind])
    with pytest.raises(ValueError, match="mixers: expected classes of mixers"):
        cvxlib.load(path, mixers=[cvxlib.Linear])


# files of the first form


@pytest.mark.parametrize("kind", ["linear", "gated", "relu"])
@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_a_file_of_the_first_form(path, loss, kind):
    activation = cvxlib.ReLU(limit=500) if kind == "relu" else kind
    solution = cvxlib.solve(program(build(cvxlib.MLP), activation, loss, samples=3, fraction=0.3), tol=1e-3)
    for value in (solution, solution.head()):
        cvxlib.save(path, value)
        in_format_1(path)
        back = cvxlib.load(path)
        head = back if isinstance(back, cvxlib.Head) else back.head()
        assert (head.mixer, head.activation) == (solution.program.mixer, solution.program.activation)
        assert torch.equal(head(solution.program.tokens), solution.head()(solution.program.tokens))
    cvxlib.save(path, solution)
    in_format_1(path)
    assert cvxlib.load(path).certificate.dual == pytest.approx(solution.certificate.dual, rel=1e-12)


def test_a_file_of_the_first_form_names_only_what_is_built_in(path):
    cvxlib.save(path, random_head(Mine(features=2, outputs=2, scale=3)))
    in_format_1(path)
    with pytest.raises(ValueError, match=r"a mixer of this package.* got cvxlib\.Mine"):
        cvxlib.load(path, parts=[Mine])


def test_a_file_of_the_first_form_cannot_lie_about_its_bounds(path):
    cvxlib.save(path, cvxlib.solve(program(build(cvxlib.MLP)), tol=1e-3))
    rewritten(path, lambda header, tensors: header | {"dual": header["primal"]})
    in_format_1(path)
    with pytest.raises(ValueError, match="its network and its dual point give"):
        cvxlib.load(path)


def test_no_file_of_another_form_goes_without_a_checksum(path, saved):
    in_format_1(path)
    text = path.read_bytes().replace(b'\\"format\\": 1', b'\\"format\\": 2')
    assert text != path.read_bytes()
    path.write_bytes(text)
    with pytest.raises(ValueError, match="its checksum does not agree"):
        cvxlib.load(path)


def test_the_version_and_configuration_are_legible(path, saved):
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["cvxlib"])
    assert (header["format"], header["version"], header["kind"]) == (FORMAT, cvxlib.__version__, "head")
    sizes = {"tokens": 4, "features": 2, "outputs": 2, "blocks": 2}
    assert header["mixer"] == {"class": "cvxlib.BlockFNO", "fields": sizes}


# what is not ours


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(path, saved, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        ValueError, match=r"expected a whole file written by cvxlib\.save; got a truncated or foreign one"
    ) as caught:
        cvxlib.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x00" * 64, pickle.dumps({"u": 1}), b"PK\x03\x04" + bytes(100)], ids=range(5)
)
def test_a_foreign_file(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="got a truncated or foreign one"):
        cvxlib.load(path)


def test_a_pickle_is_not_executed(path):
    marker = path.with_name("executed")

    class Attack:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    for write in (lambda: path.write_bytes(pickle.dumps(Attack())), lambda: torch.save(Attack(), path)):
        write()
        with pytest.raises(ValueError, match="got a truncated or foreign one"):
            cvxlib.load(path)
    assert not marker.exists()


def test_safetensors_of_another_origin(path):
    safetensors.torch.save_file({"u": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="got a safetensors file of another origin"):
        cvxlib.load(path)


def test_no_file(path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        cvxlib.load(path)


def changed(header, **fields):
    """The header with other fields of the mixer."""
    return header | {"mixer": {"class": header["mixer"]["class"], "fields": header["mixer"]["fields"] | fields}}


CHANGES = {
    "damaged header": lambda header, tensors: "{",
    "one with a damaged header": lambda header, tensors: "[]",
    "a damaged header .maximum recursion": lambda header, tensors: "[" * 100_000,
    "does not say its format": lambda header, tensors: "{}",
    "format 99, by cvxlib": lambda header, tensors: header | {"format": 99},
    "got nn.Module": lambda header, tensors: header | {"mixer": {"class": "nn.Module", "fields": {}}},
    "a mixer of this package": lambda header, tensors: header | {"mixer": {"class": "cvxlib.Mixer", "fields": {}}},
    "a mixer of this package.*got cvxlib.Linear": lambda header, tensors: (
        header | {"mixer": {"class": "cvxlib.Linear", "fields": {}}}
    ),
    "an activation of this package": lambda header, tensors: (
        header | {"activation": {"class": "os.system", "fields": {}}}
    ),
    "fit together .TypeError: string": lambda header, tensors: header | {"mixer": "cvxlib.MLP"},
    "fit together .ValueError: a field of the unknown": lambda header, tensors: changed(header, tokens={"pickle": ""}),
    "fit together .KeyError: 'other'": lambda header, tensors: changed(header, tokens={"tensor": "other"}),
    "fit together .KeyError: 'mixer'": lambda header, tensors: {k: v for k, v in header.items() if k != "mixer"},
    "fit together .KeyError: 'song'": lambda header, tensors: header | {"kind": "song"},
    "fit together .KeyError: 'u'": lambda header, tensors: tensors.__delitem__("u"),
    "fit together .ValueError: v: expected shape": lambda header, tensors: tensors.update(v=tensors["v"][:1].clone()),
    "fit together .ValueError: gate: expected indices 0 to 1": lambda header, tensors: tensors.update(
        gate=tensors["gate"] + 7
    ),
    "fit together .TypeError": lambda header, tensors: changed(header, cost=1),
    "fit together .ValueError: outputs": lambda header, tensors: changed(header, outputs=-2),
    "fit together .ValueError: pool": lambda header, tensors: header | {"pool": "max"},
}


@pytest.mark.parametrize("sentence", CHANGES)
def test_a_file_that_does_not_fit_together(path, saved, sentence):
    rewritten(path, CHANGES[sentence])
    with pytest.raises(ValueError, match=sentence) as caught:
        cvxlib.load(path)
    assert str(path) in str(caught.value)


def test_a_solution_whose_factors_do_not_fit(path):
    cvxlib.save(path, cvxlib.solve(program(build(cvxlib.MLP), "gated")))
    rewritten(path, lambda header, tensors: tensors.update(block=tensors["block"] + 99))
    with pytest.raises(ValueError, match="does not fit together"):
        cvxlib.load(path)


# writing


@pytest.mark.parametrize("value", [None, {"u": 1}, torch.nn.Linear(2, 2)])
def test_what_is_neither_is_not_saved(path, value):
    with pytest.raises(TypeError, match=r"value: expected a cvxlib\.Head or a cvxlib\.Solution"):
        cvxlib.save(path, value)
    assert not path.exists()


def test_an_interrupted_write_leaves_the_old_file(path, saved, monkeypatch):
    before = path.read_bytes()

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        cvxlib.save(path, random_head(build(cvxlib.MLP)))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_replaced(path, saved):
    head = random_head(build(cvxlib.MLP))
    cvxlib.save(path, head)
    assert cvxlib.load(path).mixer == head.mixer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_from_and_to_a_gpu(path):
    head = random_head(build(cvxlib.SelfAttention)).cuda()
    cvxlib.save(path, head)
    assert cvxlib.load(path).u.device.type == "cpu"
    assert cvxlib.load(path, device="cuda").u.device.type == "cuda"
