"""Loaders of text and images, on small files in the official forms."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from cvxlib.energy import images, text

REVIEWS = {
    "neg/0_3.txt": "Dull.",
    "neg/1_1.txt": "Worse than dull.",
    "pos/0_9.txt": "Fine.",
    "pos/1_10.txt": "Moving and warm.",
}
TABLE = 'sentence\tlabel\nhide new secretions \t0\na "quoted line \t1\n'


@pytest.fixture(params=["archive", "folder"])
def imdb_path(request, tmp_path):
    if request.param == "folder":
        for name, review in REVIEWS.items():
            path = tmp_path / "aclImdb" / "train" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(review)
        return tmp_path / "aclImdb"
    path = tmp_path / "aclImdb_v1.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, review in {**REVIEWS, "unsup/0_0.txt": "Neither."}.items():
            info = tarfile.TarInfo(f"aclImdb/train/{name}")
            info.size = len(review)
            archive.addfile(info, io.BytesIO(review.encode()))
    return path


@pytest.fixture(params=["archive", "folder"])
def sst2_path(request, tmp_path):
    if request.param == "folder":
        (tmp_path / "SST-2").mkdir()
        (tmp_path / "SST-2" / "train.tsv").write_text(TABLE)
        return tmp_path / "SST-2"
    with zipfile.ZipFile(tmp_path / "SST-2.zip", "w") as archive:
        archive.writestr("SST-2/train.tsv", TABLE)
    return tmp_path / "SST-2.zip"


def test_imdb(imdb_path):
    assert text.imdb(imdb_path, check=False) == [
        ("Dull.", 0), ("Fine.", 1), ("Worse than dull.", 0), ("Moving and warm.", 1)
    ]  # fmt: skip
    assert text.imdb(imdb_path, count=2, check=False) == [("Dull.", 0), ("Fine.", 1)]
    with pytest.raises(ValueError, match="reviews in test/neg"):
        text.imdb(imdb_path, "test", check=False)


def test_sst2(sst2_path):
    assert text.sst2(sst2_path, check=False) == [("hide new secretions", 0), ('a "quoted line', 1)]
    assert len(text.sst2(sst2_path, count=1, check=False)) == 1
    with pytest.raises(ValueError, match="split: expected"):
        text.sst2(sst2_path, "test", check=False)


def test_other_archives_are_refused(tmp_path):
    path = tmp_path / "SST-2.zip"
    path.write_bytes(b"not the archive")
    with pytest.raises(ValueError, match="SHA-256 d67e16fb"):
        text.sst2(path)
    with pytest.raises(ValueError, match="SHA-256 c40f74a1"):
        text.imdb(path)
    with pytest.raises(FileNotFoundError, match="the official file comes from"):
        text.imdb(tmp_path / "missing.tar.gz")


def test_a_table_with_other_columns_is_refused(tmp_path):
    (tmp_path / "train.tsv").write_text("index\tsentence\n0\tfine\n")
    with pytest.raises(ValueError, match="columns sentence and label"):
        text.sst2(tmp_path)


def test_word_vectors_in_glove_form(tmp_path):
    lines = "the 0.5 -1 2\nfilm 1 0 0\n. 0 0 3e-1\n"
    (tmp_path / "v.txt").write_text(lines)
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        archive.writestr("v.txt", lines)
    for name in ("v.txt", "v.zip"):
        vectors = text.WordVectors.read(tmp_path / name)
        expected = torch.tensor([[0.5, -1, 2], [1, 0, 0], [0, 0, 0.3]], dtype=torch.float64)
        torch.testing.assert_close(vectors.tokens("The zzz FILM.", 3), expected, atol=1e-7, rtol=0)
        assert vectors.tokens("the film", 3) is None
        assert vectors.batch(["the film.", "the"], 2).shape == (1, 2, 3)
    assert len(text.WordVectors.read(tmp_path / "v.txt", count=2).rows) == 2
    (tmp_path / "bad.txt").write_text("the 1 2\nfilm 1\n")
    with pytest.raises(ValueError, match="line 2"):
        text.WordVectors.read(tmp_path / "bad.txt")
    with pytest.raises(ValueError, match="texts: expected"):
        vectors.batch(["the"], 9)


def test_any_matrix_will_do():
    vectors = text.WordVectors(["a", "b"], np.eye(2, dtype=np.float32))
    assert torch.equal(vectors.tokens("b a", 2), torch.eye(2, dtype=torch.float64).flip(0))
    with pytest.raises(ValueError, match="vectors: expected 1 rows"):
        text.WordVectors(["a"], np.eye(2))


def test_packaged_vectors_or_a_sentence_that_helps():
    try:
        vectors = text.WordVectors.packaged()
    except ModuleNotFoundError as error:
        assert "pip install" in str(error)
    else:
        assert vectors.batch(text.packaged_sentences(), 8).shape[1:] == (8, 50)


def test_packaged_sentences_are_prose():
    assert sum(len(sentence.split()) > 5 for sentence in text.packaged_sentences()) > 40


def test_patches_cut_images_where_they_should():
    picture = torch.arange(16.0).reshape(1, 4, 4)
    assert images.patches(picture, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    with pytest.raises(ValueError, match="patch: expected"):
        images.patches(picture, 3)


def test_digit_tokens_and_standardise():
    tokens, labels = images.digit_tokens(20)
    assert tokens.shape == (20, 16, 4) and labels.shape == (20,)
    assert 0 <= tokens.min() and tokens.max() == 1
    standard = images.standardise(tokens)
    assert standard.mean((0, 1)).abs().max() < 1e-14
    assert float(standard.square().mean()) == pytest.approx(1)


def test_folder_tokens(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for label, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
        (tmp_path / f"class{label}").mkdir()
        for index in range(3):
            image.new("RGB", (8, 8), colour).save(tmp_path / f"class{label}" / f"{index}.png")
    tokens, labels = images.folder_tokens(tmp_path, count=4, patch=4, side=8)
    assert tokens.shape == (4, 4, 48) and labels.tolist() == [0, 1, 0, 1]
    assert tokens[0, 0, :3].tolist() == [1, 0, 0]
    with pytest.raises(FileNotFoundError, match="not a folder"):
        images.folder_tokens(tmp_path / "none")
