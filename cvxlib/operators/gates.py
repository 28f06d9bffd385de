r"""The gates of a program: boolean masks on its own samples, decided once and in one precision.

Whether an entry of :math:`L_X h` is at least 0 can depend on the order in which a machine adds where the entry is all but 0. A program is
a statement about masks, so these are computed in float64 from the tokens as they are, by the same chunks of samples every time, and every
part of a solve and of an audit is given the same.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cvxlib.model.activations import Activation
from cvxlib.model.mixers import Mixer

#: bytes of hidden matrices that are computed at once
CHUNK_BYTES = 64 * 2**20
#: bytes of masks that are kept; more are computed anew, by the same chunks
KEPT_BYTES = 256 * 2**20


class GatesByRounding(UserWarning):
    """Some gates are decided by rounding errors: other hardware, or the features in another order, may give another program."""


@dataclass(frozen=True)
class Margin:
    """How clearly the gates are decided.

    Args:
        entries: number of entries of all :math:`L_X h`.
        close: of how many the sign may be that of a rounding error.
        least: the smallest :math:`|L_X h|` over the bound on its rounding; below 1 for those.
    """

    entries: int
    close: int
    least: float


class Gates:
    """Gates on the tokens of one program.

    Args:
        mixer: the mixer.
        activation: says which entries pass.
        tokens: (n, s, d) all samples, perhaps memory-mapped.
    """

    def __init__(self, mixer: Mixer, activation: Activation, tokens: Tensor) -> None:
        self.mixer, self.activation, self.tokens = mixer, activation, tokens
        self._kept: dict[int, Tensor] = {}
        self._told = False

    @property
    def count(self) -> int:
        """P, the number of gates."""
        return self.activation.count

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """(a, h) of a hidden matrix."""
        seen = self.mixer.split(self.tokens[:1])[0]
        _, _, a, h = self.mixer.hidden(seen, seen.new_zeros(1, *self.mixer.shape)).shape
        return a, h

    @functools.cached_property
    def step(self) -> int:
        """Samples of a chunk."""
        a, h = self.shape
        return max(1, CHUNK_BYTES // (8 * self.count * a * h))

    def masks(self, block: int, start: int, stop: int) -> Tensor:
        """(stop - start, P, a, h) which entries pass, for consecutive samples of one of the mixer's blocks; in broadcastable form."""
        if block not in self._kept and self._size <= KEPT_BYTES:
            self._kept[block] = self._computed(block, 0, len(self.tokens))
        if block in self._kept:
            return self._kept[block][start:stop]
        first = start - start % self.step
        return self._computed(block, first, stop)[start - first :]

    @functools.cached_property
    def _size(self) -> int:
        one = self.activation.masks(self.mixer, self.mixer.split(self.tokens[:1].double())[0], 0)
        return len(self.tokens) * one.numel() * self.mixer.blocks

    def _computed(self, block: int, start: int, stop: int) -> Tensor:
        return torch.cat([self.activation.masks(self.mixer, seen, block) for seen in self._chunks(block, start, stop)])

    def _chunks(self, block: int, start: int, stop: int) -> Iterator[Tensor]:
        for first in range(start, stop, self.step):
            yield self.mixer.split(self.tokens[first : min(first + self.step, stop)].double())[block]

    def warn_if_close(self) -> None:
        """Warn, once, where rounding decides gates."""
        if not self._told and self.margin.close:
            self._told = True
            warnings.warn(
                f"gates: {self.margin.close} of {self.margin.entries} entries of L_X h are within rounding of 0 (the nearest at "
                f"{self.margin.least:.1g} times its rounding). The certificate is about the masks as computed here; the same features in "
                "another order may give others. Directions drawn at random, or shifted a little, decide all gates",
                GatesByRounding,
                stacklevel=4,
            )

    @functools.cached_property
    def margin(self) -> Margin:
        """How clearly they are decided."""
        entries, close, least = 0, 0, float("inf")
        for block in range(self.mixer.blocks):
            for seen in self._chunks(block, 0, len(self.tokens)):
                ratios = self.activation.decided(self.mixer, seen, block)
                if ratios is not None:
                    entries, close = entries + ratios.numel(), close + int((ratios < 1).sum())
                    least = min(least, float(ratios.min()))
        return Margin(entries, close, least)
