r"""Images as tokens for the energies: scikit-learn's digits, or any folder of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cvxlib.ground.checks import needs_extra, positive_int, require


def patches(images: Tensor, patch: int) -> Tensor:
    """(n, s, d) tokens, one per square patch, of images (n, height, width) or (n, height, width, colours)."""
    images = images.unsqueeze(-1) if images.ndim == 3 else images
    n, height, width, colours = images.shape
    require(height % patch == width % patch == 0, "patch", f"a divisor of {height} and {width}", str(patch))
    cut = images.reshape(n, height // patch, patch, width // patch, patch, colours)
    return cut.transpose(2, 3).reshape(n, -1, patch * patch * colours)


def standardise(tokens: Tensor) -> Tensor:
    """The tokens with every feature's mean subtracted and one common scale: an average token then has unit squared entries."""
    tokens = tokens - tokens.mean((0, 1))
    return tokens / tokens.square().mean().sqrt()


def digit_tokens(count: int = 200, patch: int = 2) -> tuple[Tensor, Tensor]:
    """(n, s, d) float64 patch tokens of the first digits of scikit-learn, pixels in [0, 1], and their (n,) classes."""
    with needs_extra("these images", "estimators"):
        from sklearn.datasets import load_digits

    data = load_digits()
    count = positive_int("count", count)
    images = torch.from_numpy(data.images[:count]) / 16
    return patches(images, patch), torch.from_numpy(data.target[:count]).long()


def folder_tokens(path: str | Path, count: int = 200, patch: int = 8, side: int = 32) -> tuple[Tensor, Tensor]:
    """Patch tokens of an image folder ``path/<class>/<image>``, evenly over the classes.

    Args:
        path: the folder (CIFAR's ``train``, for instance).
        count: how many images.
        patch: side of a patch, a divisor of ``side``.
        side: images are resized to so many pixels in square.

    Returns:
        (n, s, d) float64 tokens with pixels in [0, 1], and (n,) classes.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images in it.
    """
    with needs_extra("folders of images", "vision"):
        from PIL import Image

    path, count = Path(path), positive_int("count", count)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder of images, one subfolder per class")
    classes = sorted(folder for folder in path.iterdir() if folder.is_dir())
    files = [sorted(f for f in folder.iterdir() if f.suffix.lower() in (".jpg", ".jpeg", ".png")) for folder in classes]
    depth = max(map(len, files), default=0)
    chosen = [(column[row], label) for row in range(depth) for label, column in enumerate(files) if row < len(column)][
        :count
    ]
    require(bool(chosen), "path", "a folder with one subfolder of .jpg or .png images per class", str(path))
    images = []
    for file, _ in chosen:
        with Image.open(file) as image:
            images.append(np.asarray(image.convert("RGB").resize((side, side))))
    tokens = patches(torch.from_numpy(np.stack(images)).double() / 255, patch)
    return tokens, torch.tensor([label for _, label in chosen])
