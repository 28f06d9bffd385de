r"""A slow, obvious twin: the convex program written once more for CVXPY, from the papers' formulas alone.

It shares no operator with the rest of the package: plain NumPy, one sample at a time, one case per mixer. It is the oracle that
the solvers are tested against, on problems small enough for an interior-point method.
"""

from __future__ import annotations

import numpy as np

from cvxlib.ground.checks import needs_extra, require
from cvxlib.ground.identity import qualified
from cvxlib.ground.one_process import require_alone
from cvxlib.model.activations import GatedReLU, Linear
from cvxlib.model.losses import CrossEntropy, SquaredLoss
from cvxlib.model.mixers import (
    FNO,
    MLP,
    BlockFNO,
    CausalSelfAttention,
    Convolution,
    CrossAttention,
    Mixer,
    MLPMixer,
    SelfAttention,
)
from cvxlib.program.program import ConvexProgram


def solve(program: ConvexProgram, **options) -> float:
    r"""The optimal value of a program, by CVXPY.

    .. math:: \min_Z \frac1n \sum_i \ell\Big(\sum_k A_{i,k}(Z_k),\, y_i\Big) + \beta \sum_k \|Z_k\|_*

    Args:
        program: a program with one of the package's own mixers and losses, and linear or gated ReLU activation.
        options: passed to :meth:`cvxpy.Problem.solve`; the default solver is Clarabel.

    Returns:
        The optimal value.

    Raises:
        ModuleNotFoundError: CVXPY is not installed (``pip install "cvxlib[reference]"``).
        ValueError: a mixer, an activation or a loss whose formula is not written down here (one of your own among them, whatever it is
            called and whatever it inherits from), or samples that other processes hold.
        RuntimeError: the solver did not reach an optimal point.
    """
    with needs_extra("reference values", "reference"):
        import cvxpy as cp

    require_alone("program", program.reduce)
    for part, kinds in ((program.mixer, _LEFT), (program.activation, (Linear, GatedReLU)), (program.loss, _LOSSES)):
        require(
            type(part) in kinds,
            "program",
            f"one of {', '.join(kind.__name__ for kind in kinds)}, as cvxlib defines them",
            qualified(type(part)),
        )
    tokens = program.tokens.double().cpu().numpy()
    targets = program.targets.cpu().numpy()
    n, c, blocks = len(tokens), program.mixer.outputs, program.mixer.blocks
    directions = getattr(program.activation, "directions", None)
    gates = 1 if directions is None else len(directions)

    squared = type(program.loss) is SquaredLoss
    penalty, columns, outside = 0, [], 0.0
    for b in range(blocks):
        seen = np.split(tokens, blocks, axis=2)[b]
        designs, variables = [], []
        for g in range(gates):
            direction = None
            if directions is not None:
                direction = np.asarray(directions[g].double().cpu())
                direction = direction if blocks == 1 else direction[b]
            design = np.stack([_design(program.mixer, x, direction, program.pool) for x in seen])  # (n, a, p, w)
            p, w = design.shape[2:]
            z = cp.Variable((p, w * (c // blocks)))
            penalty += cp.normNuc(z)
            # row (p, w) of the reshaped variable holds the c / B outputs of that entry
            designs.append(design.reshape(-1, p * w))
            variables.append(cp.reshape(z, (p * w, c // blocks), order="C"))
        design, variable = np.hstack(designs), cp.vstack(variables)
        if squared:
            # only what lies in the range of the design can be fitted: with A = QR, |AZ - Y|^2 = |RZ - Q'Y|^2 + |Y - QQ'Y|^2
            values = np.split(targets.reshape(-1, c), blocks, axis=1)[b]
            q, r = np.linalg.qr(design)
            columns.append(cp.sum_squares(r @ variable - q.T @ values) / 2)
            outside += np.sum((values - q @ (q.T @ values)) ** 2) / 2
        else:
            columns.append(design @ variable)
    if squared:
        data = sum(columns) + outside
    else:
        predictions, labels = cp.hstack(columns), np.eye(c)[targets.reshape(-1)]  # (n a, c)
        data = cp.sum(cp.log_sum_exp(predictions, axis=1)) - cp.sum(cp.multiply(labels, predictions))
    problem = cp.Problem(cp.Minimize(data / n + program.beta * penalty))
    problem.solve(**({"solver": cp.CLARABEL} | options))
    if problem.status != cp.OPTIMAL:
        raise RuntimeError(f"CVXPY ended with status {problem.status!r} and value {problem.value}")
    return float(problem.value)


def _design(mixer, x: np.ndarray, direction: np.ndarray | None, pool: str | None) -> np.ndarray:
    """(a, p, w) what each entry of u and each row of V contribute to each output position, for one sample x (s, d)."""
    p = int(np.prod(mixer.shape))
    right = _right(mixer, x)
    gate = 1.0 if direction is None else (_left(mixer, x, direction) >= 0).astype(float)
    entries = []
    for k in range(p):
        unit = np.zeros(p)
        unit[k] = 1
        entries.append((gate * _left(mixer, x, unit.reshape(mixer.shape))) @ right)
    design = np.stack(entries, axis=1)
    return design.mean(axis=0, keepdims=True) if pool == "mean" else design


def _convolved(mixer: Mixer, x: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(s, 1) the circular convolution of tokens and u, summed over features."""
    s = len(x)
    return np.array([sum(x[(a - k) % s] @ u[k] for k in range(s)) for a in range(s)])[:, None]


def _correlated(mixer: Convolution, x: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(1, s - t + 1) the inner products of u with every t neighbouring tokens."""
    return np.array([[np.sum(x[k : k + mixer.kernel] * u) for k in range(len(x) - mixer.kernel + 1)]])


#: the hidden matrix L_X u (a, h) of one sample x (s, d), by the mixer's class itself: a subclass may have other formulas
_LEFT = {
    SelfAttention: lambda mixer, x, u: x @ u @ x.T,
    CausalSelfAttention: lambda mixer, x, u: np.tril(x @ u @ x.T),
    CrossAttention: lambda mixer, x, u: x[: mixer.queries] @ u @ x[mixer.queries :].T,
    MLPMixer: lambda mixer, x, u: u @ x,
    FNO: _convolved,
    BlockFNO: _convolved,
    MLP: lambda mixer, x, u: (x @ u)[:, None],
    Convolution: _correlated,
}

#: the matrix R_X (h, w) of one sample, where it is not the number 1
_RIGHT = {
    SelfAttention: lambda mixer, x: x,
    CausalSelfAttention: lambda mixer, x: x,
    CrossAttention: lambda mixer, x: x[mixer.queries :],
    MLPMixer: lambda mixer, x: np.eye(x.shape[1]),
    Convolution: lambda mixer, x: np.eye(len(x) - mixer.kernel + 1),
}

_LOSSES = (SquaredLoss, CrossEntropy)


def _left(mixer: Mixer, x: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(a, h) the hidden matrix L_X u of one sample."""
    return _LEFT[type(mixer)](mixer, x, u)


def _right(mixer: Mixer, x: np.ndarray) -> np.ndarray:
    """(h, w) the matrix R_X of one sample."""
    return _RIGHT[type(mixer)](mixer, x) if type(mixer) in _RIGHT else np.ones((1, 1))
