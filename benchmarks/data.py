r"""Seeded synthetic data, made in chunks so that making them needs little more memory than keeping them.

Every value is drawn on the CPU in float32 and then moved: the same seed gives the same data in every dtype and on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

import cvxlib
from cvxlib.audit.certificates import predict

#: samples drawn at a time
CHUNK = 500


def labelled_tokens(
    n: int,
    s: int,
    d: int,
    c: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    r"""Badly conditioned tokens, and the classes that a planted attention head gives them.

    .. math:: x_{i,a} = \tfrac1{\sqrt 2} (g_i + e_{i,a}), \qquad g_i, e_{i,a} \sim \mathcal N(0, \Lambda), \qquad
        \Lambda = \operatorname{diag}(1, \tfrac12, \dots, \tfrac1d) \Big/ \sum_k \tfrac1k

    What the tokens of a sample share, :math:`g_i`, survives pooling. The covariance has trace 1, and its eigenvalues lie along the
    coordinate axes, which suits AdamW's diagonal scaling. Labels are the largest of c scores: those of a random linear attention head
    with 10 neurons, averaged over tokens, each score standardised over the samples, plus noise of standard deviation 0.3.

    Args:
        n, s, d, c: samples, tokens, features, classes.
        seed: of the tokens; the planted head and the noise have seeds derived from it.
        dtype: of the tokens.
        device: where they live.

    Returns:
        (n, s, d) tokens and (n,) labels.
    """
    generator = torch.Generator().manual_seed(seed)
    variances = 1 / torch.arange(1, d + 1)
    scale = (variances / variances.sum() / 2).sqrt()
    tokens = torch.empty(n, s, d, dtype=dtype, device=device)
    for part in tokens.split(CHUNK):
        shared = torch.randn(len(part), 1, d, generator=generator)
        own = torch.randn(len(part), s, d, generator=generator)
        part.copy_((shared + own) * scale)
    planted = cvxlib.Head.random(
        cvxlib.SelfAttention(features=d, outputs=c), cvxlib.Linear(), 10, seed=seed + 1, dtype=dtype, device=device
    )
    scores = predict(planted, tokens).float().cpu()
    scores = (scores - scores.mean(0)) / scores.std(0)
    noise = torch.randn(n, c, generator=torch.Generator().manual_seed(seed + 2))
    return tokens, (scores + 0.3 * noise).argmax(1).to(device)


def token_targets(n: int, s: int, d: int, c: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    r"""Tokens with independent entries of variance 1/d, and one value for each token and output, in float64.

    The values are those of a planted attention head with 4 neurons, standardised, plus noise of standard deviation 0.3.

    Returns:
        (n, s, d) tokens and (n, s, c) targets.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(n, s, d, generator=generator, dtype=torch.float64) / d**0.5
    mixer = cvxlib.SelfAttention(features=d, outputs=c)
    planted = cvxlib.Head.random(mixer, cvxlib.Linear(), 4, pool=None, seed=seed + 1, dtype=torch.float64)
    values = predict(planted, tokens)
    noise = torch.randn(n, s, c, generator=generator, dtype=torch.float64)
    return tokens, values / values.std() + 0.3 * noise


def relu_values(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    r"""Points with standard normal entries, and the standardised output of 20 planted ReLU neurons plus noise, in float64.

    Returns:
        (n, 1, d) points as single tokens and (n, 1) targets.
    """
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, 1, d, generator=generator, dtype=torch.float64)
    mixer = cvxlib.MLP(features=d, outputs=1)
    planted = cvxlib.Head.random(mixer, cvxlib.ReLU(), 20, seed=seed + 1, dtype=torch.float64)
    values = predict(planted, points)
    noise = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return points, (values - values.mean()) / values.std() + 0.3 * noise
