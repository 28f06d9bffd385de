r"""Mixers: ways to mix tokens, each given by two linear maps.

Every head of this package is :math:`f(X) = \sum_j \sigma(L_X u_j)\, R_X V_j`. A mixer says what
:math:`L_X u` (``hidden``) and :math:`R_X` (``values``) are; the dual, the certificate, the solver and the
recovered network follow from these two maps alone.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from cvxlib.ground.checks import float_tensor, positive_int, require
from cvxlib.ground.identity import Part
from cvxlib.model.contractions import Contraction, mean_queries


class Mixer(Part, abc.ABC):
    r"""The two linear maps of a head, :math:`L_X u` and :math:`R_X`: the protocol of a mixer of your own.

    Subclass it as a frozen dataclass with an integer field ``outputs`` (and ``features`` and ``tokens`` where the
    mixer fixes them: inputs are then checked against them), and give it ``shape``, ``width``, ``hidden`` and
    ``values``. Fields declared ``int`` must be whole numbers of at least 1; others may be what they like (numbers, tuples,
    tensors, of which the mixer keeps copies), and two mixers of one class with equal fields are equal.
    :func:`cvxlib.testing.check_mixer` tells whether the result is sound.
    """

    outputs: int
    #: B, the number of independent heads side by side; block b sees ``split(tokens)[b]`` and writes outputs block b
    blocks: int = 1
    #: ``"hidden"`` or ``"rows"``: which of the two does nothing but add products of entries, up to the sign of which the same of absolute
    #: values bounds its rounding; then bounds are rigorous. ``None``: not known, and bounds hold to rounding
    sums: ClassVar[str | None] = None
    #: g, where ``hidden`` times ``values`` is homogeneous of this degree in the tokens: extreme data are then solved in other units
    degree: ClassVar[int | None] = None

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one u."""

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """w, the number of columns of ``values``."""

    @abc.abstractmethod
    def hidden(self, tokens: Tensor, u: Tensor) -> Tensor:
        r"""(n, m, a, h) the hidden matrices :math:`L_X u_j`, linear in ``u``, for tokens (n, s, d) and u (m, \*shape).

        The axis a is the output position (a token, unless the mixer changes their number).
        """

    @abc.abstractmethod
    def values(self, tokens: Tensor) -> Tensor:
        """(n, h, w) the matrix :math:`R_X` for tokens (n, s, d)."""

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The tokens that each of the B blocks sees."""
        return (tokens,)

    def pooled(self, tokens: Tensor, masks: Tensor) -> Contraction | None:
        """A cheaper way to pooled predictions than the hidden matrices, where this mixer has one; masks are (n, P, a, h)."""
        return None

    def rows(self, tokens: Tensor) -> Tensor:
        """(n, p, a, h) what ``hidden`` multiplies each entry of u with, for tokens (n, s, d): its values at the unit vectors."""
        basis = torch.eye(self.p, dtype=tokens.dtype, device=tokens.device)
        return self.hidden(tokens, basis.reshape(self.p, *self.shape))

    def exact_rows(self, tokens: np.ndarray) -> np.ndarray | None:
        """(n a h, p) the rows that ``hidden`` multiplies u with, in the arithmetic of the tokens (n, s, d), an object array of fractions.

        With them sign patterns of a ReLU are enumerated without rounding; a mixer without (``None``) has the rows that floats give.
        """
        return None

    def written_for_its_maps(self, shortcut: str) -> bool:
        """Whether a method that says again what ``hidden`` and ``values`` say was not inherited past another ``hidden`` or ``values``."""
        ancestors = type(self).__mro__
        depth = {
            name: next(i for i, c in enumerate(ancestors) if name in vars(c)) for name in (shortcut, "hidden", "values")
        }
        return depth[shortcut] <= min(depth["hidden"], depth["values"])

    @property
    def bounded_by(self) -> str | None:
        """:attr:`sums`, unless it was inherited past another ``hidden`` or ``values``."""
        return self.sums if self.written_for_its_maps("sums") else None

    @property
    def homogeneous(self) -> int | None:
        """:attr:`degree`, unless it was inherited past another ``hidden`` or ``values``."""
        return self.degree if self.written_for_its_maps("degree") else None

    def __post_init__(self) -> None:
        super().__post_init__()
        declared: tuple[dataclasses.Field[object], ...] = (
            dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        )
        for field in declared:
            if field.type in (int, "int"):
                positive_int(field.name, getattr(self, field.name))
        require(self.outputs % self.blocks == 0, "blocks", f"a divisor of outputs = {self.outputs}", f"{self.blocks}")

    @property
    def p(self) -> int:
        """Rows of a lifted block: the number of entries of one u."""
        return math.prod(self.shape)

    @property
    def block_outputs(self) -> int:
        """c / B, the number of outputs that one block writes."""
        return self.outputs // self.blocks

    @property
    def q(self) -> int:
        """Columns of a lifted block: the number of entries of one V."""
        return self.width * self.block_outputs

    @property
    def direction_shape(self) -> tuple[int, ...]:
        """Shape of one gate direction: ``shape``, with the block axis in front where there is more than one block."""
        return self.shape if self.blocks == 1 else (self.blocks, *self.shape)

    def check(self, tokens: object) -> Tensor:
        """The tokens as a float tensor (n, s, d) that fits this mixer.

        Raises:
            TypeError: not a float32 or float64 array.
            ValueError: wrong number of axes, wrong s or d, no entries, NaN or infinite entries.
        """
        tokens = float_tensor("tokens", tokens, ("n", "s", "d"))
        for axis, name, letter in ((1, "tokens", "s"), (2, "features", "d")):
            size = getattr(self, name, tokens.shape[axis])
            require(
                tokens.shape[axis] == size, "tokens", f"shape (n, s, d) with {letter} = {size} for {self!r}", tokens
            )
        return tokens


@dataclass(frozen=True)
class SelfAttention(Mixer):
    r"""Self-attention without softmax, :math:`f(X) = \sum_j \sigma(X U_j X^\top) X V_j`; lifted block :math:`d^2 \times dc`.

    Args:
        features: number of features, d.
        outputs: number of outputs, c.

    Source: Sahiner et al. 2022, Theorem 3.1; book, chapter "Self-attention".
    """

    sums, degree = "hidden", 3
    features: int
    outputs: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.features, self.features)

    @property
    def width(self) -> int:
        return self.features

    def hidden(self, tokens: Tensor, u: Tensor) -> Tensor:
        return tokens.unsqueeze(1) @ u @ tokens.mT.unsqueeze(1)

    def values(self, tokens: Tensor) -> Tensor:
        return tokens

    def exact_rows(self, tokens: np.ndarray) -> np.ndarray:
        return _pairs(tokens, tokens)

    def pooled(self, tokens: Tensor, masks: Tensor) -> Contraction | None:
        return mean_queries(tokens, masks, tokens, tokens)


@dataclass(frozen=True)
class CausalSelfAttention(SelfAttention):
    r"""Self-attention in which a token sees itself and those before it: the hidden matrix is lower triangular.

    Args:
        features: number of features, d.
        outputs: number of outputs, c.

    Source: the program is that of self-attention with :math:`L_X U = \operatorname{tril}(X U X^\top)`.
    """

    sums, degree = "hidden", 3

    def hidden(self, tokens: Tensor, u: Tensor) -> Tensor:
        return super().hidden(tokens, u).tril()

    def exact_rows(self, tokens: np.ndarray) -> np.ndarray:
        n, s, d = tokens.shape
        seen = np.tri(s, dtype=int).astype(object)[None, :, :, None]
        return (super().exact_rows(tokens).reshape(n, s, s, d * d) * seen).reshape(-1, d * d)

    def pooled(self, tokens: Tensor, masks: Tensor) -> Contraction | None:
        s = tokens.shape[1]
        return mean_queries(tokens, masks.expand(-1, -1, s, s).tril(), tokens, tokens)


@dataclass(frozen=True)
class CrossAttention(Mixer):
    r"""Attention of one token set to another, :math:`f(X, Y) = \sum_j \sigma(X U_j Y^\top) Y V_j`.

    The two sets are given one behind the other along the token axis.

    Args:
        features: number of features, d.
        outputs: number of outputs, c.
        queries: number of leading tokens that form X; the rest are keys and values Y.

    Source: the program is that of self-attention with two token sets.
    """

    sums, degree = "hidden", 3
    features: int
    outputs: int
    queries: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.features, self.features)

    @property
    def width(self) -> int:
        return self.features

    def hidden(self, tokens: Tensor, u: Tensor) -> Tensor:
        return tokens[:, None, : self.queries] @ u @ self.values(tokens).mT.unsqueeze(1)

    def values(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.queries :]

    def exact_rows(self, tokens: np.ndarray) -> np.ndarray:
        return _pairs(tokens[:, : self.queries], tokens[:, self.queries :])

    def pooled(self, tokens: Tensor, masks: Tensor) -> Contraction | None:
        keys = self.values(tokens)
        return mean_queries(tokens[:, : self.queries], masks, keys, keys)

    def check(self, tokens: object) -> Tensor:
        tokens = super().check(tokens)
        require(tokens.shape[1] > self.queries, "tokens", f"more than queries = {self.queries} tokens", tokens)
        return tokens


@dataclass(frozen=True)
class MLPMixer(Mixer):
    r"""MLP-Mixer, :math:`f(X) = \sum_j \sigma(W_j X) V_j`; lifted block :math:`s^2 \times dc`.

    Args:
        tokens: number of tokens, s.
        features: number of features, d.
        outputs: number of outputs, c.

    Source: Sahiner et al. 2022, section 4; book, chapter "MLP-Mixer".
    """

    sums, degree = "hidden", 1
    tokens: int
    features: int
    outputs: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.tokens, self.tokens)

    @property
    def width(self) -> int:
        return self.features

    def hidden(self, tokens: Tensor, u: Tensor) -> Tensor:
        return u @ tokens.unsqueeze(1)

    def values(self, tokens: Tensor) -> Tensor:
        return torch.eye(self.features, dtype=tokens.dtype, device=tokens.device).expand(len(tokens), -1, -1)

    def exact_rows(self, tokens: np.ndarray) -> np.ndarray:
        n, s, d = tokens.shape
        rows = np.zeros((n, s, d, s, s), dtype=object)  # entry (a, j) of W X is row a of W times column j of X
        for a in range(s):
            rows[:, a, :, a] = tokens.transpose(0, 2, 1)
        return rows.reshape(-1, s * s)


@dataclass(frozen=True)
class FNO(Mixer):
    r"""Fourier neural operator, :math:`f(X) = \sum_j \sigma\big(\sum_k X_{:,k} \circledast u_{j,:,k}\big) v_j^\top`; lifted block :math:`sd \times c`.

    The circular convolution runs through the fast Fourier transform; :func:`circulant_hidden` is its slow twin.

    Args:
        tokens: number of tokens, s.
        features: number of features, d.
        outputs: number of outputs, c.

    Source: Sahiner et al. 2022, section 4; book, chapter "FNO".
    """

    sums, degree = "rows", 1  # the transform mixes entries of all sizes
    tokens: int
    features: int
    outputs: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.tokens, self.features)

    @property
    def width(self) -> int:
        return 1

    def hidden(self, tokens: Tensor, u: Tensor) -> Tensor:
        if not len(tokens) or not len(u):
            # torch's transform of nothing fails on some versions (2.8, 2.10 and 2.14 on a CPU), its derivative on more
            return u[:, :, :1].expand(len(tokens), -1, -1, -1)
        spectra = torch.einsum("nfd,mfd->nmf", torch.fft.rfft(tokens, dim=1), torch.fft.rfft(u, dim=1))
        return torch.fft.irfft(spectra, n=tokens.shape[1], dim=2).unsqueeze(3)

    def values(self, tokens: Tensor) -> Tensor:
        return tokens.new_ones(len(tokens), 1, 1)

    def rows(self, tokens: Tensor) -> Tensor:
        s = tokens.shape[1]
        positions = torch.arange(s, device=tokens.device)
        shift = (positions - positions.unsqueeze(1)) % s  # (k, a)
        return tokens[:, shift].movedim(3, 2).flatten(1, 2).unsqueeze(3)

    def exact_rows(self, tokens: np.ndarray) -> np.ndarray:
        _, s, d = tokens.shape
        shift = np.subtract.outer(np.arange(s), np.arange(s)) % s
        return tokens[:, shift].reshape(-1, s * d)


def circulant_hidden(tokens: Tensor, u: Tensor) -> Tensor:
    r"""The hidden vectors of :class:`FNO` by definition, :math:`(x \circledast u)_a = \sum_k x_{(a - k) \bmod s}\, u_k`, summed over features.

    Args:
        tokens: (n, s, d).
        u: (m, s, d).

    Returns:
        (n, m, s, 1), as :meth:`FNO.hidden`, in time :math:`O(s^2)` instead of :math:`O(s \log s)`.
    """
    s = tokens.shape[1]
    positions = torch.arange(s, device=tokens.device)
    shift = (positions.unsqueeze(1) - positions) % s  # (a, k)
    return torch.einsum("nakd,mkd->nma", tokens[:, shift], u).unsqueeze(3)


@dataclass(frozen=True)
class BlockFNO(Mixer):
    r"""Block FNO: B independent FNOs, block b sees features b and writes outputs b; B lifted blocks :math:`sd/B \times c/B` per gate.

    Args:
        tokens: number of tokens, s.
        features: d, a multiple of B.
        outputs: c, a multiple of B.
        blocks: number of blocks, B.

    Source: Sahiner et al. 2022, section 4 (the block-diagonal operator of AFNO); book, chapter "Block FNO".
    """

    sums, degree = "rows", 1
    tokens: int
    features: int
    outputs: int
    blocks: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.features % self.blocks == 0, "blocks", f"a divisor of features = {self.features}", f"{self.blocks}"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.tokens, self.features // self.blocks)

    width = FNO.width
    hidden = FNO.hidden
    values = FNO.values
    rows = FNO.rows
    exact_rows = FNO.exact_rows

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return tokens.chunk(self.blocks, dim=2)


@dataclass(frozen=True)
class MLP(Mixer):
    r"""Two-layer network applied token by token, :math:`f(X) = \sum_j \sigma(X u_j) v_j^\top`; lifted block :math:`d \times c`.

    Args:
        features: number of features, d.
        outputs: number of outputs, c.

    Source: Pilanci and Ergen 2020; book, chapter "Two-layer networks".
    """

    sums, degree = "hidden", 1
    features: int
    outputs: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.features,)

    @property
    def width(self) -> int:
        return 1

    def hidden(self, tokens: Tensor, u: Tensor) -> Tensor:
        return (tokens @ u.mT).mT.unsqueeze(3)

    def values(self, tokens: Tensor) -> Tensor:
        return tokens.new_ones(len(tokens), 1, 1)

    def exact_rows(self, tokens: np.ndarray) -> np.ndarray:
        return tokens.reshape(-1, self.features)


@dataclass(frozen=True)
class Convolution(Mixer):
    r"""Two-layer CNN along the token axis with one output weight per position, :math:`f(X) = \sum_j \sum_k \sigma(\langle X_{k:k+t}, u_j\rangle)\, V_{j,k}`.

    Args:
        tokens: number of tokens, s.
        features: number of features, d.
        outputs: number of outputs, c.
        kernel: t, the number of neighbouring tokens a filter sees.

    Source: Sahiner et al. 2024, Theorem 3.6.
    """

    sums, degree = "hidden", 1
    tokens: int
    features: int
    outputs: int
    kernel: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kernel <= self.tokens, "kernel", f"at most tokens = {self.tokens}", f"{self.kernel}")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.kernel, self.features)

    @property
    def width(self) -> int:
        return self.tokens - self.kernel + 1

    def hidden(self, tokens: Tensor, u: Tensor) -> Tensor:
        return torch.einsum("nkdt,mtd->nmk", tokens.unfold(1, self.kernel, 1), u).unsqueeze(2)

    def values(self, tokens: Tensor) -> Tensor:
        return torch.eye(self.width, dtype=tokens.dtype, device=tokens.device).expand(len(tokens), -1, -1)

    def exact_rows(self, tokens: np.ndarray) -> np.ndarray:
        windows = np.stack([tokens[:, k : k + self.kernel] for k in range(self.width)], 1)
        return windows.reshape(-1, self.p)


def _pairs(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    r"""The rows :math:`x_a \otimes y_b` of queries (n, a, d) and keys (n, h, d)."""
    return (queries[:, :, None, :, None] * keys[:, None, :, None, :]).reshape(-1, queries.shape[2] * keys.shape[2])
