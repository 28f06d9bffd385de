"""Data sets of images: downloads that resume and are checked, CIFAR's binary format, image folders and archives of them."""

import hashlib
import http.server
import io
import os
import pickle
import shutil
import socket
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchvision")
from PIL import Image

from cvxlib.vision import cache_folder, images
from cvxlib.vision.archives import extract, obtain
from cvxlib.vision.datasets import CIFAR, read_cifar

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


def one_sentence(error: pytest.ExceptionInfo, *words: object) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert not [str(word) for word in words if str(word) not in text], text


# ---- downloads


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; ``ranges`` off ignores the header Range, ``shift`` answers with another one, ``stop`` breaks off there."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.shift, self.stop = CONTENT, True, 0, None
        self.asked = []  # the header Range of every request

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/data.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        content, start = self.server.content, 0
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) + self.server.shift
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "data.tar.gz"


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def write_part(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    part_of(path).write_bytes(content)


def test_a_download_happens_once(server, path):
    for _ in range(2):
        assert obtain(server.url, path, MD5).read_bytes() == CONTENT
    assert server.asked == [None]
    assert os.listdir(path.parent) == [path.name]


def test_half_a_download_is_continued(server, path):
    server.stop = 100_000
    with pytest.raises(ConnectionError) as error:
        obtain(server.url, path, MD5)
    one_sentence(error, server.url, path, "100000 of 300000")
    assert not path.exists()
    server.stop = None
    assert obtain(server.url, path, MD5).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-"]


def test_a_server_without_ranges_sends_everything_again(server, path):
    write_part(path, b"something else")
    server.ranges = False
    assert obtain(server.url, path, MD5).read_bytes() == CONTENT
    assert server.asked == ["bytes=14-"]


def test_a_server_that_sends_another_range_is_not_believed(server, path):
    write_part(path, CONTENT[:1000])
    server.shift = 7
    with pytest.raises(ConnectionError, match="another range"):
        obtain(server.url, path, MD5)
    assert part_of(path).read_bytes() == CONTENT[:1000]


def test_too_long_a_part_is_given_up(server, path):
    write_part(path, CONTENT + b"more")
    assert obtain(server.url, path, MD5).read_bytes() == CONTENT
    assert server.asked == ["bytes=300004-", None]


def test_a_whole_part_needs_no_network(path):
    write_part(path, CONTENT)
    assert obtain("http://127.0.0.1:1/never.tar.gz", path, MD5).read_bytes() == CONTENT


@pytest.mark.parametrize("start", [b"", b"broken"])
def test_a_wrong_checksum_leaves_nothing(server, path, start):
    write_part(path, start)
    server.content = CONTENT if start else CONTENT[:-1] + b"!"
    with pytest.raises(ValueError) as error:
        obtain(server.url, path, MD5)
    one_sentence(error, server.url, path, MD5, "run again")
    assert os.listdir(path.parent) == []


def test_no_network_is_one_sentence(path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:  # bound, but nobody listens: the connection is refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/data.tar.gz"
        with pytest.raises(ConnectionError) as error:
            obtain(url, path, MD5)
    one_sentence(error, url, path, "refused", "by hand")


def test_a_silent_server_is_left(path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(ConnectionError, match="timed out"):
            obtain(f"http://127.0.0.1:{silent.getsockname()[1]}/data.tar.gz", path, MD5, timeout=0.1)


def test_a_missing_page_is_one_sentence(server, path):
    server.content, server.stop = b"", 0
    write_part(path, b"")
    server.RequestHandlerClass = type("Missing", (Handler,), {"do_GET": lambda self: self.send_error(404)})
    with pytest.raises(ConnectionError, match="404"):
        obtain(server.url, path, MD5)


def test_a_truncated_file_is_refused(path):
    path.parent.mkdir()
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError) as error:
        obtain("https://example.org/data.tar.gz", path, MD5)
    one_sentence(error, path, "https://example.org/data.tar.gz", "delete")
    assert path.read_bytes() == CONTENT[:-1]  # the user's file is the user's


@pytest.mark.parametrize("name", CIFAR)
def test_the_official_archive_can_be_put_by_hand(name, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        images(name, cache=tmp_path, download=False)
    one_sentence(error, CIFAR[name].url, tmp_path / Path(CIFAR[name].url).name, "by hand")


# ---- CIFAR


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def write_cifar(path: Path, name: str, **changed: bytes) -> tuple[np.ndarray, list[int]]:
    """A small archive in the official format; the pixels (n, row, column, colour) and labels of its training images."""
    spec, rng = CIFAR[name], np.random.default_rng(1)
    pixels = rng.integers(0, 256, (len(spec.train) * 2 + 1, 32, 32, 3), np.uint8)
    labels = [k % 3 for k in range(len(pixels))]
    records = [
        bytes([9] * (spec.label_bytes - 1) + [label]) + image.transpose(2, 0, 1).tobytes()
        for image, label in zip(pixels, labels, strict=True)
    ]
    members = {member: b"".join(records[2 * k : 2 * k + 2]) for k, member in enumerate(spec.train)}
    members |= {spec.test: records[-1], spec.names: b"ant\nbee\ncow\n\n"}
    write_tar(path, {"readme.html": b"", **members, **changed})
    return pixels, labels


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_by_name(name, server, tmp_path, monkeypatch):
    pixels, labels = write_cifar(tmp_path / "small.tar.gz", name)
    server.content = (tmp_path / "small.tar.gz").read_bytes()
    md5 = hashlib.md5(server.content).hexdigest()
    monkeypatch.setitem(CIFAR, name, replace(CIFAR[name], url=server.url, md5=md5))
    monkeypatch.setenv("CVXLIB_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    split = images(name)
    assert split.classes == ("ant", "bee", "cow") and split.fingerprint == md5
    assert len(split.train) == len(labels) - 1 and len(split.test) == 1
    found = [split.train[i] for i in range(len(split.train))] + [split.test[0]]
    assert [label for _, label in found] == labels and type(found[0][1]) is int
    assert all(image.mode == "RGB" for image, _ in found)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image, _ in found]), pixels)
    images(name)
    assert len(server.asked) == 1


def test_cifar_archives_that_are_not_right(tmp_path):
    path, spec = tmp_path / "small.tar.gz", CIFAR["cifar100"]
    write_cifar(path, "cifar100", **{spec.test: bytes(3073)})
    with pytest.raises(ValueError, match=r"test.bin .* records of 3074 bytes"):
        read_cifar(spec, path)
    write_cifar(path, "cifar100", **{spec.train[0]: bytes([0, 3]) + bytes(3072)})
    with pytest.raises(ValueError, match=r"train.bin .* labels below 3; got 3"):
        read_cifar(spec, path)
    write_tar(path, {spec.names: b"ant\n", spec.test: bytes(3074)})
    with pytest.raises(ValueError, match=r"no member cifar-100-binary/train.bin"):
        read_cifar(spec, path)


# ---- folders and archives of them

CLASSES = ("bee", "cow")


@pytest.fixture
def folder(tmp_path):
    """Two classes, three training images and one test image each, in three formats and modes; item i has brightness 10 i."""
    root = tmp_path / "set"
    for part, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                mode, suffix = (("L", "png"), ("RGB", "bmp"), ("P", "png"))[k]
                image = Image.new("L", (4, 4), 10 * (label * count + k)).convert(mode)
                image.save(root / part / name / f"{k}.{suffix}")
    return root


def check(split):
    assert split.classes == CLASSES
    assert [len(split.train), len(split.test)] == [6, 2]
    for i in range(6):
        image, label = split.train[i]
        assert (image.mode, image.getpixel((0, 0)), label) == ("RGB", (10 * i,) * 3, i // 3)


def pack(folder: Path, kind: str, inner: str = "") -> Path:
    """An archive of the folder's content, below ``inner``."""
    path = folder.parent / f"packed.{kind}"
    files = [(file, Path(inner) / file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file, name in files:
                archive.write(file, name)
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            for file, name in files:
                archive.add(file, name)
    return path


def test_a_folder(folder):
    check(images(folder))
    check(images(str(folder.parent)))  # the only folder in it that has both parts
    check(pickle.loads(pickle.dumps(images(folder))))  # what workers of a DataLoader get


def test_files_that_are_no_images_are_left_out(folder):
    (folder / "train" / "cow" / "notes.txt").write_text("no image")
    (folder / "train" / "cow" / "._0.png").write_text("what macOS puts beside an image")
    check(images(folder))


@pytest.mark.parametrize("inner", ["", "some/"])
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_an_archive_is_unpacked_once(folder, tmp_path, kind, inner):
    path, cache = pack(folder, kind, inner), tmp_path / "cache"
    split = images(path, cache=cache)
    check(split)
    (unpacked,) = (cache / "images").iterdir()
    before = unpacked.stat()
    again = images(path.rename(tmp_path / f"renamed.{kind}"), cache=cache)
    check(again)
    assert again.fingerprint == split.fingerprint
    assert list((cache / "images").iterdir()) == [unpacked]
    assert (unpacked.stat().st_ino, unpacked.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_fingerprint_is_that_of_names_and_contents(folder, tmp_path):
    first = images(folder).fingerprint
    assert images(shutil.copytree(folder, tmp_path / "copy" / "other")).fingerprint == first
    Image.new("L", (4, 4), 99).save(folder / "test" / "cow" / "0.png")
    second = images(folder).fingerprint
    (folder / "train" / "cow" / "0.png").rename(folder / "train" / "bee" / "9.png")
    assert len({first, second, images(folder).fingerprint}) == 3


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_a_damaged_archive_leaves_nothing(folder, tmp_path, kind):
    path = pack(folder, kind)
    whole = path.read_bytes()
    lengths = [0, 100, *range(512, len(whole.rstrip(b"\0")), 512), *([len(whole) - 1] if kind != "tar" else [])]
    flipped = [whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1 :] for k in (len(whole) // 2, len(whole) - 8)]
    for content in [whole[:length] for length in lengths] + (flipped if kind == "tar.gz" else []):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            images(path, cache=tmp_path / "cache")
        one_sentence(error, path, "a whole tar or zip archive")
        assert list((tmp_path / "cache" / "images").iterdir()) == []


@pytest.mark.parametrize("name", ["../outside.png", "train/../../../outside.png", "/outside.png"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_paths_that_lead_outside_are_refused(tmp_path, kind, name):
    path = tmp_path / f"evil.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"x")
    else:
        write_tar(path, {name: b"x"})
    with pytest.raises(ValueError) as error:
        extract(path, tmp_path / "cache" / "images")
    one_sentence(error, path, name)
    assert not list(tmp_path.rglob("outside.png")) and not Path("/outside.png").exists()
    assert list((tmp_path / "cache" / "images").iterdir()) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        member = tarfile.TarInfo("train/cow/0.png")
        member.type, member.linkname = kind, "1.png"
        archive.addfile(member)
    with pytest.raises(ValueError, match=r"regular files .* 'train/cow/0.png'"):
        extract(tmp_path / "evil.tar", tmp_path / "cache")


def test_an_interrupt_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            images(pack(folder, "tar"), cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "images").iterdir()) == []
    check(images(pack(folder, "tar"), cache=tmp_path / "cache"))


def test_another_process_may_be_faster(folder, tmp_path, monkeypatch):
    """The rename finds the folder there already, whole, because another process has put it there meanwhile."""
    path, rename = pack(folder, "tar"), os.rename

    def overtaken(source, target):
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr("os.rename", overtaken)
    check(images(path, cache=tmp_path / "cache"))
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 1


def test_what_is_wrong_with_a_folder_is_said(folder, tmp_path):
    shutil.rmtree(folder / "test" / "cow")
    with pytest.raises(ValueError) as error:
        images(folder)
    one_sentence(error, folder / "test", "no cow")
    path = pack(folder, "tar")
    with pytest.raises(ValueError) as error:
        images(path, cache=tmp_path / "cache")
    one_sentence(error, f"test in {path}", "no cow")
    (folder / "test" / "cow").mkdir()
    with pytest.raises(ValueError) as error:
        images(folder)
    one_sentence(error, folder / "test" / "cow", "at least one image")
    shutil.rmtree(folder / "test")
    with pytest.raises(ValueError) as error:
        images(folder)
    one_sentence(error, folder, "test/<class>")
    (folder / "test").mkdir()
    with pytest.raises(ValueError) as error:
        images(folder)
    one_sentence(error, folder / "test", "a folder for each class")


def test_an_unreadable_image_is_named_when_it_is_asked_for(folder):
    broken = folder / "train" / "cow" / "0.png"
    broken.write_bytes(broken.read_bytes()[:45])
    split = images(folder)
    split.train[2]
    with pytest.raises(ValueError) as error:
        split.train[3]
    one_sentence(error, broken, "a readable image")


def test_no_such_source(tmp_path):
    with pytest.raises(ValueError) as error:
        images(tmp_path / "missing")
    one_sentence(error, "cifar100", tmp_path / "missing")
    with pytest.raises(TypeError, match="source"):
        images(7)


def test_the_cache_is_the_users_by_default(monkeypatch):
    monkeypatch.delenv("CVXLIB_CACHE", raising=False)
    assert cache_folder().name == "cvxlib" and cache_folder().is_absolute()


@pytest.mark.skipif(
    "CVXLIB_TEST_IMAGES" not in os.environ, reason="CVXLIB_TEST_IMAGES names no archive of an image folder"
)
def test_a_real_archive():
    """Every class has training and test images, and every image of a sample can be read (unpacks into the user's cache)."""
    split = images(os.environ["CVXLIB_TEST_IMAGES"])
    for part in (split.train, split.test):
        assert set(part.targets) == set(range(len(split.classes)))
        for i in range(0, len(part), max(1, len(part) // 500)):
            image, label = part[i]
            assert image.mode == "RGB" and label == part.targets[i]
