r"""Better heads: for fixed gates by alternating ridge regressions, for ReLU by a group lasso over neurons that the data suggest.

For neurons of fixed directions the network's best weights are a convex problem,
:math:`\min_V \tfrac1n \sum_i \ell(\sum_j F_j V_j) + \beta \sum_j \|V_j\|_F` with :math:`F_j = \sigma(L_X u_j) R_X` and :math:`\|u_j\| = 1`.
Floats do everything here; what they find is a head, and heads are judged in exact arithmetic.
"""

from __future__ import annotations

import numpy as np
import torch

import cvxlib
from benchmarks.campaign.exact import Dyadic, ExactProgram


def polished(exact: ExactProgram, head: cvxlib.Head, sweeps: int = 12) -> cvxlib.Head:
    """A head of fixed gates, squared loss and one mixer block after alternating ridge regressions on its two layers."""
    mixer, weights = exact.mixer, np.sqrt(exact.n * exact.program.beta)
    scale = exact.positions if exact.pooled else 1
    designs = [lifted.floats() / scale for _, lifted in exact.design()]
    m, u, v = len(head), head.u.detach().double().numpy().reshape(len(head), -1), head.v.detach().double().numpy()
    lifted = np.stack([designs[g] for g in head.gate.tolist()])  # (m, rows, p, w)
    for _ in range(sweeps):
        by_v = np.einsum("jrpw,jp->rjw", lifted, u).reshape(len(exact.targets), -1)
        v = _ridge(by_v, exact.targets, weights).reshape(m, mixer.width, mixer.outputs)
        by_u = np.einsum("jrpw,jwc->rcjp", lifted, v).reshape(-1, m * mixer.p)
        u = _ridge(by_u, exact.targets.reshape(-1, 1), weights).reshape(m, mixer.p)
    return _head(exact, u, v, head.gate, head.block)


def _ridge(features: np.ndarray, targets: np.ndarray, weight: float) -> np.ndarray:
    stacked = np.concatenate([features, weight * np.eye(features.shape[1])])
    return np.linalg.lstsq(
        stacked, np.concatenate([targets, np.zeros((features.shape[1], targets.shape[1]))]), rcond=1e-300
    )[0]


def relu_heads(exact: ExactProgram, rng: np.random.Generator, rounds: int = 3) -> list[cvxlib.Head]:
    """Heads for a ReLU program with one mixer block, one after every round of new neurons."""
    left, right = (Dyadic(part, degree).floats() for part, degree in _scaled_maps(exact))
    rows = left.reshape(-1, exact.mixer.p)
    directions = _unit(_suggested(rows, rng))
    weights = np.zeros((len(directions), exact.mixer.width, exact.mixer.outputs))
    found = []
    for _ in range(rounds):
        features = _features(exact, left, right, directions)
        weights = _group_lasso(exact, features, weights)
        length = np.sqrt((weights**2).sum((1, 2)))
        kept = length > 0
        root = np.sqrt(length[kept])[:, None]
        block = torch.zeros(int(kept.sum()), dtype=torch.long)
        found.append(_head(exact, directions[kept] * root, weights[kept] / root[:, :, None], block, block))
        residual = _gradient(exact, np.einsum("jrw,jwc->rc", features, weights))
        new = _ascent(exact, left, right, residual, directions[rng.integers(0, len(directions), 6)])
        directions = np.concatenate([directions[kept], new, directions[~kept]])[:48]
        weights = np.concatenate([weights[kept], np.zeros((48, *weights.shape[1:]))])[: len(directions)]
    return found


def _scaled_maps(exact: ExactProgram) -> list[tuple[np.ndarray, int]]:
    ((left, right),) = exact.maps
    attention = isinstance(exact.mixer, cvxlib.SelfAttention | cvxlib.CrossAttention)
    step = exact.exponent // 3 if attention else exact.exponent
    return [(left, exact.exponent - step if attention else step), (right, step if attention else 0)]


def _suggested(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Directions: features, what is random once columns and rows are of one size, and the edges of the arrangement."""
    p = rows.shape[1]
    columns = np.abs(rows).max(0)
    columns = np.where(columns > 0, columns, 1.0)
    even = rows / columns
    height = np.abs(even).max(1, keepdims=True)
    even = even[height[:, 0] > 0] / height[height[:, 0] > 0]
    found = [np.eye(p), rng.standard_normal((6, p)) / columns, rng.standard_normal((4, p))]
    if p > 1 and len(even) >= p - 1:
        for _ in range(8):
            chosen = even[rng.choice(len(even), p - 1, replace=False)]
            found.append(np.linalg.svd(chosen)[2][-1:] / columns)
    found = np.concatenate(found)
    return np.concatenate([found, -found])


def _unit(directions: np.ndarray) -> np.ndarray:
    directions = directions / np.abs(directions).max(1, keepdims=True)
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def _features(exact: ExactProgram, left: np.ndarray, right: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """(m, rows, w) what neurons of the given directions (m, p) offer their second layer."""
    hidden = np.maximum(np.einsum("nahp,jp->jnah", left, directions), 0)
    if exact.pooled:
        hidden = hidden.mean(2, keepdims=True)
    features = np.einsum("jnah,nhw->jnaw", hidden, right)
    return features.reshape(len(directions), -1, exact.mixer.width)


def _gradient(exact: ExactProgram, predictions: np.ndarray) -> np.ndarray:
    if exact.squared:
        return predictions - exact.targets
    exponentials = np.exp(predictions - predictions.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True) - np.eye(exact.mixer.outputs)[exact.targets]


def _group_lasso(exact: ExactProgram, features: np.ndarray, weights: np.ndarray, sweeps: int = 40) -> np.ndarray:
    """Block descent: a proximal step for one neuron after the other, over those in use and now and then over all."""
    beta, n, smooth = exact.program.beta, exact.n, 1.0 if exact.squared else 0.5
    curvature = np.array([smooth * np.linalg.norm(f, 2) ** 2 / n for f in features])
    usable = (curvature > 0) & np.isfinite(curvature)
    if not weights.any():
        weights = _best_alone(exact, features, curvature, usable)
    predictions = np.einsum("jrw,jwc->rc", features, weights)
    for sweep in range(sweeps):
        for j in np.flatnonzero(usable if sweep % 10 == 0 else usable & weights.any((1, 2))):
            old = weights[j]
            target = old - features[j].T @ _gradient(exact, predictions) / n / curvature[j]
            length = np.sqrt((target**2).sum())
            new = target * max(0.0, 1 - beta / curvature[j] / length) if length > 0 else target
            if (new != old).any():
                predictions = predictions + features[j] @ (new - old)
                weights[j] = new
    return weights


def _best_alone(exact: ExactProgram, features: np.ndarray, curvature: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Weights of the one neuron that lowers the objective's quadratic bound at 0 most: for squared loss and w = 1 the best one alone."""
    weights = np.zeros((*features.shape[::2], exact.mixer.outputs))
    gradient = _gradient(exact, np.zeros((len(exact.targets), exact.mixer.outputs))) / exact.n
    pull = -np.einsum("jrw,rc->jwc", features, gradient)
    length = np.sqrt((pull**2).sum((1, 2)))
    excess = np.where(usable, np.maximum(length - exact.program.beta, 0), 0)
    safe = np.where(usable, curvature, 1.0)
    j = int(np.argmax(excess / np.sqrt(safe)))
    if excess[j] > 0:
        weights[j] = pull[j] * (excess[j] / length[j] / safe[j])
    return weights


def _ascent(exact, left, right, residual, starts: np.ndarray, steps: int = 6) -> np.ndarray:
    """Directions whose neurons the residual asks for: with the gates that u opens, the best u is a singular vector."""
    residual = residual.reshape(exact.n, -1, exact.mixer.outputs)
    found = []
    for u in starts:
        for _ in range(steps):
            open_left = left * ((left @ u) >= 0)[..., None]
            if exact.pooled:
                open_left = open_left.mean(1, keepdims=True)
            matrix = np.einsum("nahp,nhw,nac->pwc", open_left, right, residual).reshape(exact.mixer.p, -1)
            if not np.isfinite(matrix).all() or not matrix.any():
                break
            top = np.linalg.svd(matrix / np.abs(matrix).max())[0][:, 0]
            u = top if (left @ top >= 0).mean() >= 0.5 else -top
        found += [u, -u]
    return np.stack(found)


def _head(exact: ExactProgram, u: np.ndarray, v: np.ndarray, gate: torch.Tensor, block: torch.Tensor) -> cvxlib.Head:
    program = exact.program
    weights = torch.tensor(u).reshape(-1, *program.mixer.shape), torch.tensor(v)
    return cvxlib.Head(program.mixer, program.activation, *weights, gate, block, pool=program.pool)
