"""The optimal linear head, which strong convexity certifies."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cvxlib.ground.checks import require
from cvxlib.model.baselines import LinearHead
from cvxlib.program.certificate import Certificate
from cvxlib.program.program import ConvexProgram


def ridge(program: ConvexProgram, max_iterations: int = 20_000) -> tuple[LinearHead, Certificate]:
    r"""The optimal linear head :math:`f(X) = \bar x^\top W` with penalty :math:`\tfrac\beta2\|W\|^2`, by L-BFGS.

    The objective :math:`J` is :math:`\beta`-strongly convex, which is its certificate: :math:`J(W) - \tfrac1{2\beta}\|\nabla J(W)\|^2 \le J^\star`.

    Args:
        program: a pooled program, for its loss, data and beta; its mixer and activation are not used.
        max_iterations: of L-BFGS.

    Returns:
        The head and the interval that holds the optimum.
    """
    from scipy.optimize import minimize

    require(program.pool == "mean", "program", "a pooled program", f"pool={program.pool!r}")
    d, c, n = program.tokens.shape[2], program.mixer.outputs, program.samples
    mean = program.tokens.double().mean(1)

    def objective(w: Tensor) -> tuple[float, Tensor]:
        predictions = mean @ w
        value = float(program.loss.value(predictions, program.rows).mean()) + program.beta / 2 * float(w.square().sum())
        return value, mean.T @ program.loss.gradient(predictions, program.rows) / n + program.beta * w

    def flat(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(torch.from_numpy(x).to(mean).reshape(d, c))
        return value, gradient.flatten().cpu().numpy()

    options = {"maxiter": max_iterations, "maxfun": 2 * max_iterations, "ftol": 0.0, "gtol": 1e-10, "maxcor": 50}
    found = minimize(
        flat, torch.zeros(d * c, dtype=torch.float64).numpy(), jac=True, method="L-BFGS-B", options=options
    )
    head = LinearHead(d, c, dtype=torch.float64).to(mean.device)
    head.weight.data = torch.from_numpy(found.x).to(mean).reshape(d, c)
    value, gradient = objective(head.weight.data)
    return head, Certificate(value, value - float(gradient.square().sum()) / (2 * program.beta))
