"""Labelled images: CIFAR-10 and CIFAR-100 as published, any folder of images, any archive of one."""

from __future__ import annotations

import hashlib
import importlib
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from cvxlib.ground.checks import instance, needs_extra, require, wrong_value
from cvxlib.vision.archives import checksum, extract, obtain

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision.datasets import ImageFolder


@dataclass(frozen=True)
class ImageSplit:
    """Labelled images, split into training and test samples.

    Args:
        train: item i is a pair of a PIL image in RGB and the index of its class.
        test: the same for the test images.
        classes: names of the classes, by index.
        fingerprint: hex digest of the data; other images or labels have another one.
    """

    train: Dataset[tuple[Image, int]] = field(repr=False)
    test: Dataset[tuple[Image, int]] = field(repr=False)
    classes: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True)
class CifarArchive:
    """One of the two CIFAR archives in its binary version: label bytes, then 3 x 32 x 32 pixel bytes, for each image.

    Args:
        url: where it is published.
        md5: its checksum, as stated there.
        label_bytes: labels of an image; the last one is the class.
        train: members with the training images, in order.
        test: member with the test images.
        names: member with the names of the classes, one a line.

    Source: Krizhevsky 2009, *Learning Multiple Layers of Features from Tiny Images*; https://www.cs.toronto.edu/~kriz/cifar.html.
    """

    url: str
    md5: str
    label_bytes: int
    train: tuple[str, ...]
    test: str
    names: str


#: the folders of an image folder
PARTS = ("train", "test")

#: the official archives, by the name that :func:`images` takes
CIFAR: dict[str, CifarArchive] = {
    "cifar10": CifarArchive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        1,
        tuple(f"cifar-10-batches-bin/data_batch_{k}.bin" for k in range(1, 6)),
        "cifar-10-batches-bin/test_batch.bin",
        "cifar-10-batches-bin/batches.meta.txt",
    ),
    "cifar100": CifarArchive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        2,
        ("cifar-100-binary/train.bin",),
        "cifar-100-binary/test.bin",
        "cifar-100-binary/fine_label_names.txt",
    ),
}


def cache_folder() -> Path:
    """Where downloads and what is computed from them are kept: the environment variable ``CVXLIB_CACHE``, or the user's cache."""
    if chosen := os.environ.get("CVXLIB_CACHE"):
        return Path(chosen).expanduser()
    return Path(_vision_extra("platformdirs").user_cache_dir("cvxlib"))


def images(source: str | Path, *, cache: Path | None = None, download: bool = True) -> ImageSplit:
    """A set of labelled images, by name or by place.

    CIFAR is read from the official archive, whose checksum is verified every time. A folder's fingerprint is a hash of all its files,
    which takes as long as reading them; an archive's is its SHA-256.

    Args:
        source: ``"cifar10"``, ``"cifar100"``, a folder with ``train/<class>/*`` and ``test/<class>/*`` or a tar or zip archive of one.
        cache: where archives are kept and unpacked; :func:`cache_folder` by default.
        download: whether the network may be used.

    Returns:
        The images; a file that is not a readable image raises a ``ValueError`` with its path when it is asked for.

    Raises:
        TypeError: ``source`` is neither text nor a path.
        ValueError: no such data, or damaged data; the message names the file and what to do.
        FileNotFoundError: the official archive is not in the cache and ``download`` is off.
        ModuleNotFoundError: a package of the ``vision`` extra is not installed.
        ConnectionError: it could not be downloaded; the message says where to put it by hand.
    """
    instance("source", source, (str, os.PathLike), f"{', '.join(CIFAR)} or a path")
    cache = cache_folder() if cache is None else Path(cache)
    if source in CIFAR:
        archive = CIFAR[source]
        return read_cifar(archive, obtain(archive.url, cache / Path(archive.url).name, archive.md5, download=download))
    path = Path(source).expanduser()
    require(path.exists(), "source", f"{', '.join(CIFAR)}, or an existing folder or archive", f"{str(source)!r}")
    if path.is_dir():
        return read_folder(path)
    return read_folder(extract(path, cache / "images"), origin=path)


class PixelImages(Dataset["tuple[Image, int]"]):
    """Images held in memory.

    Args:
        pixels: (n, 3, height, width) bytes.
        labels: (n,) indices of classes.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return _vision_extra("PIL.Image").fromarray(np.ascontiguousarray(self.pixels[index].transpose(1, 2, 0))), int(
            self.labels[index]
        )


def read_cifar(archive: CifarArchive, path: Path) -> ImageSplit:
    """Read an archive in CIFAR's binary format.

    Args:
        archive: which members to read, and how; its checksum serves as fingerprint and is not checked here.
        path: the file.

    Raises:
        ValueError: a member is missing, is no whole number of records, or has a label without a class.
    """
    wanted = {*archive.train, archive.test, archive.names}
    with tarfile.open(path) as file:
        members = {
            member.name: part.read()
            for member in file
            if member.name in wanted and (part := file.extractfile(member)) is not None
        }
    missing = sorted(wanted - set(members))
    require(not missing, str(path), "a CIFAR archive in its binary version", f"no member {', '.join(missing)}")
    classes = tuple(line for line in members[archive.names].decode().splitlines() if line)
    train, test = (
        _records(path, names, b"".join(members[name] for name in names), archive.label_bytes, len(classes))
        for names in (archive.train, (archive.test,))
    )
    return ImageSplit(train, test, classes, archive.md5)


def _records(path: Path, names: tuple[str, ...], data: bytes, label_bytes: int, classes: int) -> PixelImages:
    size = label_bytes + 3 * 32 * 32
    where = f"{', '.join(names)} of {path}"
    require(len(data) > 0 and len(data) % size == 0, where, f"records of {size} bytes", f"{len(data)} bytes")
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    labels = records[:, label_bytes - 1]
    require(labels.max() < classes, where, f"labels below {classes}", f"{labels.max()}")
    return PixelImages(records[:, label_bytes:].reshape(-1, 3, 32, 32), labels)


def read_folder(folder: Path, origin: Path | None = None) -> ImageSplit:
    """Read ``train/<class>/*`` and ``test/<class>/*`` of a folder, or of the only folder in it that has them.

    Args:
        folder: the folder.
        origin: the archive that it was unpacked from, if any: complaints name it, and its SHA-256 is the fingerprint.

    Raises:
        ValueError: a part is missing, a class is empty, or training and test images have other classes.
    """
    roots = [root for root in (folder, *sorted(folder.iterdir())) if all((root / part).is_dir() for part in PARTS)]
    if folder in roots:
        roots = [folder]
    require(
        len(roots) == 1, str(origin or folder), "folders train/<class> and test/<class>", f"{len(roots)} such pairs"
    )
    (root,) = roots

    def place(path: Path) -> str:
        return str(path) if origin is None else f"{path.relative_to(folder)} in {origin}"

    train, test = (_image_folder(root / part, place) for part in PARTS)
    for part, classes, others in (("test", test.classes, train.classes), ("train", train.classes, test.classes)):
        missing = sorted(set(others) - set(classes))
        require(not missing, place(root / part), "train and test with the same classes", f"no {', '.join(missing)}")
    fingerprint = checksum(origin) if origin else _fingerprint(root, train, test)
    return ImageSplit(train, test, tuple(train.classes), fingerprint)


def _image_folder(folder: Path, place: Callable[[Path], str]) -> ImageFolder:
    torchvision = _vision_extra("torchvision.datasets")
    require(any(path.is_dir() for path in folder.iterdir()), place(folder), "a folder for each class", "none")
    images = torchvision.ImageFolder(folder, loader=read_image, is_valid_file=_is_image, allow_empty=True)
    empty = set(range(len(images.classes))) - set(images.targets)
    if empty:
        expected = f"at least one image ({', '.join(torchvision.folder.IMG_EXTENSIONS)})"
        raise wrong_value(place(folder / images.classes[min(empty)]), expected, "none")
    return images


def _is_image(path: str) -> bool:
    """Whether the name is an image's; hidden files, which some systems add beside each image, are not."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return not os.path.basename(path).startswith(".") and path.lower().endswith(IMG_EXTENSIONS)


def read_image(path: str | Path) -> Image:
    """The image in a file, in RGB.

    Raises:
        ValueError: the file cannot be read as an image.
    """
    pillow = _vision_extra("PIL.Image")
    try:
        with pillow.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # a broken file makes Pillow raise almost anything
        raise wrong_value(str(path), "a readable image", f"{type(error).__name__}: {error}") from error


def _fingerprint(root: Path, *parts: ImageFolder) -> str:
    """A hash of the names (and so the classes) and contents of all files."""
    result = hashlib.sha256()
    paths = [Path(path) for images in parts for path, _ in images.samples]
    for path in tqdm(paths, desc="reading images", unit=" files", delay=1):
        result.update(f"{path.relative_to(root).as_posix()}\0{checksum(path)}\n".encode())
    return result.hexdigest()


def _vision_extra(name: str) -> ModuleType:
    """A module of the ``vision`` extra, or one clear sentence."""
    with needs_extra("images", "vision"):
        return importlib.import_module(name)
