"""Tokens, targets and gates that are hard for floats: magnitudes far apart, sums that cancel, offsets, repeats, zeros."""

from __future__ import annotations

import numpy as np
import torch

import cvxlib

#: decimal exponents that tokens and targets reach; in single precision a product of three tokens must still fit
REACH = {torch.float64: (30.0, 30.0), torch.float32: (9.0, 12.0)}


def dtype(rng: np.random.Generator) -> torch.dtype:
    """Single precision one time in four."""
    return torch.float32 if rng.random() < 0.25 else torch.float64


def tokens(
    rng: np.random.Generator, n: int, s: int, d: int, kind: torch.dtype, reach: float | None = None
) -> torch.Tensor:
    """(n, s, d) tokens after none to three of the deformations, then scaled as a whole.

    Args:
        rng: draws all.
        n: samples.
        s: tokens.
        d: features.
        kind: float32 or float64.
        reach: decimal exponent of the largest factor, by default what the type holds.
    """
    reach = REACH[kind][0] if reach is None else reach
    x = rng.standard_normal((n, s, d))
    for name in rng.choice(len(DEFORMATIONS), size=rng.integers(0, 4), replace=False):
        x = DEFORMATIONS[name](rng, x, reach)
    largest = np.abs(x).max()
    if rng.random() < 0.5 and largest:
        x = x / largest * 10.0 ** rng.uniform(-reach, reach)
    with np.errstate(over="ignore"):
        x = np.clip(x, -(10.0**reach), 10.0**reach)
    return torch.tensor(x).to(kind)


def _features_apart(rng, x, reach):
    return x * 10.0 ** rng.uniform(-reach, reach, x.shape[2])


def _samples_apart(rng, x, reach):
    return x * 10.0 ** rng.uniform(-reach, reach, len(x))[:, None, None]


def _entries_apart(rng, x, reach):
    return x * 10.0 ** rng.uniform(-reach / 3, reach / 3, x.shape)


def _offset(rng, x, reach):
    return x + 10.0 ** rng.uniform(0, min(reach, 16)) * rng.choice([-1, 1], x.shape[2])


def _collinear(rng, x, reach):
    return x[:, :, :1] * rng.integers(-3, 4, x.shape[2]) + x * 10.0 ** rng.uniform(-17, -6)


def _repeated(rng, x, reach):
    return x[rng.integers(0, len(x), len(x))] * rng.choice([-1, 1], (len(x), 1, 1))


def _nearly_repeated(rng, x, reach):
    return x[np.arange(len(x)) // 2] * (1 + 10.0 ** rng.uniform(-16, -6) * x)


def _zero_tokens(rng, x, reach):
    return x * (rng.random(x.shape[:2]) < 0.6)[:, :, None]


def _zero_features(rng, x, reach):
    return x * (rng.random(x.shape[2]) < 0.6)


def _unix_seconds(rng, x, reach):
    x = x.copy()
    x[:, :, 0] = (1.7e9 + 3e7 * rng.random(x.shape[:2])) / (1 if reach >= 10 else 10)
    return x


def _centred(rng, x, reach):
    return x - x.mean(axis=rng.integers(0, 3), keepdims=True)


def _whole(rng, x, reach):
    return np.rint(3 * x)


DEFORMATIONS = (
    _features_apart,
    _samples_apart,
    _entries_apart,
    _offset,
    _collinear,
    _repeated,
    _nearly_repeated,
    _zero_tokens,
    _zero_features,
    _unix_seconds,
    _centred,
    _whole,
)


def values(
    rng: np.random.Generator, shape: tuple[int, ...], kind: torch.dtype, planted: np.ndarray | None
) -> torch.Tensor:
    """Regression targets: noise, noise around a planted prediction, or pairs that cancel; of any scale, never all zero."""
    y = rng.standard_normal(shape)
    draw = rng.random()
    if draw < 0.4 and planted is not None and np.isfinite(planted).all():
        y = planted.reshape(shape) + y * 10.0 ** rng.uniform(-16, 0) * np.abs(planted).max()
    elif draw < 0.6 and len(y) > 1:
        y[1::2] = -y[: len(y) // 2 * 2 : 2] * (1 + 10.0 ** rng.uniform(-16, -6))
    if rng.random() < 0.5:
        y = y / (np.abs(y).max() or 1.0) * 10.0 ** rng.uniform(-REACH[kind][1], REACH[kind][1])
    y = np.clip(y, -1e36, 1e36) if kind == torch.float32 else y
    if not np.abs(y).max() > (1e-30 if kind == torch.float32 else 1e-120):
        y = np.ones(shape)
    return torch.tensor(y).to(kind)


def classes(rng: np.random.Generator, shape: tuple[int, ...], outputs: int) -> torch.Tensor:
    """Class targets, now and then all of one class."""
    return torch.tensor(rng.integers(0, outputs if rng.random() < 0.9 else 1, shape))


def gates(rng: np.random.Generator, mixer: cvxlib.Mixer, count: int) -> cvxlib.GatedReLU:
    """Directions that single precision holds, so that both precisions have the same gates."""
    directions = rng.standard_normal((count, *mixer.direction_shape)).astype(np.float32)
    return cvxlib.GatedReLU(torch.tensor(directions).double())


def fraction(rng: np.random.Generator) -> float:
    """Weight decay as a fraction of the largest that matters, 2 to 1e-13."""
    return 10.0 ** rng.uniform(-13, 0.3)
