"""Hidden matrices: the contraction that every mixer has, from nothing but its two linear maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cvxlib.model.contractions import Contraction
from cvxlib.model.mixers import Mixer


@dataclass(frozen=True)
class HiddenMatrices(Contraction):
    """Any mixer: the hidden matrices themselves, gated and averaged, and their transpose by autograd.

    Args:
        mixer: the mixer.
        tokens: (n, s, d) what the block sees.
        masks: (n, P, a, h) gates, in broadcastable form.
        pooled: average over the output positions.
    """

    name = "hidden matrices"
    mixer: Mixer
    tokens: Tensor
    masks: Tensor
    pooled: bool

    @property
    def rows(self) -> int:
        return len(self.tokens) * (1 if self.pooled else self._hidden(1).shape[2])

    @property
    def flops(self) -> float:
        hidden = self._hidden(1).numel()
        # a matrix product over the shape of u, and the products with the gates and the values
        return 2.0 * hidden * (self.mixer.shape[-1] + 1 + self.mixer.width)

    @property
    def workspace(self) -> float:
        return 4.0 * self._hidden(1).numel() * self.tokens.element_size()

    @property
    def bytes(self) -> int:
        return self.masks.numel()

    def _hidden(self, count: int) -> Tensor:
        n, (_, _, a, h) = len(self.tokens), self.mixer.hidden(self.tokens[:1], self._basis(1)).shape
        return self.tokens.new_empty(1).expand(n, count, a, h)

    def _basis(self, count: int) -> Tensor:
        return self.tokens.new_zeros(count, *self.mixer.shape)

    def features(self, u: Tensor, gate: Tensor) -> Tensor:
        hidden = self.mixer.hidden(self.tokens, u.reshape(-1, *self.mixer.shape)) * self._masks(gate)
        if self.pooled:
            hidden = hidden.mean(2, keepdim=True)
        return (hidden @ self.mixer.values(self.tokens).unsqueeze(1)).transpose(1, 2).flatten(0, 1)

    def transpose(self, weights: Tensor, gate: Tensor) -> Tensor:
        n, m = len(self.tokens), len(gate)
        with torch.enable_grad():
            u = self._basis(m).requires_grad_()
            hidden = self.mixer.hidden(self.tokens, u)
        weights = weights.unflatten(0, (n, -1)).transpose(1, 2)  # (n, m, a or 1, w)
        cotangent = weights @ self.mixer.values(self.tokens).mT.unsqueeze(1)
        cotangent = cotangent * self._masks(gate) / (hidden.shape[2] // weights.shape[2])
        # written out: the derivative of the Fourier transform does not take a view with strides of 0 on torch 2.8
        (out,) = torch.autograd.grad(hidden, u, cotangent.expand_as(hidden).contiguous())
        return out.flatten(1)

    def design(self, gate: int) -> Tensor:
        basis = torch.eye(self.mixer.p, dtype=self.tokens.dtype, device=self.tokens.device)
        return self.features(basis, torch.full((self.mixer.p,), gate))

    def split(self, step: int) -> list[Contraction]:
        pairs = zip(self.tokens.split(step), self.masks.split(step), strict=True)
        return [HiddenMatrices(self.mixer, tokens, masks, self.pooled) for tokens, masks in pairs]

    def _masks(self, gate: Tensor) -> Tensor:
        return self.masks if self.masks.shape[1] == 1 else self.masks[:, gate.to(self.masks.device)]
