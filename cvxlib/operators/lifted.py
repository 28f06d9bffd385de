r"""The lifted operator: with its gates fixed, a head is a linear model in the lifted matrices.

For gate g of block b, a mixer's two maps contract over the hidden axis to the design tensor

.. math:: T_{g}[a, (p, w)] = \sum_h D_g[a, h]\, L_X[a, h, p]\, R_X[h, w],
   \qquad f(X)[a, o] = \sum_{g, p, w} T_g[a, (p, w)]\, Z_g[p, (w, o)],

averaged over output positions a when the head is pooled. It is computed once, in chunks of samples; predictions and
gradients are then matrix products. Where a prediction sees one hidden entry alone, gates only mask the rows of one design tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from cvxlib.ground.one_process import ALONE, OneProcess
from cvxlib.model.mixers import Mixer
from cvxlib.operators.gates import Gates
from cvxlib.operators.maps import BlockMap, BlockOperator, DesignMap, MaskedMap

CHUNK_BYTES = 128 * 2**20


def chunks(mixer: Mixer, tokens: Tensor, heads: int) -> Iterator[Tensor]:
    """Slices of the samples, as one block sees them, whose hidden matrices for ``heads`` heads stay within a fixed budget of memory."""
    probe = mixer.hidden(tokens[:1], tokens.new_zeros(1, *mixer.shape))
    size = max(1, CHUNK_BYTES // (probe.numel() * heads * tokens.element_size()))
    return iter(tokens.split(size))


def block_design(mixer: Mixer, tokens: Tensor, masks: Tensor, pooled: bool) -> Tensor:
    """The design tensor of one block.

    Args:
        mixer: the mixer.
        tokens: (n, s, d) what this block sees.
        masks: (n, P, a, h) gates, in broadcastable form.
        pooled: average over the output positions.

    Returns:
        (n, P, p, w) if pooled, else (n, a, P, p, w).
    """
    hidden = mixer.rows(tokens)  # (n, p, a, h)
    values = mixer.values(tokens)  # (n, h, w)
    n, _, a, h = hidden.shape
    gates = masks.expand(n, -1, a, h).to(tokens.dtype)
    if pooled:
        mean = torch.einsum("ngah,npah->ngph", gates, hidden) / a
        return mean @ values.unsqueeze(1)
    return torch.stack(
        [((hidden * gate.unsqueeze(1)) @ values.unsqueeze(1)).transpose(1, 2) for gate in gates.unbind(1)], 2
    )


class LiftedOperator(BlockOperator):
    r"""The linear map from lifted blocks (K, p, q) to predictions (rows, c), and its adjoint.

    Gates that agree on all the data are one gate, and gates that never open are dropped (unless none ever does), so K may be less than
    P B. The design tensors are formed when they are first needed.

    Args:
        gates: the mixer's gates on the tokens.
        pooled: average over the output positions.
        reduce: sums a tensor over all processes that hold samples; by default there is one.
    """

    def __init__(self, gates: Gates, pooled: bool, reduce: OneProcess = ALONE) -> None:
        self.gates, self.mixer, self.tokens, self.pooled, self.reduce = gates, gates.mixer, gates.tokens, pooled, reduce
        kept, tokens = [distinct_gates(gates, b, reduce) for b in range(self.mixer.blocks)], self.tokens
        #: (K,) the gate of each lifted block, in order of the mixer's blocks
        self.gate = torch.tensor([g for gates in kept for g in gates], device=tokens.device)
        #: (K,) the mixer's block of each lifted block
        self.block = torch.tensor([b for b, gates in enumerate(kept) for _ in gates], device=tokens.device)

    @functools.cached_property
    def maps(self) -> tuple[BlockMap, ...]:
        """For each of the mixer's blocks its map, with the design tensor of its gates."""
        return tuple(self._map(seen, b) for b, seen in enumerate(self.mixer.split(self.tokens)))

    def _map(self, seen: Tensor, b: int) -> BlockMap:
        kept, designs, gates, start = self.gate[self.block == b], [], [], 0
        for part in chunks(self.mixer, seen, self.mixer.p + 2 * self.gates.count):
            masks = self.gates.masks(b, start, start + len(part))[:, kept]
            start += len(part)
            if self.masked:
                each = masks.expand(len(part), -1, self.rows // len(self.tokens), 1)
                gates.append(each.squeeze(3).mT.flatten(0, 1).to(part.dtype))  # (rows, K_b)
                masks = masks.new_ones(1, 1, 1, 1)
            designs.append(block_design(self.mixer, part, masks, self.pooled))
        design = torch.cat(designs).flatten(0, 0 if self.pooled else 1)  # (rows, K_b, p, w)
        if self.masked:
            return MaskedMap(design[:, 0], torch.cat(gates), self.mixer.block_outputs)
        return DesignMap(design, self.mixer.block_outputs)

    @functools.cached_property
    def masked(self) -> bool:
        """Whether gates only mask rows: then one design tensor serves them all."""
        seen = self.mixer.split(self.tokens[:1])[0]
        _, _, a, h = self.mixer.hidden(seen, seen.new_zeros(1, *self.mixer.shape)).shape
        one = h == 1 and (a == 1 or not self.pooled)
        return (
            one and len(self.gate) > self.mixer.blocks and self.mixer.block_outputs <= self.mixer.p * self.mixer.width
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, p, q) of the lifted blocks."""
        return len(self.gate), self.mixer.p, self.mixer.q

    @property
    def bytes(self) -> int:
        """The size of the design tensors, and of the gates where these only mask their rows."""
        k, size = len(self.gate), self.mixer.p * self.mixer.width
        numbers = self.mixer.blocks * size + k if self.masked else k * size
        return self.rows * numbers * self.tokens.element_size()

    @functools.cached_property
    def rows(self) -> int:
        """Number of predictions here: n when pooled, n times the output positions when not."""
        if self.pooled:
            return len(self.tokens)
        seen = self.mixer.split(self.tokens[:1])[0]
        return len(self.tokens) * self.mixer.hidden(seen, seen.new_zeros(1, *self.mixer.shape)).shape[2]

    def zeros(self) -> Tensor:
        """(K, p, q) the lifted zero."""
        return self.tokens.new_zeros(self.shape)


def distinct_gates(gates: Gates, block: int, reduce: OneProcess = ALONE) -> list[int]:
    """Gates of a block that open somewhere and differ from each other somewhere on the tokens: the first of equals, and never none."""
    tokens, start = gates.tokens, 0
    if gates.count == 1:
        return [0]
    # two sums of random 64-bit numbers over the open entries tell masks apart: they add up over chunks and over processes
    generator, same = torch.Generator().manual_seed(1 + reduce.rank), torch.Generator().manual_seed(0)
    digests = torch.zeros(gates.count, 2, dtype=torch.int64, device=tokens.device)
    entry = None
    for part in chunks(gates.mixer, gates.mixer.split(tokens)[block], 9 * gates.count):
        masks = gates.masks(block, start, start + len(part)).flatten(2)  # (n, P, a h)
        start += len(part)
        if entry is None:
            entry = _random_int64(masks.shape[2], same).to(tokens.device)
        per_sample = (masks * entry).sum(2)
        sample = _random_int64(2 * len(part), generator).reshape(2, -1, 1).to(tokens.device)
        digests += (sample * per_sample).sum(1).mT
    found: dict[tuple[int, ...], int] = {}
    for g, digest in reversed(list(enumerate(map(tuple, reduce(digests).tolist())))):
        found[digest] = g
    found.pop((0, 0), None)  # never open
    return sorted(found.values()) or [0]


def _random_int64(count: int, generator: torch.Generator) -> Tensor:
    """Odd 64-bit numbers."""
    return torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1
