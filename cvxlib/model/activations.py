r"""Activations as sets of gates: which entries of the hidden matrix pass.

Once the gates are fixed the head is linear in the lifted matrices. Gates are boolean masks
``(n, P, a, h)`` on the hidden matrices, one per gate, and may be given in broadcastable form.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from cvxlib.geometry.arrangements import PARALLEL, enumerate_patterns
from cvxlib.ground.checks import FLOATS, instance, positive_int, require, wrong_type
from cvxlib.ground.identity import Part, own
from cvxlib.model.mixers import Mixer
from cvxlib.model.stacked import exact_rows


class Activation(Part, abc.ABC):
    """A set of P gates: a frozen value, equal to another of its class with equal fields."""

    if TYPE_CHECKING:  # to be read alone: a subclass says it by an attribute, a field or a property

        @property
        @abc.abstractmethod
        def count(self) -> int:
            """P, the number of gates."""

    #: whether the gates are given; those of a ReLU follow from each u
    fixed: ClassVar[bool] = True

    @abc.abstractmethod
    def masks(self, mixer: Mixer, tokens: Tensor, block: int = 0) -> Tensor:
        """(n, P, a, h) gates on the hidden matrices of one of the mixer's blocks, for that block's tokens (n, s, d)."""

    def decided(self, mixer: Mixer, tokens: Tensor, block: int = 0) -> Tensor | None:
        """(n, P, a, h) by how many times what rounding can change each number is away from where its gate turns; ``None`` if no number decides."""
        return None

    def apply(self, mixer: Mixer, tokens: Tensor, hidden: Tensor, gate: Tensor, block: int = 0) -> Tensor:
        """(n, m, a, h) what passes of the hidden matrices of m neurons of a block, neuron j through ``gate[j]``."""
        return hidden * self.masks(mixer, tokens, block)[:, gate]

    def gates(self, mixer: Mixer, tokens: Tensor) -> Activation:
        """The gates of the convex program on tokens (n, s, d)."""
        return self

    @abc.abstractmethod
    def check(self, mixer: Mixer) -> None:
        """Raise a ``ValueError`` if this activation does not fit the mixer."""


@dataclass(frozen=True)
class Linear(Activation):
    r"""No activation, :math:`\sigma(z) = z`: one gate, always open."""

    count = 1

    def masks(self, mixer: Mixer, tokens: Tensor, block: int = 0) -> Tensor:
        return torch.ones(len(tokens), 1, 1, 1, dtype=torch.bool, device=tokens.device)

    def check(self, mixer: Mixer) -> None:
        """Every mixer is linear without an activation."""


@dataclass(frozen=True, repr=False)
class GatedReLU(Activation):
    r"""Gated ReLU, :math:`\sigma_g(L_X u) = \mathbb 1\{L_X h_g \ge 0\} \odot L_X u` with fixed directions :math:`h_g`.

    Args:
        directions: (P, \*direction_shape of the mixer): (P, d, d) for attention, (P, s, s) for MLP-Mixer, (P, s, d) for FNO,
            (P, B, s, d/B) for block FNO, (P, d) for MLP. Float tensor or array, of which the gates keep a copy.

    Raises:
        TypeError: ``directions`` is not a float32 or float64 array.
        ValueError: it is empty or not finite.

    Source: Mishkin, Sahiner and Pilanci 2022; book, chapter "Arrangements and gates".
    """

    directions: Tensor

    def __post_init__(self) -> None:
        expected = "a float32 or float64 array of shape (P, *direction shape of the mixer)"
        try:
            directions = torch.as_tensor(self.directions)
        except (TypeError, ValueError, RuntimeError):
            raise wrong_type("directions", expected, self.directions) from None
        if directions.dtype not in FLOATS:
            raise wrong_type("directions", expected, directions)
        require(directions.ndim >= 2 and directions.numel() > 0, "directions", expected, directions)
        require(bool(torch.isfinite(directions).all()), "directions", "finite entries", "NaN or infinite ones")
        object.__setattr__(self, "directions", own(directions))

    @classmethod
    def sample(cls, mixer: Mixer, count: int, seed: int = 0) -> GatedReLU:
        """Gates with directions drawn from the standard normal distribution.

        Args:
            mixer: the mixer they are for.
            count: number of gates, P.
            seed: of the generator; the same seed gives the same gates on every device.
        """
        instance("mixer", mixer, Mixer, "a Mixer")
        generator = torch.Generator().manual_seed(seed)
        shape = (positive_int("count", count), *mixer.direction_shape)
        return cls(torch.randn(shape, generator=generator, dtype=torch.float64))

    @property
    def count(self) -> int:
        return len(self.directions)

    def check(self, mixer: Mixer) -> None:
        shape = tuple(self.directions.shape[1:])
        require(
            shape == mixer.direction_shape,
            "activation",
            f"directions of shape (P, {', '.join(map(str, mixer.direction_shape))}) for {mixer!r}",
            self.directions,
        )

    def masks(self, mixer: Mixer, tokens: Tensor, block: int = 0) -> Tensor:
        return mixer.hidden(tokens, self._of(mixer, block).to(tokens)) >= 0

    def decided(self, mixer: Mixer, tokens: Tensor, block: int = 0) -> Tensor:
        hidden, size = _hidden_and_size(mixer, tokens, self._of(mixer, block).to(tokens))
        # what is 0 because nothing was added is 0 without rounding
        return torch.where(size > 0, hidden.abs() / ((mixer.p + 8) * torch.finfo(tokens.dtype).eps * size), torch.inf)

    def _of(self, mixer: Mixer, block: int) -> Tensor:
        """(P, *shape) the directions of one of the mixer's blocks."""
        return self.directions if mixer.blocks == 1 else self.directions[:, block]

    def __repr__(self) -> str:
        return f"GatedReLU(directions of shape {tuple(self.directions.shape)})"


@dataclass(frozen=True, repr=False)
class ReLU(Activation):
    r"""ReLU, :math:`\sigma(z) = \max(z, 0)`: every neuron opens its own gates.

    The convex program has one gate for every sign pattern that the data allow, and a norm that keeps u inside the pattern's cone
    (:class:`cvxlib.geometry.norms.BlockConeNorm`).

    Args:
        limit: largest number of sign patterns to enumerate; with more, the certificate falls back on a bound that needs no pattern.
            It changes no network, and ReLUs that differ in it alone are equal.

    Source: Pilanci and Ergen 2020; Sahiner et al. 2022, section 3; book, chapter "ReLU and its cones".
    """

    limit: int = field(default=10_000, compare=False)

    count = 1
    fixed = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", positive_int("limit", self.limit))

    def check(self, mixer: Mixer) -> None:
        """Every mixer takes a ReLU."""

    def masks(self, mixer: Mixer, tokens: Tensor, block: int = 0) -> Tensor:
        raise TypeError(
            "activation: expected one with fixed gates; the gates of a ReLU follow from each u (see ReLU.gates)"
        )

    def apply(self, mixer: Mixer, tokens: Tensor, hidden: Tensor, gate: Tensor, block: int = 0) -> Tensor:
        return hidden.relu()

    def gates(self, mixer: Mixer, tokens: Tensor) -> GatedReLU:
        """Gated ReLU with one direction inside every open cone that tokens (n, s, d) allow.

        Patterns that occur only on a hyperplane of the data (that of u = 0, say) are not among them: a ReLU does not need them, while a
        gated network may do better with such a gate.

        Raises:
            ValueError: there are more patterns than ``limit``.
        """
        directions = []
        for seen in mixer.split(tokens):
            found = enumerate_patterns(exact_rows(mixer, seen), self.limit, PARALLEL)
            expected = "a ReLU with few enough sign patterns on these tokens"
            require(found.complete, "activation", expected, f"more than {self.limit}")
            inner = found.directions.to(seen.device).unflatten(1, mixer.shape)
            apart = _apart(mixer, seen.double(), inner, found.patterns.to(seen.device))
            require(apart, "activation", expected + ", each wide enough for rounding", "cones thinner than that")
            directions.append(inner)
        if mixer.blocks == 1:
            return GatedReLU(directions[0])
        longest = max(map(len, directions))  # blocks with fewer patterns repeat their last one
        padded = [torch.cat([d, d[-1:].expand(longest - len(d), *mixer.shape)]) for d in directions]
        return GatedReLU(torch.stack(padded, 1))

    def __repr__(self) -> str:
        return "ReLU()"


def _apart(mixer: Mixer, tokens: Tensor, directions: Tensor, patterns: Tensor) -> bool:
    """Whether the hidden entries of directions (P, ...) have the signs of the patterns (P, R), and not by rounding alone."""
    hidden, size = _hidden_and_size(mixer, tokens, directions)
    clear = hidden.abs() > 64 * mixer.p * torch.finfo(tokens.dtype).eps * size
    blind = mixer.hidden(tokens.abs(), torch.ones_like(directions[:1])) == 0  # rows of zeros are 0 exactly
    matches = (hidden >= 0) == patterns.reshape(len(patterns), len(tokens), *hidden.shape[2:]).transpose(0, 1)
    return bool((matches & (clear | blind)).all())


def _hidden_and_size(mixer: Mixer, tokens: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """(n, P, a, h) hidden entries, and what they would be if nothing cancelled, which bounds what rounding can change."""
    size = mixer.hidden(tokens.abs(), directions.abs()).abs()
    if mixer.bounded_by != "hidden":  # a transform mixes the entries of a sample
        size = size.amax((2, 3), keepdim=True).expand_as(size)
    return mixer.hidden(tokens, directions), size
