"""What is measured of a network in the transfer experiment: predictions, accuracies, rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvxlib.audit.certificates import predict
from cvxlib.ground.checks import needs_extra, wrong_type
from cvxlib.model.activations import ReLU
from cvxlib.model.baselines import LinearHead, SoftmaxAttention
from cvxlib.model.heads import Head

#: singular values below this fraction of the largest do not count for the rank
RANK_TOLERANCE = 1e-3


@torch.no_grad()
def logits_of(network: nn.Module, tokens: Tensor) -> Tensor:
    """Predictions (n, c) of any network for tokens (n, s, d), in parts of bounded memory."""
    if isinstance(network, Head):
        return predict(network, tokens)
    return torch.cat([network(part) for part in tokens.split(200)])


def top_k_accuracy(logits: Tensor, labels: Tensor, classes: int, k: int) -> float:
    """Share of samples whose class is among the k largest logits (n, c); k is at most the number of classes."""
    with needs_extra("accuracies", "vision"):
        from torchmetrics.functional.classification import multiclass_accuracy

    accuracy = multiclass_accuracy(logits.nan_to_num(), labels, classes, average="micro", top_k=min(k, classes))
    return round(float(accuracy), 6)  # it comes in single precision


@torch.no_grad()
def rank_of(network: nn.Module) -> int:
    r"""The number of neurons that matter, counted where singular values exceed :data:`RANK_TOLERANCE` of the largest.

    For fixed gates those of the lifted matrices :math:`\sum_j u_j \operatorname{vec}(V_j)^\top`, one for each gate and block; for ReLU and
    softmax, whose neurons cannot be merged, the sizes :math:`\|u_j\| \|V_j\|`; for the linear head those of its matrix.
    """
    if isinstance(network, LinearHead):
        sizes = torch.linalg.svdvals(network.weight)
    elif isinstance(network, Head) and not isinstance(network.activation, ReLU):
        found = []
        for slot in torch.stack([network.block, network.gate]).unique(dim=1).T:
            mine = (network.block == slot[0]) & (network.gate == slot[1])
            # the singular values of U^T V without forming it
            left, right = (torch.linalg.qr(w[mine].flatten(1).T).R for w in (network.u, network.v))
            found.append(torch.linalg.svdvals(left @ right.T))
        sizes = torch.cat(found) if found else torch.zeros(0)
    else:
        if not isinstance(network, (Head, SoftmaxAttention)):
            raise wrong_type("network", "a head of this package or a baseline", network)
        sizes = network.u.flatten(1).norm(dim=1) * network.v.flatten(1).norm(dim=1)
    return int((sizes > RANK_TOLERANCE * sizes.max()).sum()) if len(sizes) else 0
