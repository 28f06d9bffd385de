"""Ways to solve a problem: ``prepare`` imports what it needs and returns the run that is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor, nn

import cvxlib
from benchmarks.bars import pick
from cvxlib.program.recovery import factor
from cvxlib.solvers import training


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind.

    Args:
        head: makes the network that was found; None where there is none. It is called after memory has been measured.
        seconds: the time that counts, where it is not that of the whole run.
        evaluations: of the predictions, or the solver's iterations.
        dual: our certified lower bound; None to have the head certified afterwards where ``certify`` says so.
        certify: whether to certify the head.
        details: anything else worth keeping, ready for JSON.
    """

    head: Callable[[], cvxlib.Head] | None = None
    seconds: float | None = None
    evaluations: int | None = None
    dual: float | None = None
    certify: bool = False
    details: dict = field(default_factory=dict)


Run = Callable[[], Outcome]


def ours(
    program: cvxlib.ConvexProgram,
    earlier: Sequence[dict],
    tol: float,
    solver: str | None = None,
    accuracy_of: str | None = None,
) -> Run:
    """cvxlib, with its own choice of solver by default; ``accuracy_of`` asks for the certified gap of an earlier competitor."""
    other = pick(earlier, accuracy_of) if accuracy_of else None
    if other:
        tol = min(max(other["relative_gap"], 1e-9), 1e-5)

    def run() -> Outcome:
        solution = cvxlib.solve(program, tol=tol, solver=solver, progress=False)
        return Outcome(
            head=solution.head,
            evaluations=solution.evaluations,
            dual=solution.certificate.dual,
            details={"tol": tol, "status": solution.status.name, "solver": solution.solver, "rank": solution.rank},
        )

    return run


class TimedHead(nn.Module):
    """A head that tells the time of training from that of evaluating the objective between epochs, which runs without gradients."""

    def __init__(self, head: cvxlib.Head) -> None:
        super().__init__()
        self.head = head
        #: start and end of each evaluation
        self.evaluations: list[list[float]] = []
        self._evaluating = False

    def forward(self, tokens: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self._evaluating = False
            return self.head(tokens)
        if not self._evaluating:
            self.evaluations.append([perf_counter(), 0.0])
            self._evaluating = True
        predictions = self.head(tokens)
        self.evaluations[-1][1] = perf_counter()
        return predictions

    def weight_decay(self) -> Tensor:
        return self.head.weight_decay()

    def training_seconds(self) -> list[float]:
        """Time spent on training until the end of each epoch."""
        seconds = [0.0]
        for (_, end), (start, _) in zip(self.evaluations, self.evaluations[1:], strict=False):
            seconds.append(seconds[-1] + start - end)
        return seconds


def adamw(
    program: cvxlib.ConvexProgram, earlier: Sequence[dict], heads: int, epochs: int, batch: int, rate: float
) -> Run:
    """The non-convex head trained by AdamW in float32, by the paper's protocol, with ``heads`` neurons for every gate."""
    targets = program.targets.float() if program.targets.is_floating_point() else program.targets
    single = cvxlib.ConvexProgram(
        program.mixer, program.activation, program.loss, program.tokens.float(), targets, program.beta, program.pool
    )
    head = cvxlib.Head.random(single.mixer, single.activation, heads, pool=single.pool, seed=0)
    # torch's optimisers import a hundred megabytes at their first use, which is not the training's time or memory
    scalar = nn.Parameter(torch.ones(1))
    torch.optim.AdamW([scalar]).step()

    def run() -> Outcome:
        trained = training.train(
            single, head=TimedHead(head), epochs=epochs, batch=batch, learning_rate=rate, seed=0, progress=False
        )
        seconds = trained.head.training_seconds()
        return Outcome(
            head=lambda: trained.head.head,
            seconds=seconds[-1],
            evaluations=epochs,
            details={"rate": rate, "objective": trained.objective.tolist(), "training_seconds": seconds},
        )

    return run


def cvxpy(program: cvxlib.ConvexProgram, earlier: Sequence[dict], solver: str, **options) -> Run:
    """A conic solver through CVXPY; the time is that of ``Problem.solve``, and the lifted matrix is kept."""
    import cvxpy as cp

    from cvxlib.audit import reference

    kept = {}

    def solve_and_keep(problem: cp.Problem, **arguments) -> None:
        start = perf_counter()
        problem.solve(**arguments)
        kept.update(problem=problem, seconds=perf_counter() - start)

    cp.Problem.register_solve("keep", solve_and_keep)

    def run() -> Outcome:
        reference.solve(program, method="keep", solver=solver, **options)
        problem, statistics = kept["problem"], kept["problem"].solver_stats

        def head() -> cvxlib.Head:
            blocks = [torch.from_numpy(variable.value) for variable in problem.variables()]
            return program.head(factor(program.mixer, torch.stack(blocks).to(program.tokens)))

        return Outcome(
            head=head,
            seconds=kept["seconds"],
            evaluations=statistics.num_iters,
            certify=True,
            details={
                "solver_seconds": statistics.solve_time + (statistics.setup_time or 0.0),
                "reported_objective": float(problem.value),
            },
        )

    return run


def scnn(program: cvxlib.ConvexProgram, earlier: Sequence[dict], tol: float, max_iterations: int) -> Run:
    r"""Mishkin, Sahiner and Pilanci's scnn on a gated two-layer network with one output.

    Its objective is :math:`\tfrac1{2n}\|f - y\|^2 + \lambda\sum_g \|w_g\|_2`: ours with :math:`\lambda = \beta`, since the nuclear norm
    of a p x 1 block is its Euclidean norm. Its gates are open where :math:`x^\top h > 0`, ours where it is not negative: the same for
    points in general position. ``tol`` bounds the squared norm of the smallest subgradient.
    """
    import numpy as np

    try:
        import scnn  # noqa: F401
    except ImportError:
        raise ImportError("scnn is not installed: pip install pyscnn") from None
    from scnn.metrics import Metrics
    from scnn.models import ConvexGatedReLU
    from scnn.optimize import optimize_model
    from scnn.regularizers import NeuronGL1
    from scnn.solvers import RFISTA

    points, values = program.tokens[:, 0].numpy(), program.targets.numpy()
    directions = program.activation.directions
    model = ConvexGatedReLU(np.ascontiguousarray(directions.numpy().T), c=1)

    def run() -> Outcome:
        found, metrics = optimize_model(
            model,
            RFISTA(model, max_iters=max_iterations, tol=tol),
            Metrics(objective=False, grad_norm=True, time=True),
            points,
            values,
            regularizer=NeuronGL1(program.beta),
            return_convex=True,
            unitize_data=False,
            dtype="float64",
        )
        subgradient = float(metrics.grad_norm[-1])

        def head() -> cvxlib.Head:
            weights = torch.as_tensor(np.asarray(found.parameters[0][0]), dtype=torch.float64)
            # scnn drops repeated gates and may reorder the rest: find each among ours
            distance = torch.cdist(torch.as_tensor(np.asarray(found.G)).double().mT, directions.double())
            size = weights.norm(dim=1)
            kept = size > 0
            root = size[kept].sqrt()
            u, v = weights[kept] / root[:, None], root[:, None, None]
            return cvxlib.Head(
                program.mixer,
                program.activation,
                u,
                v,
                gate=distance.argmin(1)[kept],
                block=torch.zeros(len(u), dtype=torch.long),
                pool=program.pool,
            )

        return Outcome(
            head=head,
            evaluations=len(metrics.time),
            certify=True,
            details={"tol": tol, "squared_subgradient": subgradient, "converged": subgradient <= tol},
        )

    return run


def roofline(program: cvxlib.ConvexProgram, earlier: Sequence[dict], side: int = 8192) -> Run:
    """What the device can do: multiplications of square float32 matrices, plain and in TF32, and copies in memory."""
    device = program.tokens.device
    if device.type != "cuda":
        side //= 8

    def rate(action: Callable[[], object], amount: float, repeats: int = 10) -> float:
        action()
        _wait(device)
        start = perf_counter()
        for _ in range(repeats):
            action()
        _wait(device)
        return amount * repeats / (perf_counter() - start)

    def run() -> Outcome:
        a, b = (torch.randn(side, side, device=device) for _ in range(2))
        target = torch.empty_like(a)
        precision = torch.get_float32_matmul_precision()
        rates = {"bytes_per_second": rate(lambda: target.copy_(a), 2 * a.nbytes)}
        for name, level in (("flops_per_second", "highest"), ("tf32_flops_per_second", "high")):
            torch.set_float32_matmul_precision(level)
            rates[name] = rate(lambda: torch.mm(a, b, out=target), 2.0 * side**3)
        torch.set_float32_matmul_precision(precision)
        return Outcome(details=rates)

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
