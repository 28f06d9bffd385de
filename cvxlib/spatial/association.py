r"""What a mixing of patches has learned of the sets: patch association, and the scalars alpha, gamma, rho."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cvxlib.ground.checks import float_tensor, require
from cvxlib.spatial.data import check_sets, membership


def patch_association(scores: Tensor, sets: Tensor) -> float:
    r"""The share of each patch's C best-scored patches that lie in its own set, averaged over patches.

    .. math:: \frac1D \sum_{i=1}^D \frac{|\operatorname{Top}_C(A_{i,:}) \cap S_{l(i)}|}{C}

    1 is patch association in the sense of the paper's Definition 2.2. Scores that tie for the last places count with the
    probability that a random choice among them would give, so that a constant matrix has exactly C / D.

    Args:
        scores: (D, D) row i scores the patches from the point of view of patch i.
        sets: (L, C) patch indices of each set.

    Returns:
        A number from 0 to 1.

    Raises:
        TypeError, ValueError: scores that are not a finite square float matrix of the sets' size; sets that are no partition.

    Source: Jelassi, Sander and Li 2022, Definition 2.2; book, chapter "Spatial structure".
    """
    scores, sets = float_tensor("scores", scores, ("D", "D")), check_sets(sets)
    count, size = sets.numel(), sets.shape[1]
    require(tuple(scores.shape) == (count, count), "scores", f"shape ({count}, {count}) for these sets", scores)
    own = _same_set(sets.to(scores.device)).double()
    last = scores.topk(size, dim=1).values[:, -1:]
    above, tied = (scores > last).double(), (scores == last).double()
    share = (size - above.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
    return float(((above + share * tied) * own).sum(1).mean() / size)


def set_coherence(scores: Tensor, sets: Tensor) -> float:
    r"""As :func:`patch_association`, but with the best set for each patch in place of its own.

    .. math:: \frac1D \sum_{i=1}^D \max_l \frac{|\operatorname{Top}_C(A_{i,:}) \cap S_l|}{C}

    High coherence with low association: patches attend to whole sets, only not to their own.

    Args:
        scores: (D, D), taken in the order of ``torch.topk`` where they tie.
        sets: (L, C).

    Source: book, chapter "Spatial structure".
    """
    scores, sets = float_tensor("scores", scores, ("D", "D")), check_sets(sets)
    count, size = sets.numel(), sets.shape[1]
    require(tuple(scores.shape) == (count, count), "scores", f"shape ({count}, {count}) for these sets", scores)
    chosen = membership(sets).to(scores.device)[scores.topk(size, dim=1).indices]  # (D, C)
    counts = torch.nn.functional.one_hot(chosen, len(sets)).sum(1)
    return float(counts.amax(1).double().mean() / size)


def chance_association(sets: Tensor, own_first: bool = False) -> float:
    r"""The expected association of random scores: C / D, or :math:`\frac1C\big(1 + \frac{(C-1)^2}{D-1}\big)` where each patch ranks itself first."""
    sets = check_sets(sets)
    count, size = sets.numel(), sets.shape[1]
    return (1 + (size - 1) ** 2 / (count - 1)) / size if own_first else size / count


@dataclass(frozen=True)
class Scalars:
    r"""The three numbers in which the training dynamics are told.

    Args:
        alpha: :math:`\langle v, w^\star\rangle`, the value vector along the signal.
        gamma: mean score between different patches of one set.
        rho: mean score between patches of different sets.
    """

    alpha: float
    gamma: float
    rho: float


def attention_scalars(scores: Tensor, value: Tensor, signal: Tensor, sets: Tensor) -> Scalars:
    r"""The scalars :math:`\alpha = \langle v, w^\star\rangle`, :math:`\gamma` (within sets) and :math:`\rho` (between sets).

    Args:
        scores: (D, D).
        value: (d,) the value vector v.
        signal: (d,) :math:`w^\star`.
        sets: (L, C).

    Returns:
        Means over the entries of each kind; with L = 1 rho, and with C = 1 gamma, is NaN.

    Source: Jelassi, Sander and Li 2022, section 4; book, chapter "Spatial structure".
    """
    scores, sets = float_tensor("scores", scores, ("D", "D")), check_sets(sets)
    same = _same_set(sets.to(scores.device))
    within = same & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return Scalars(float(value @ signal), float(scores[within].mean()), float(scores[~same].mean()))


def _same_set(sets: Tensor) -> Tensor:
    """(D, D) whether two patches share a set."""
    index = membership(sets)
    return index.unsqueeze(1) == index
