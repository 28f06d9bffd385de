r"""The audit: certificates computed from a network's own forward pass, in float64.

Predictions come from the module, streamed over samples. The lifted gradient comes from the contractions that the solvers use as well, or,
for an audit that shares nothing with them, from the adjoint of the mixer's ``hidden`` map as autograd gives it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from cvxlib.ground.checks import instance, require, wrong_type
from cvxlib.ground.identity import fingerprint
from cvxlib.model.activations import ReLU
from cvxlib.model.heads import Head
from cvxlib.operators.gates import Gates
from cvxlib.operators.lifted import chunks
from cvxlib.program.certificate import Certificate
from cvxlib.program.program import ConvexProgram


def certify(
    program: ConvexProgram, head: Head, dual_point: Tensor | None = None, *, independent: bool = False
) -> Certificate:
    r"""How far a trained head is from the global optimum of its training problem, whoever trained it and however.

    .. math:: \text{dual}(\rho) \;\le\; p^\star \;\le\;
        \frac1n\sum_i \ell(f(X_i), y_i) + \frac\beta2\sum_j \big(\|u_j\|^2 + \|V_j\|_F^2\big)

    The dual point is the head's own residual, scaled to feasibility: a true bound, but a wide one (the gap is of the order of the square root
    of the head's excess). A point from
    elsewhere (``solution.certificate.dual_point``) may be offered as well, is checked in the same way, and the better bound counts.

    Args:
        program: the convex program of the head's training problem.
        head: a head with the program's mixer, activation and pooling, and any number of neurons; where processes share the samples
            (:mod:`cvxlib.parallel`) it is rank 0's head that is certified.
        dual_point: (rows, c) a further candidate for the dual point.
        independent: take the lifted gradient from autograd through the mixer's ``hidden``, which shares no code with the solvers; slower.

    Returns:
        The certificate, evaluated in float64.

    Raises:
        TypeError: ``head`` is not a :class:`cvxlib.Head`; for the networks of :mod:`cvxlib.model.baselines` the message says why not.
        ValueError: it belongs to another mixer, activation or pooling.

    Source: Fenchel duality; book, chapter "Self-attention".
    """
    instance("program", program, ConvexProgram, "a ConvexProgram")
    if hasattr(head, "why_not_certified"):
        raise wrong_type("head", "a cvxlib.Head", head.why_not_certified)
    instance("head", head, Head, "a cvxlib.Head (only heads of this form have the program's dual)")
    require(
        fingerprint(head.mixer) == fingerprint(program.mixer),
        "head",
        f"a head of {program.mixer!r}",
        f"a head of {head.mixer!r}",
    )
    require(head.pool == program.pool, "head", f"pool={program.pool!r}", f"a head with pool={head.pool!r}")
    require(
        fingerprint(head.activation) == fingerprint(program.activation),
        "head",
        f"the program's activation {program.activation!r}, field for field",
        f"{head.activation!r}",
    )

    exact = program.in_double()
    head = copy.deepcopy(head).to(program.tokens.device, torch.float64)
    weights = [*head.parameters(), *head.buffers()]
    for weight, first in zip(weights, exact.reduce.agree(*(weight.data for weight in weights)), strict=True):
        weight.data = first
    predictions = predict_own(program, head).reshape(-1, program.mixer.outputs)
    (decay,) = exact.reduce.agree(head.weight_decay().detach())
    primal = exact.data_loss(predictions) + exact.beta * float(decay)
    candidates = [exact.loss.gradient(predictions, exact.rows)]
    if dual_point is not None:
        require(dual_point.shape == predictions.shape, "dual_point", f"shape {tuple(predictions.shape)}", dual_point)
        # a point made in single precision is feasible to its own rounding only
        candidates.append(exact.loss.to_domain(dual_point.to(predictions), exact.rows))
    norm = dual_norm if independent else ConvexProgram.dual_norm
    bounds = [exact.feasible_dual(residual, norm(exact, residual)) for residual in candidates]
    _, point = max(bounds, key=lambda bound: bound[0])
    return exact.certify_point(primal, point)


@torch.no_grad()
def predict(head: Head, tokens: Tensor) -> Tensor:
    """Predictions of a head for tokens (n, s, d), in the head's precision and in chunks of bounded memory."""
    seen = head.mixer.split(tokens)[0]
    sizes = [len(part) for part in chunks(head.mixer, seen, 3 * len(head) + head.activation.count)]
    dtype = next(head.parameters()).dtype
    return torch.cat([head(part.to(dtype)) for part in tokens.split(sizes)])


@torch.no_grad()
def predict_own(program: ConvexProgram, head: Head) -> Tensor:
    """Predictions for the program's own tokens, through the masks that the program is about."""
    if not program.activation.fixed:
        return predict(head, program.tokens)
    seen, start, parts = program.mixer.split(program.tokens)[0], 0, []
    dtype = next(head.parameters()).dtype
    for part in chunks(head.mixer, seen, 3 * len(head) + head.activation.count):
        stop = start + len(part)
        masks = [program.frozen.masks(b, start, stop) for b in range(program.mixer.blocks)]
        parts.append(head(program.tokens[start:stop].to(dtype), masks))
        start = stop
    return torch.cat(parts)


def dual_norm(program: ConvexProgram, dual: Tensor) -> float:
    r"""The dual norm :math:`\max_k \|\tfrac1n A_k^*\rho\|_2` of a point (rows, c), by the adjoint that autograd gives."""
    if not program.enumerated:
        return program.dual_norm(dual)
    mixer, gradients = program.mixer, []
    per_sample = dual.reshape(len(program.tokens), -1, mixer.outputs)  # (n, 1 or a, c)
    for b in range(mixer.blocks):
        columns = slice(b * mixer.block_outputs, (b + 1) * mixer.block_outputs)
        gradient = lifted_gradient(program.frozen, per_sample[..., columns], b)
        if isinstance(program.activation, ReLU):  # patterns that never open have neither gradient nor cone
            gradient = gradient[program.operator.gate[program.operator.block == b]]
        gradients.append(gradient)
    return float(program.norm.dual(program.reduce(torch.cat(gradients)))) / program.samples


@torch.enable_grad()
def lifted_gradient(gates: Gates, dual: Tensor, block: int = 0) -> Tensor:
    r"""The adjoint of the lifted operator of one block, summed over samples.

    Args:
        gates: the mixer's gates on the tokens.
        dual: (n, a, c / B), or (n, 1, c / B) when predictions are averaged over output positions.
        block: which block.

    Returns:
        (P, p, q) one matrix per gate.
    """
    mixer, start = gates.mixer, 0
    total = dual.new_zeros(gates.count, mixer.p, mixer.q)
    for part in chunks(mixer, mixer.split(gates.tokens)[block], 6 * mixer.q + gates.count):
        part, stop = part.to(dual), start + len(part)
        rho, masks = dual[start:stop], gates.masks(block, start, stop)
        start = stop
        u = part.new_zeros(mixer.q, *mixer.shape, requires_grad=True)
        hidden = mixer.hidden(part, u)  # (n, q, a, h)
        positions = hidden.shape[2]
        rho = rho.expand(-1, positions, -1) / (positions // rho.shape[1])
        cotangent = torch.einsum("nac,nhw->nwcah", rho, mixer.values(part)).flatten(1, 2)  # (n, q, a, h)
        for g, mask in enumerate(masks.unbind(1)):
            (gradient,) = torch.autograd.grad(hidden, u, cotangent * mask.unsqueeze(1), retain_graph=True)
            total[g] += gradient.flatten(1).mT
    return total
