r"""From a backbone's tokens to the tokens a head is trained on: fewer features, one scale, and where each token stands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cvxlib.ground.checks import FLOATS, instance, needs_extra, positive_int, require
from cvxlib.vision.digits import TokenSplit, position_features
from cvxlib.vision.features import Features

#: bytes of float64 tokens that are in memory at a time
CHUNK_BYTES = 2**27


@dataclass(frozen=True)
class Preparation:
    r"""One linear map for every token, fitted on training tokens, and position features beside it.

    .. math:: x \mapsto \gamma \, \bigl[\, (x^\top M - \mu) \oslash \sigma, \; p_a \,\bigr]

    for token :math:`x` at place :math:`a`. :meth:`fit` makes one.

    Args:
        matrix: M, (d, k); None for the identity.
        mean: :math:`\mu`, (k,), mean of the training tokens' k features.
        deviation: :math:`\sigma`, (k,), their standard deviation, or ones.
        positions: p, (s, f), position features by token.
        scale: :math:`\gamma`.
        explained: (k,) share of the variance along each principal component; None without PCA.
    """

    matrix: Tensor | None = field(repr=False)
    mean: Tensor = field(repr=False)
    deviation: Tensor = field(repr=False)
    positions: Tensor = field(repr=False)
    scale: float
    explained: Tensor | None = field(repr=False)

    @classmethod
    def fit(
        cls,
        features: Features,
        *,
        reduce: str | None = "pca",
        dimensions: int | None = None,
        standardise: bool = True,
        positions: int = 1,
        sample: int = 50_000,
        seed: int = 0,
        progress: bool = True,
    ) -> Preparation:
        r"""Fit to the training tokens; the test tokens are not looked at.

        Args:
            features: from :func:`cvxlib.vision.extract_features`.
            reduce: ``"pca"``: the leading principal components; ``"average"``: means of d/k neighbouring features; None: all features.
            dimensions: k; for the average a divisor of d. Needed with ``reduce``, and only then.
            standardise: whether each of the k features gets variance one over the training tokens (mean zero it gets in any case).
            positions: number of frequencies of :func:`cvxlib.vision.position_features`; 0 leaves the positions out. Tokens of the
                prefix get zeros.
            sample: number of tokens, drawn at random, that the principal components are computed from.
            seed: of that draw.
            progress: whether to show a bar where it takes long.

        Returns:
            The map, in float64, whose ``scale`` makes the mean squared norm of the training tokens one.

        Raises:
            ValueError: an unknown reduction, dimensions that do not fit, or positions of tokens that are no square grid.
        """
        instance("features", features, Features, "features of cvxlib.vision.extract_features")
        s, d = features.tokens.shape[1:]
        matrix, explained = None, None
        require(reduce in (None, "pca", "average"), "reduce", "'pca', 'average' or None", reduce)
        require(
            (reduce is None) == (dimensions is None), "dimensions", "a number with reduce, and only then", dimensions
        )
        if dimensions is not None:
            dimensions = positive_int("dimensions", dimensions)
            require(dimensions <= d, "dimensions", f"at most the tokens' {d} features", dimensions)
            if reduce == "pca":
                matrix, explained = _principal_components(features.tokens, dimensions, sample, seed)
            else:
                require(d % dimensions == 0, "dimensions", f"a divisor of the tokens' {d} features", dimensions)
                group = d // dimensions
                matrix = torch.eye(dimensions, dtype=torch.float64).repeat_interleave(group, 0) / group
        mean, variance = _moments(features.tokens, matrix, progress)
        deviation = variance.sqrt() if standardise else torch.ones_like(mean)
        deviation[deviation == 0] = 1.0
        place = _positions(s, features.prefix, positions)
        squared_norm = (variance / deviation**2).sum() + place.square().sum() / s
        scale = 1 / math.sqrt(squared_norm) if squared_norm > 0 else 1.0
        return cls(matrix, mean, deviation, place, scale, explained)

    def __call__(self, tokens: np.ndarray, dtype: torch.dtype = torch.float64, progress: bool = True) -> Tensor:
        """Prepare tokens (n, s, d), memory-mapped or not: (n, s, k + f) in ``dtype``."""
        require(dtype in FLOATS, "dtype", "torch.float32 or torch.float64", dtype)
        k = len(self.mean)
        prepared = torch.empty(*tokens.shape[:2], k + self.positions.shape[1], dtype=dtype)
        prepared[:, :, k:] = self.scale * self.positions
        for start, chunk in _chunks(tokens, dtype, "preparing", progress):
            reduced = chunk if self.matrix is None else chunk @ self.matrix.to(dtype)
            prepared[start : start + len(chunk), :, :k] = self.scale * (reduced - self.mean) / self.deviation
        return prepared


def prepare(
    features: Features,
    *,
    reduce: str | None = "pca",
    dimensions: int | None = None,
    standardise: bool = True,
    positions: int = 1,
    sample: int = 50_000,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> TokenSplit:
    """Tokens ready for a head: :meth:`Preparation.fit` on the training tokens, applied to training and test tokens.

    Args:
        features: from :func:`cvxlib.vision.extract_features`; they are read in chunks and never held in memory whole.
        reduce, dimensions, standardise, positions, sample, seed, progress: as in :meth:`Preparation.fit`.
        dtype: float32 or float64.
        device: where the result lives.

    Returns:
        The split, whose tokens have the k reduced features first and then the position features.
    """
    preparation = Preparation.fit(
        features,
        reduce=reduce,
        dimensions=dimensions,
        standardise=standardise,
        positions=positions,
        sample=sample,
        seed=seed,
        progress=progress,
    )
    tokens, test_tokens = (
        preparation(part, dtype, progress).to(device) for part in (features.tokens, features.test_tokens)
    )
    labels, test_labels = (torch.from_numpy(part).to(device) for part in (features.labels, features.test_labels))
    return TokenSplit(tokens, labels, test_tokens, test_labels, len(features.classes))


def _chunks(tokens: np.ndarray, dtype: torch.dtype, what: str, progress: bool) -> Iterator[tuple[int, Tensor]]:
    """Beginnings and tensors (b, s, d) of successive samples."""
    n, s, d = tokens.shape
    step = max(1, CHUNK_BYTES // (8 * s * d))
    for start in tqdm(range(0, n, step), desc=what, unit=" chunks", delay=2, disable=not progress):
        yield start, torch.from_numpy(np.array(tokens[start : start + step])).to(dtype)


def _principal_components(tokens: np.ndarray, dimensions: int, sample: int, seed: int) -> tuple[Tensor, Tensor]:
    """The components as columns (d, k), and the share of the variance along each (k,)."""
    with needs_extra("principal components", "vision"):
        from sklearn.decomposition import PCA

    n, s, d = tokens.shape
    count = min(positive_int("sample", sample), n * s)
    require(dimensions <= count, "dimensions", f"at most the {count} tokens of the sample", dimensions)
    rows = np.sort(np.random.default_rng(seed).choice(n * s, count, replace=False))
    pca = PCA(dimensions, svd_solver="covariance_eigh").fit(tokens.reshape(-1, d)[rows].astype(np.float64))
    return torch.from_numpy(pca.components_.T.copy()), torch.from_numpy(pca.explained_variance_ratio_)


def _moments(tokens: np.ndarray, matrix: Tensor | None, progress: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance of each reduced feature over all tokens, (k,) each; constant features have variance zero."""
    with needs_extra("standardised features", "vision"):
        from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    for _, chunk in _chunks(tokens, torch.float64, "statistics", progress):
        reduced = chunk if matrix is None else chunk @ matrix
        scaler.partial_fit(reduced.flatten(0, 1).numpy())
    return torch.from_numpy(scaler.mean_.copy()), torch.from_numpy(scaler.var_.copy())


def _positions(tokens: int, prefix: int, frequencies: int) -> Tensor:
    """Position features of the grid's tokens, row by row, after zeros for the prefix: (s, 4 frequencies)."""
    if not positive_int("positions", frequencies, least=0):
        return torch.zeros(tokens, 0, dtype=torch.float64)
    grid = math.isqrt(tokens - prefix)
    require(grid**2 == tokens - prefix, "positions", "0, or tokens that form a square", f"{tokens - prefix} tokens")
    place = position_features(grid, frequencies)
    return torch.cat([place.new_zeros(prefix, place.shape[1]), place])
