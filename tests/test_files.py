"""Files are written whole or not at all, wherever they point; and one changed bit anywhere in one is noticed."""

import os
import resource
import stat
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from family import build, normal, program

import cvxlib
from cvxlib.ground.identity import fingerprint
from cvxlib.ground.provenance import write_json
from cvxlib.ground.tensor_files import CHECKSUM, KEY, Damaged, _checksum, read_tensors, replacing, write_tensors
from cvxlib.solvers._checkpoint import Checkpoint
from cvxlib.spatial.training import small_cnn, train_classifier


def write_solution(path):
    case = program(build(cvxlib.MLP), fraction=0.5)
    cvxlib.save(path, cvxlib.solve(case, tol=1e-2))


def write_network(path):
    images, labels = torch.rand(4, 3, 4, 4), torch.arange(4) % 2
    train_classifier(small_cnn(2, width=2), (images, labels), (images, labels), epochs=1, batch=4, checkpoint=path)


#: everything that writes a file, given its name
WRITERS = {
    "tensors": lambda path: write_tensors(path, {"x": normal(400)}, {"a": 1}),
    "json": lambda path: write_json(path, {"a": list(range(1000))}),
    "solution": write_solution,
    "checkpoint": lambda path: cvxlib.solve(program(build(cvxlib.MLP)), solver="splitting", checkpoint=path),
    "network": write_network,
}


@contextmanager
def files_of_at_most(size):
    """As if the disk were full after so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_old_file(tmp_path, writer):
    path = tmp_path / "file"
    for before in (None, b"before"):
        if before and writer in ("checkpoint", "network"):  # which read what is there
            continue
        if before:
            path.write_bytes(before)
        with files_of_at_most(256), pytest.raises(OSError):
            WRITERS[writer](path)
        assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_stays_and_its_target_is_replaced(tmp_path, writer):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    link.symlink_to(Path("elsewhere") / "target")
    WRITERS[writer](link)
    assert link.is_symlink() and target.is_file() and not target.is_symlink() and target.stat().st_size > 0
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_no_file_is_not_written_to(tmp_path, writer):
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (pipe, folder, Path("/dev/null")):
        with pytest.raises((ValueError, IsADirectoryError)):
            WRITERS[writer](path)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "pipe"] and not list(folder.iterdir())


def test_permissions_are_kept_and_new_files_have_the_usual_ones(tmp_path):
    path, usual = tmp_path / "file", tmp_path / "usual"
    usual.write_text("")
    write_json(path, {})
    assert path.stat().st_mode == usual.stat().st_mode
    path.chmod(0o640)
    write_json(path, {"a": 1})
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / ("long name " * 20)
    entered = threading.Barrier(2)

    def write(text):
        with replacing(path) as temporary:
            temporary.write_text(text)
            entered.wait()

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in ("one", "other") and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


# reading


def test_tensors_come_back(tmp_path):
    tensors = {
        "a": normal(3, 2),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "none": torch.zeros(0, 3),
        "number": torch.tensor(7),
        "yes": torch.tensor([True, False]),
        "transposed": normal(2, 3).mT,
    }
    write_tensors(tmp_path / "file", tensors, {"b": [1.5, None, "ü"]})
    back, header = read_tensors(tmp_path / "file")
    assert header == {"b": [1.5, None, "ü"]} and fingerprint(back) == fingerprint(tensors)


def forged(path, text, tensors, checksum=True):
    metadata = {KEY: text} | ({CHECKSUM: _checksum(text, tensors)} if checksum else {})
    safetensors.torch.save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("text", ["[" * 10**6, "{", "[]", "3", '{"a":' * 10**5, "9" * 10**5, "\ud7ff", ""])
def test_a_header_that_is_none_is_refused_by_the_files_name(tmp_path, text):
    path = tmp_path / "file"
    forged(path, text, {"x": torch.ones(1)})
    with pytest.raises(Damaged, match="file is damaged or foreign: one with a damaged header"):
        read_tensors(path)


def test_a_header_of_any_length_is_not_parsed(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_tensors(path, {}, {"a": "long" * 100})
    monkeypatch.setattr("cvxlib.ground.tensor_files.LONGEST_HEADER", 100)
    with pytest.raises(Damaged, match="damaged header"):
        read_tensors(path)


def test_a_file_without_a_checksum_is_refused(tmp_path):
    path = tmp_path / "file"
    forged(path, "{}", {"x": torch.ones(1)}, checksum=False)
    with pytest.raises(Damaged, match="its checksum does not agree"):
        read_tensors(path)
    assert read_tensors(path, unchecked=lambda header: header == {})[1] == {}


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nothing"):
        with pytest.raises(Damaged, match="no regular file"):
            read_tensors(path)


@pytest.mark.parametrize(
    "key", ["primal", "dual", "dtype", "status", "solver", "evaluations", "screened", "solved", "u"]
)
def test_a_point_that_lacks_something_is_refused_by_its_name(tmp_path, key):
    case = program(build(cvxlib.MLP))
    options = {"betas": [0.1, 0.05], "checkpoint": tmp_path}
    cvxlib.path(case, **options)
    file = tmp_path / "point-0001.safetensors"
    tensors, header = read_tensors(file)
    (tensors if key in tensors else header).pop(key)
    write_tensors(file, tensors, header)
    with pytest.raises(ValueError, match=rf"checkpoint: expected .*point-0001.safetensors, which does not .*'{key}'"):
        cvxlib.path(case, **options)


# one changed bit


def head_file(folder):
    path = folder / "head"
    cvxlib.save(path, cvxlib.Head.random(build(cvxlib.MLP), cvxlib.GatedReLU(torch.ones(1, 2)), 1))
    return path, lambda: _of_head(cvxlib.load(path))


def _of_head(head):
    return fingerprint(head.mixer, head.activation, head.pool, dict(head.state_dict()))


def solution_file(folder):
    path = folder / "solution"
    case = program(build(cvxlib.MLP), "linear", samples=2, fraction=0.5)
    cvxlib.save(path, cvxlib.solve(case, tol=1e-2, solver="proximal"))
    return path, lambda: _of_solution(cvxlib.load(path))


def _of_solution(solution):
    case, certificate = solution.program, solution.certificate
    parts = (case.mixer, case.activation, case.loss, case.pool, case.beta, case.tokens, case.targets)
    found = (solution.factors, certificate, certificate.dual_point, solution.status, solution.evaluations)
    return fingerprint(*parts, *found, solution.solver, solution.history)


def checkpoint_file(folder):
    path = folder / "checkpoint"
    case = program(build(cvxlib.MLP), "linear", samples=2, fraction=0.5)
    cvxlib.solve(case, tol=1e-2, solver="proximal", checkpoint=path)
    return path, lambda: fingerprint(Checkpoint(path, case, "proximal").read())


def point_file(folder):
    case = program(build(cvxlib.MLP), "linear", samples=2)
    options = {"betas": [0.5 * case.beta_max()], "tol": 1e-2, "checkpoint": folder / "path"}
    cvxlib.path(case, **options)
    return folder / "path" / "point-0000.safetensors", lambda: _of_solution(cvxlib.path(case, **options).solutions[0])


@pytest.mark.parametrize("make", [head_file, solution_file, checkpoint_file, point_file])
def test_one_changed_bit_is_refused_or_harmless(tmp_path, make):
    path, read = make(tmp_path)
    whole, expected = path.read_bytes(), read()
    refused = 0
    for place in range(len(whole)):
        flip = 1 << (place % 8) if place % 3 else 0xFF
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        try:
            assert read() == expected, f"byte {place} of {len(whole)} changed, unnoticed"
        except ValueError as error:
            assert path.name in str(error)
            refused += 1
    assert refused > 0.95 * len(whole)


def test_what_a_file_says_of_its_bounds_is_computed_anew(tmp_path):
    path, _ = solution_file(tmp_path)
    solution = cvxlib.load(path)
    tensors, header = read_tensors(path)
    for change in ({"dual": 2 * header["dual"]}, {"primal": header["primal"] / 2}, {"dual": float("inf")}):
        write_tensors(path, tensors, header | change)
        with pytest.raises(ValueError, match="but its network and its dual point give"):
            cvxlib.load(path)
    write_tensors(path, tensors | {"dual_point": 2 * tensors["dual_point"]}, header)  # scaled back to feasibility
    assert cvxlib.load(path).certificate.dual <= solution.certificate.dual
    write_tensors(path, tensors, header | {"dual": None, "primal": 2 * header["primal"]})  # weaker, but true
    assert cvxlib.load(path).certificate.primal == 2 * header["primal"]
