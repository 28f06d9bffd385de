r"""The networks: heads :math:`f(X) = \sum_j \sigma(L_X u_j)\, R_X V_j` as torch modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cvxlib.ground.checks import instance, positive_int, require
from cvxlib.model.activations import Activation
from cvxlib.model.mixers import Mixer


class Head(nn.Module):
    r"""A head with any number of neurons: the (non-convex) network whose global optimum the convex program finds.

    Args:
        mixer: how tokens are mixed.
        activation: which gates pass.
        u: (m, \*mixer.shape) first-layer weights.
        v: (m, w, c / B) second-layer weights.
        gate: (m,) gate of each neuron.
        block: (m,) block of each neuron.
        pool: ``"mean"`` averages the predictions over output positions, ``None`` keeps them.

    Raises:
        ValueError: weights whose shapes do not fit the mixer or each other, or an unknown gate or block.
    """

    def __init__(
        self,
        mixer: Mixer,
        activation: Activation,
        u: Tensor,
        v: Tensor,
        gate: Tensor,
        block: Tensor,
        pool: str | None = "mean",
    ) -> None:
        super().__init__()
        instance("mixer", mixer, Mixer, "a Mixer")
        instance("activation", activation, Activation, "an Activation")
        require(pool in ("mean", None), "pool", "'mean' or None", repr(pool))
        activation.check(mixer)
        m = len(u)
        for name, weight, shape in (
            ("u", u, (m, *mixer.shape)),
            ("v", v, (m, mixer.width, mixer.block_outputs)),
            ("gate", gate, (m,)),
            ("block", block, (m,)),
        ):
            require(tuple(weight.shape) == shape, name, f"shape {shape}", weight)
        for name, index, count in (("gate", gate, activation.count), ("block", block, mixer.blocks)):
            require(
                m == 0 or 0 <= int(index.min()) <= int(index.max()) < count, name, f"indices 0 to {count - 1}", index
            )
        self.mixer, self.activation, self.pool = mixer, activation, pool
        self.u = nn.Parameter(u.detach().clone())
        self.v = nn.Parameter(v.detach().clone())
        self.gate: Tensor
        self.block: Tensor
        self.register_buffer("gate", gate.clone())
        self.register_buffer("block", block.clone())

    @classmethod
    def random(
        cls,
        mixer: Mixer,
        activation: Activation,
        heads: int,
        *,
        pool: str | None = "mean",
        scale: float | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Head:
        r"""A head to be trained, with ``heads`` neurons for every gate of every block.

        Entries are normal with standard deviation ``scale``, by default :math:`1/\sqrt{p}` for u and :math:`1/\sqrt{q}` for V.
        """
        generator = torch.Generator().manual_seed(seed)
        m = positive_int("heads", heads) * activation.count * mixer.blocks
        u = torch.randn(m, *mixer.shape, generator=generator, dtype=torch.float64) * (scale or mixer.p**-0.5)
        v = torch.randn(m, mixer.width, mixer.block_outputs, generator=generator, dtype=torch.float64) * (
            scale or mixer.q**-0.5
        )
        gate = torch.arange(activation.count).repeat(mixer.blocks * heads)
        block = torch.arange(mixer.blocks).repeat_interleave(activation.count * heads)
        return cls(mixer, activation, u.to(dtype), v.to(dtype), gate, block, pool).to(device)

    def __len__(self) -> int:
        return len(self.u)

    def forward(self, tokens: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Predictions for tokens (n, s, d): (n, c) when pooled, (n, a, c) when not.

        Args:
            tokens: (n, s, d).
            masks: for each of the mixer's blocks gates (n, P, a, h) to take instead of those that the activation finds on these tokens.
        """
        outputs = []
        for b, seen in enumerate(self.mixer.split(tokens)):
            mine = (self.block == b).nonzero().squeeze(1)
            hidden = self.mixer.hidden(seen, self.u[mine])  # (n, m, a, h)
            if masks is None:
                hidden = self.activation.apply(self.mixer, seen, hidden, self.gate[mine], b)
            else:
                hidden = hidden * (masks[b] if masks[b].shape[1] == 1 else masks[b][:, self.gate[mine]])
            projected = self.mixer.values(seen).unsqueeze(1) @ self.v[mine]  # (n, m, h, c / B)
            if self.pool:
                hidden = hidden.mean(2, keepdim=True)
            outputs.append(torch.einsum("nmah,nmhc->nac", hidden, projected))
        predictions = torch.cat(outputs, 2)
        return predictions.squeeze(1) if self.pool else predictions

    def weight_decay(self) -> Tensor:
        r"""The penalty :math:`\tfrac12\sum_j (\|u_j\|^2 + \|V_j\|_F^2)`, to be multiplied by beta."""
        return (self.u.square().sum() + self.v.square().sum()) / 2

    def extra_repr(self) -> str:
        return f"{self.mixer!r}, {self.activation!r}, heads={len(self)}, pool={self.pool!r}"
