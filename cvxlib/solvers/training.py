r"""The baseline: train the non-convex head by AdamW, as a user would."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

from cvxlib.audit.certificates import predict
from cvxlib.ground.checks import instance, positive_float, positive_int, require
from cvxlib.ground.one_process import require_alone
from cvxlib.model.heads import Head
from cvxlib.program.program import ConvexProgram


@dataclass(frozen=True)
class Training:
    """The outcome of :func:`train`.

    Args:
        head: the trained network, a :class:`cvxlib.Head` unless :func:`train` was given another.
        objective: (epochs + 1,) the regularised objective over all samples, before the first epoch and after each.
        interrupted: Ctrl-C ended the training; the head is the one of the last finished epoch.
    """

    head: nn.Module = field(repr=False)
    objective: Tensor = field(repr=False)
    interrupted: bool = False

    @property
    def final(self) -> float:
        """The regularised objective after the last epoch."""
        return float(self.objective[-1])


def train(
    program: ConvexProgram,
    *,
    heads: int | None = None,
    head: nn.Module | None = None,
    epochs: int = 70,
    batch: int = 100,
    learning_rate: float = 5e-3,
    warmup_epochs: int = 3,
    warmup_rate: float = 2e-7,
    final_fraction: float = 2e-2,
    seed: int = 0,
    progress: bool | None = None,
) -> Training:
    r"""Train a head on a program's own objective by AdamW with warm-up and a cosine schedule.

    .. math:: \min_{u, V} \frac1n \sum_i \ell(f(X_i), y_i) + \frac\beta2 \sum_j \big(\|u_j\|^2 + \|V_j\|_F^2\big)

    The penalty is part of the objective and AdamW's own decoupled decay is off: otherwise the training would minimise something
    else, and its distance from the certified optimum would mean nothing.

    Args:
        program: supplies mixer, activation, loss, data, beta and pooling.
        heads: neurons per gate and block of a head with random weights.
        head: the network to train, instead of ``heads``: a copy of it is trained. Besides a :class:`cvxlib.Head`, anything from tokens
            to predictions with a ``weight_decay``, such as the networks of :mod:`cvxlib.model.baselines`.
        epochs: passes over the samples.
        batch: samples per step.
        learning_rate: after the warm-up.
        warmup_epochs: epochs over which the rate rises linearly from ``warmup_rate``.
        warmup_rate: first learning rate.
        final_fraction: last learning rate, as a fraction of ``learning_rate``.
        seed: of the initial weights and of the order of the samples.
        progress: show a bar; by default only on a terminal.

    Source: the protocol of Sahiner et al. 2022, section 5.
    """
    instance("program", program, ConvexProgram, "a ConvexProgram")
    require_alone("program", program.reduce)
    epochs, batch = positive_int("epochs", epochs), positive_int("batch", batch)
    warmup_epochs = min(positive_int("warmup_epochs", warmup_epochs, least=0), epochs)
    learning_rate = positive_float("learning_rate", learning_rate)
    tokens, targets, n, beta = program.tokens, program.targets, program.samples, program.beta
    require(
        (heads is None) != (head is None), "heads", "either heads or head", "both" if head is not None else "neither"
    )
    if head is None:
        head = Head.random(program.mixer, program.activation, heads, pool=program.pool, seed=seed, dtype=tokens.dtype)
    head = copy.deepcopy(head).to(tokens)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = _schedule(optimizer, learning_rate, epochs, warmup_epochs, warmup_rate, final_fraction)
    generator = torch.Generator().manual_seed(seed)

    def objective() -> float:
        with torch.no_grad():
            parts = (
                predict(head, tokens) if isinstance(head, Head) else torch.cat([head(x) for x in tokens.split(batch)])
            )
        predictions = parts.reshape(-1, program.mixer.outputs)
        return program.data_loss(predictions) + beta * float(head.weight_decay().detach())

    history, interrupted = [objective()], False
    try:
        for _ in tqdm(range(epochs), desc="AdamW", disable=None if progress is None else not progress, delay=1):
            for index in torch.randperm(n, generator=generator).to(tokens.device).split(batch):
                predictions = head(tokens[index]).reshape(-1, program.mixer.outputs)
                rows = targets[index] if program.pool else targets[index].flatten(0, 1)
                value = program.loss.value(predictions, rows).sum() / len(index) + beta * head.weight_decay()
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
            schedule.step()
            history.append(objective())
    except KeyboardInterrupt:
        interrupted = True
    return Training(head, torch.tensor(history, dtype=torch.float64), interrupted)


def _schedule(optimizer, rate: float, epochs: int, warmup: int, first: float, final: float) -> SequentialLR:
    """Linear warm-up, then a cosine down to the final fraction, stepped once an epoch."""
    cosine = CosineAnnealingLR(optimizer, T_max=max(1, epochs - warmup), eta_min=final * rate)
    if warmup == 0:
        return SequentialLR(optimizer, [cosine], milestones=[])
    linear = LinearLR(optimizer, start_factor=min(1.0, first / rate), total_iters=warmup)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup])
