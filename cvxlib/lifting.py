r"""The lifted operator: with its gates fixed, a head is a linear model in the lifted matrices.

For gate g of block b, a mixer's two maps contract over the hidden axis to the design tensor

.. math:: T_{g}[a, (p, w)] = \sum_h D_g[a, h]\, L_X[a, h, p]\, R_X[h, w],
   \qquad f(X)[a, o] = \sum_{g, p, w} T_g[a, (p, w)]\, Z_g[p, (w, o)],

averaged over output positions a when the head is pooled. It is computed once, in chunks of samples; predictions and
gradients are then matrix products.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cvxlib.activations import Activation
from cvxlib.mixers import Mixer

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
    basis = torch.eye(mixer.p, dtype=tokens.dtype, device=tokens.device).reshape(mixer.p, *mixer.shape)
    hidden = mixer.hidden(tokens, basis)  # (n, p, a, h)
    values = mixer.values(tokens)  # (n, h, w)
    n, _, a, h = hidden.shape
    gates = masks.expand(n, -1, a, h).to(tokens.dtype)
    if pooled:
        mean = torch.einsum("ngah,npah->ngph", gates, hidden) / a
        return mean @ values.unsqueeze(1)
    return torch.stack(
        [((hidden * gate.unsqueeze(1)) @ values.unsqueeze(1)).transpose(1, 2) for gate in gates.unbind(1)], 2
    )


@dataclass(frozen=True)
class LiftedOperator:
    r"""The linear map from lifted blocks (K, p, q) to predictions (rows, c), and its adjoint.

    Gates that agree on all the data are one gate, and gates that never open are dropped (unless none ever does), so K may be less than P B.

    Args:
        designs: for each block b the design tensor (rows, K_b, p, w) of its gates.
        gate: (K,) the gate of each lifted block, in order of b.
        block: (K,) the block b of each lifted block.
        outputs: c.
    """

    designs: tuple[Tensor, ...]
    gate: Tensor
    block: Tensor
    outputs: int

    @classmethod
    def build(cls, mixer: Mixer, activation: Activation, tokens: Tensor, pooled: bool) -> LiftedOperator:
        """The operator of a mixer and its gates on tokens (n, s, d)."""
        designs, gate, block = [], [], []
        for b, seen in enumerate(mixer.split(tokens)):
            kept = distinct_gates(mixer, activation, seen, b)
            parts = []
            for part in chunks(mixer, seen, mixer.p + 2 * activation.count):
                masks = activation.masks(mixer, part, b)[:, kept]
                parts.append(block_design(mixer, part, masks, pooled))
            designs.append(torch.cat(parts).flatten(0, 0 if pooled else 1))
            gate += kept
            block += [b] * len(kept)
        device = tokens.device
        return cls(tuple(designs), torch.tensor(gate, device=device), torch.tensor(block, device=device), mixer.outputs)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, p, q) of the lifted blocks."""
        _, _, p, w = self.designs[0].shape
        return len(self.gate), p, w * self.outputs // len(self.designs)

    @property
    def rows(self) -> int:
        """Number of predictions: n when pooled, n times the output positions when not."""
        return len(self.designs[0])

    def zeros(self) -> Tensor:
        """(K, p, q) the lifted zero."""
        return self.designs[0].new_zeros(self.shape)

    def forward(self, z: Tensor) -> Tensor:
        """(rows, c) predictions of lifted blocks (K, p, q)."""
        counts = [design.shape[1] for design in self.designs]
        columns = self.outputs // len(self.designs)
        pairs = zip(self.designs, z.split(counts), strict=True)
        return torch.cat([design.flatten(1) @ part.reshape(-1, columns) for design, part in pairs], 1)

    def adjoint(self, dual: Tensor) -> Tensor:
        """(K, p, q) the adjoint applied to (rows, c)."""
        parts = dual.chunk(len(self.designs), 1)
        return torch.cat(
            [
                (design.flatten(1).mT @ part).reshape(design.shape[1], design.shape[2], -1)
                for design, part in zip(self.designs, parts, strict=True)
            ]
        )


def distinct_gates(mixer: Mixer, activation: Activation, tokens: Tensor, block: int) -> list[int]:
    """Gates of a block that open somewhere and differ from each other somewhere on tokens (n, s, d): the first of equals, and never none."""
    digests = [hashlib.blake2b() for _ in range(activation.count)]
    opens = torch.zeros(activation.count, dtype=torch.bool, device=tokens.device)
    for part in chunks(mixer, tokens, 2 * activation.count):
        masks = activation.masks(mixer, part, block).flatten(2)
        opens |= masks.any(2).any(0)
        for digest, mask in zip(digests, masks.transpose(0, 1).to("cpu", copy=False), strict=True):
            digest.update(mask.contiguous().numpy().data)
    first = {digest.digest(): g for g, digest in reversed(list(enumerate(digests)))}
    return sorted(g for g in first.values() if opens[g]) or [0]
