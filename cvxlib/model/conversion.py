r"""From gated ReLU to ReLU: the same predictions from neurons that open their own gates."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cvxlib.geometry.arrangements import Hyperplanes, inner_point
from cvxlib.geometry.cones import facets, split
from cvxlib.ground.checks import instance, wrong_value
from cvxlib.model.activations import GatedReLU, ReLU
from cvxlib.model.heads import Head
from cvxlib.model.stacked import exact_rows


def gated_to_relu(head: Head, tokens: Tensor) -> Head:
    r"""The ReLU network that equals a gated ReLU network on given tokens.

    Every neuron's :math:`u = u_+ - u_-` becomes two, both inside the cone of its gate on these tokens, where ReLU and the gate agree;
    :math:`\|u_+\| + \|u_-\|` is the least possible (:func:`cvxlib.geometry.cones.split`). On other tokens the two networks may differ.

    Args:
        head: a head with :class:`cvxlib.GatedReLU`.
        tokens: (n, s, d) the tokens on which the two are to agree, the training data.

    Returns:
        A head with :class:`cvxlib.ReLU` and at most twice the neurons, in the tokens' dtype.

    Raises:
        TypeError: ``head`` is not a head with gated ReLU.
        ValueError: the cone of a gate has no inside (its direction lies on a hyperplane of the data, say), so it may not span u-space.

    Source: Mishkin, Sahiner and Pilanci 2022, section 3 (cone decomposition); book, chapter "ReLU and its cones".
    """
    instance("head", head, Head, "a cvxlib.Head with GatedReLU")
    instance("head", head.activation, GatedReLU, "a cvxlib.Head with GatedReLU")
    mixer, tokens = head.mixer, head.mixer.check(tokens)
    us, vs, blocks = [], [], []
    for b, seen in enumerate(mixer.split(tokens.double())):
        planes = Hyperplanes(exact_rows(mixer, seen))
        basis, normals = planes.basis, planes.normals @ planes.basis.T
        masks = head.activation.masks(mixer, seen, b).expand(
            -1, -1, *mixer.hidden(seen[:1], seen.new_zeros(1, *mixer.shape)).shape[2:]
        )
        cutting = planes.side != 0  # rows of zeros cut nothing
        patterns = masks.movedim(1, -1).flatten(0, -2).cpu().numpy()[cutting]  # (R, P), in the order of the rows
        rows = (planes.side[:, None] * normals[planes.plane])[cutting] if len(planes) else normals
        cones: dict[int, np.ndarray] = {}
        for j in (head.block == b).nonzero().squeeze(1).tolist():
            g = int(head.gate[j])
            if g not in cones:
                inside = inner_point(np.where(patterns[:, g], 1.0, -1.0)[:, None] * rows)
                if inside is None:
                    raise wrong_value(
                        "head", "gates whose cones on these tokens have an inside", f"gate {g}, whose cone has none"
                    )
                cones[g] = facets(np.sign(normals @ inside)[:, None] * normals)
            u, v = basis @ head.u[j].detach().double().flatten().cpu().numpy(), head.v[j].detach()
            for part, sign in zip(split(u, cones[g]), (1.0, -1.0), strict=True):
                long, wide = float(np.linalg.norm(part)), float(v.norm())
                if long * wide > 0:
                    root = (wide / long) ** 0.5
                    us.append(torch.as_tensor(root * part @ basis).reshape(mixer.shape))
                    vs.append(sign * v.double().cpu() / root)
                    blocks.append(b)
    u = torch.stack(us) if us else torch.zeros(0, *mixer.shape)
    v = torch.stack(vs) if vs else torch.zeros(0, *head.v.shape[1:])
    block = torch.tensor(blocks, dtype=torch.long)
    return Head(mixer, ReLU(), u.to(tokens), v.to(tokens), torch.zeros_like(block), block, head.pool).to(tokens.device)
