r"""The data that ship with the package: handwritten digits as tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cvxlib.ground.checks import float_tensor, positive_int, require


@dataclass(frozen=True)
class TokenSplit:
    """Tokens and labels, split into training and test samples.

    Args:
        tokens: (n, s, d) training tokens.
        labels: (n,) training classes.
        test_tokens: (n', s, d) test tokens.
        test_labels: (n',) test classes.
        classes: number of classes.
    """

    tokens: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    test_tokens: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    classes: int


@cache
def _stored() -> tuple[np.ndarray, np.ndarray]:
    """The file that ships with the package: pixels (n, 8, 8) from 0 to 16 and classes (n,), as bytes."""
    with (files("cvxlib.vision") / "digits.npz").open("rb") as stream, np.load(stream) as data:
        return data["images"], data["labels"]


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 images (n, 8, 8), float64 from 0 to 16, and their classes (n,), int64: what scikit-learn's ``load_digits`` gives.

    Source: the test part of Alpaydin and Kaynak 1998, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository,
        https://doi.org/10.24432/C50P49, licensed under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/); unchanged but for the
        file's format, order and values as packaged by scikit-learn.
    """
    images, labels = _stored()
    return images.astype(np.float64), labels.astype(np.int64)


def digits(
    patch: int = 2,
    positions: int = 1,
    train: int = 1400,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> TokenSplit:
    r"""The 1,797 handwritten digits of 8 x 8 pixels as patch tokens that carry their position.

    Args:
        patch: side of a patch in pixels, a divisor of 8; s = (8 / patch)^2 tokens.
        positions: number of frequencies of :func:`position_features`; 0 leaves the positions out.
        train: number of training images, fewer than 1,797; the rest are test images.
        seed: of the split.
        dtype: float32 or float64.
        device: where the tensors live.

    Returns:
        The split; pixels lie in [0, 1].

    Source: the test part of Alpaydin and Kaynak 1998, as of :func:`digit_images`.
    """
    pixels, classes = digit_images()
    n = len(classes)
    train = positive_int("train", train)
    require(train < n, "train", f"fewer than {n} images", f"{train}")
    images = torch.from_numpy(pixels / 16.0).unsqueeze(1)
    tokens = patch_tokens(images, patch)
    if positions:
        tokens = torch.cat([tokens, position_features(8 // patch, positions).expand(n, -1, -1)], 2)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    tokens = tokens[order].to(device=device, dtype=dtype)
    labels = torch.from_numpy(classes)[order].to(device)
    return TokenSplit(tokens[:train], labels[:train], tokens[train:], labels[train:], 10)


def patch_tokens(images: Tensor, patch: int) -> Tensor:
    """Images (n, channels, side, side) cut into square patches: tokens (n, (side / patch)^2, channels patch^2), row by row."""
    images = float_tensor("images", images, ("n", "channels", "side", "side"))
    patch = positive_int("patch", patch)
    require(
        images.shape[2] % patch == 0 and images.shape[3] % patch == 0,
        "patch",
        f"a divisor of the image's sides {tuple(images.shape[2:])}",
        f"{patch}",
    )
    return functional.unfold(images, patch, stride=patch).mT


def position_features(grid: int, frequencies: int = 1) -> Tensor:
    r"""Where a patch is, as sines and cosines of half turns along both axes, (grid^2, 4 frequencies), float64.

    .. math:: \cos(\pi k r), \quad \sin(\pi k r), \quad \cos(\pi k t), \quad \sin(\pi k t), \qquad k = 1, \dots,
        \text{frequencies}

    for row :math:`r` and column :math:`t` of the patch's centre, scaled to (0, 1).
    """
    centre = (torch.arange(positive_int("grid", grid), dtype=torch.float64) + 0.5) / grid
    row, column = torch.meshgrid(centre, centre, indexing="ij")
    angles = torch.stack(
        [torch.pi * k * axis.flatten() for axis in (row, column) for k in range(1, frequencies + 1)], 1
    )
    return torch.cat([angles.cos(), angles.sin()], 1)
