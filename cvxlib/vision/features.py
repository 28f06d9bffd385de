"""Tokens of many images under a backbone, computed once and kept in a cache that survives interrupts and notices damage."""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
import zlib
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cvxlib.ground.checks import instance, positive_int, require, wrong_type, wrong_value
from cvxlib.ground.provenance import write_json
from cvxlib.vision.backbones import Backbone
from cvxlib.vision.datasets import ImageSplit, cache_folder

#: the form of the cache, raised when files of an older form can no longer be used
FORMAT = 1


@dataclass(frozen=True)
class Features:
    """Tokens of images under a backbone, on disk, with their labels.

    Args:
        tokens: (n, s, d) training tokens, memory-mapped for reading.
        labels: (n,) training classes.
        test_tokens: (n', s, d) test tokens, memory-mapped for reading.
        test_labels: (n',) test classes.
        classes: names of the classes.
        prefix: how many of the s tokens, the first ones, stand for no place; the others are a grid, row by row.
    """

    tokens: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    test_tokens: np.ndarray = field(repr=False)
    test_labels: np.ndarray = field(repr=False)
    classes: tuple[str, ...]
    prefix: int = 0


def extract_features(
    backbone: Backbone,
    split: ImageSplit,
    *,
    train: int | None = None,
    test: int | None = None,
    seed: int = 0,
    dtype: str = "float16",
    batch: int = 64,
    workers: int = 0,
    cache: Path | str | None = None,
    progress: bool = True,
) -> Features:
    """Tokens of images, from the cache as far as it reaches and computed beyond.

    Images come in the order of :func:`balanced_order`, so a smaller choice is the beginning of a larger one and shares its file.
    An interrupt loses one batch at most: the next call goes on from there. What was stored is verified by checksums each time;
    from the first damaged batch on it is computed again, with a warning. Tokens computed on a GPU differ from those of a CPU by
    rounding; the cache does not tell them apart.

    Args:
        backbone: from :func:`cvxlib.vision.backbone`.
        split: from :func:`cvxlib.vision.images`, or any other.
        train: number of training images, from all classes alike; all by default.
        test: number of test images, likewise.
        seed: of the order.
        dtype: of the stored tokens, ``"float16"`` or ``"float32"``.
        batch: images at a time.
        workers: processes that read images; 0 reads them in this one.
        cache: the folder; ``tokens`` in :func:`cvxlib.vision.cache_folder` by default.
        progress: whether to show a bar.

    Returns:
        The tokens, memory-mapped: nothing is read before it is asked for.

    Raises:
        ValueError: more images than there are, or tokens that are not finite in ``dtype``.
    """
    instance("backbone", backbone, Backbone, "a backbone of cvxlib.vision.backbone")
    require(dtype in ("float16", "float32"), "dtype", "'float16' or 'float32'", dtype)
    batch, workers = positive_int("batch", batch), positive_int("workers", workers, least=0)
    cache = cache_folder() / "tokens" if cache is None else Path(cache)
    found: list[np.ndarray] = []
    for part, count in (("train", train), ("test", test)):
        dataset = getattr(split, part)
        labels = _labels(dataset)
        count = len(labels) if count is None else positive_int(part, count)
        require(count <= len(labels), part, f"at most the {len(labels)} images there are", count)
        order = balanced_order(labels, seed)
        key = {"data": split.fingerprint, "part": part, "backbone": backbone.description, "seed": seed, "dtype": dtype}
        store = TokenStore(cache, key, (len(labels), *backbone.shape))
        store.open(count)
        images = _Images(dataset, order[store.done : count], backbone.transform)
        with tqdm(
            total=count,
            initial=store.done,
            desc=f"{part} tokens",
            unit=" images",
            disable=not progress or not len(images),
        ) as bar:
            for inputs, expected in DataLoader(images, batch, num_workers=workers) if len(images) else ():
                came = labels[order[store.done : store.done + len(inputs)]]
                require(np.array_equal(expected, came), "split", f"{part} images with the labels they list", "others")
                store.append(backbone.tokens(inputs).cpu().numpy())
                bar.update(len(inputs))
        found += [store.read(count), labels[order[:count]]]
    tokens, classes, test_tokens, test_classes = found
    return Features(tokens, classes, test_tokens, test_classes, tuple(split.classes), backbone.prefix)


def balanced_order(labels: Sequence[int] | np.ndarray, seed: int = 0) -> np.ndarray:
    """An order of samples in which every beginning has its classes as equally often as their sizes allow.

    Args:
        labels: (n,) classes.
        seed: of the order within each class and of the classes within each round.

    Returns:
        (n,) indices: rounds with one sample of each class that has any left.
    """
    labels = np.asarray(labels)
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.unique(labels, return_counts=True)[1]
    rounds = np.concatenate([np.arange(count) for count in counts])
    return by_class[np.lexsort((generator.random(len(labels)), rounds))]


class TokenStore:
    """An array on disk that grows from the front: ``tokens.npy``, and ``state.json`` with a checksum for every block of it.

    The file has its full length from the start; what is not written yet takes no room on file systems with sparse files.

    Args:
        cache: the folder of all stores.
        key: what the tokens depend on, ready for JSON; the store's folder is named by its hash.
        shape: (n, s, d) of the full array.
    """

    def __init__(self, cache: Path, key: dict[str, Any], shape: tuple[int, int, int]) -> None:
        self.key, self.shape = json.loads(json.dumps(key)), shape
        digest = hashlib.sha256(json.dumps([FORMAT, key], sort_keys=True).encode()).hexdigest()
        self.folder = cache / f"{key['backbone']['name']}-{key['part']}-{digest[:16]}"
        self.blocks: list[list[int]] = []
        self._array: np.memmap[tuple[int, ...], np.dtype[np.floating]] | None = None

    @property
    def done(self) -> int:
        """Number of samples that are there."""
        return self.blocks[-1][0] if self.blocks else 0

    @property
    def array(self) -> np.memmap[tuple[int, ...], np.dtype[np.floating]]:
        """The whole array; :meth:`open` finds it."""
        if self._array is None:
            raise RuntimeError("TokenStore: expected open(count) first; got a store that was not opened")
        return self._array

    def open(self, count: int) -> None:
        """Find what is stored and whether its first ``count`` samples are sound; forget what comes after damage."""
        path, state = self.folder / "tokens.npy", self.folder / "state.json"
        if state.exists():
            try:
                self.blocks = self._read_state(state)
                self._array = np.load(path, mmap_mode="r")
                if (self.array.shape, self.array.dtype) != (self.shape, np.dtype(self.key["dtype"])):
                    raise ValueError("an array of another shape or type")
                self._verify(count)
                return
            except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
                warnings.warn(f"{self.folder} is damaged ({error}): it is computed anew", stacklevel=3)
                self.blocks = []
        self.folder.mkdir(parents=True, exist_ok=True)
        self._array = np.lib.format.open_memmap(path, "w+", self.key["dtype"], self.shape)

    def append(self, block: np.ndarray) -> None:
        """Store the next samples, (b, s, d); they count once their checksum is written."""
        with np.errstate(over="ignore"):
            block = block.astype(self.array.dtype)
        if not np.isfinite(block).all():
            raise wrong_value(
                "dtype", "one that holds all tokens, such as 'float32'", f"{block.dtype}: infinite or NaN tokens"
            )
        if not self.array.flags.writeable:
            self._array = np.load(self.folder / "tokens.npy", mmap_mode="r+")
        start, end = self.done, self.done + len(block)
        self.array[start:end] = block
        self.blocks.append([end, zlib.crc32(block.data)])
        write_json(self.folder / "state.json", {"format": FORMAT, "key": self.key, "blocks": self.blocks})

    def read(self, count: int) -> np.ndarray:
        """The first ``count`` samples, memory-mapped for reading."""
        if self.array.flags.writeable:
            self.array.flush()
        return np.load(self.folder / "tokens.npy", mmap_mode="r")[:count]

    def _read_state(self, path: Path) -> list[list[int]]:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] != FORMAT or state["key"] != self.key:
            raise ValueError("state.json is about other tokens")
        blocks = [[int(end), int(checksum)] for end, checksum in state["blocks"]]
        ends = [0, *(end for end, _ in blocks)]
        if any(a >= b for a, b in itertools.pairwise(ends)) or ends[-1] > self.shape[0]:
            raise ValueError("state.json lists blocks that cannot be")
        return blocks

    def _verify(self, count: int) -> None:
        start = 0
        for k, (end, checksum) in enumerate(self.blocks):
            if start >= count:
                return
            if zlib.crc32(self.array[start:end].data) != checksum:
                warnings.warn(
                    f"{self.folder} is damaged from sample {start} on: the rest is computed again", stacklevel=4
                )
                self.blocks = self.blocks[:k]
                return
            start = end


class _Images(Dataset[tuple[torch.Tensor, int]]):
    """Chosen images of a data set as the model's inputs, with their labels."""

    def __init__(
        self, dataset: Dataset[tuple[object, int]], indices: np.ndarray, transform: Callable[[object], torch.Tensor]
    ) -> None:
        self.dataset, self.indices, self.transform = dataset, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.dataset[int(self.indices[index])]
        return self.transform(image), label


def _labels(dataset: Dataset[tuple[object, int]]) -> np.ndarray:
    """The classes of all images: as the data set lists them (``targets`` or ``labels``), else from its items one by one."""
    for name in ("targets", "labels"):
        if (listed := getattr(dataset, name, None)) is not None:
            return np.asarray(listed, dtype=np.int64)
    if not isinstance(dataset, Sized):
        raise wrong_type("split", "data sets that list their labels, or have a length", dataset)
    return np.array([dataset[k][1] for k in range(len(dataset))], dtype=np.int64)
