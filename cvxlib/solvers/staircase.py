r"""The staircase: heads are added where the dual constraint is violated, and the lifted matrices are never formed.

One round has three steps.

1. *Core.* Restricted to the span of the present heads and of the most violated directions, :math:`Z_k = P_k C_k Q_k^\top` with orthonormal
   :math:`P_k, Q_k`, the program is a small convex program of the same form, because :math:`\|P C Q^\top\|_* = \|C\|_*`. Operator splitting
   solves it to optimality, so that ranks grow and shrink by themselves and heads are never redundant.
2. *Certificate.* The residual of the core, scaled to feasibility, is the dual point; singular values of the lifted gradient above beta are
   the violated directions.
3. *Descent.* Preconditioned L-BFGS on the factors turns the subspaces (:mod:`cvxlib.solvers.descent`).

Source: Burer and Monteiro 2003; Boumal, Voroninski and Bandeira 2016 (the staircase); book, chapter "The staircase".
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from cvxlib.geometry.norms import top_singular
from cvxlib.program.certificate import Certificate, Factors, Status
from cvxlib.program.program import ConvexProgram
from cvxlib.program.solution import Solution
from cvxlib.solvers import splitting
from cvxlib.solvers._checkpoint import Checkpoint
from cvxlib.solvers._finish import Stall, rounding
from cvxlib.solvers.descent import AxisMoments, minimise

DESCENT = 40, 160  # fewest and most steps of descent in a round
CORE_STEPS = 300  # steps of operator splitting on a core
CORE_BYTES = 2**31  # of a core's features, of their second moments, and
CORE_COLUMNS = 3000  # side of its Gram matrix: with more heads than these allow, a round adds one direction a block
DIRECTIONS = 16, 8  # new directions in a round, over all blocks, but at least so many a block
NEAR = 0.9  # a singular value counts as violated from this fraction of beta on: it may become so


@torch.no_grad()
def solve(
    program: ConvexProgram,
    *,
    tol: float,
    max_iterations: int,
    start: Solution | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool | None = None,
) -> Solution:
    """Solve a program by the staircase; arguments as :func:`cvxlib.solve`."""
    state = _State(program, start)
    saved = checkpoint.read() if checkpoint else None
    if saved:
        state.restore(*saved)
    bar = tqdm(total=max_iterations, desc="staircase", disable=None if progress is None else not progress, delay=1)
    status, aim, stalled = Status.ITERATION_LIMIT, tol, Stall(program.tokens.dtype)
    try:
        if not saved:
            state.certify()
        while True:
            bar.n = min(state.evaluations, max_iterations)
            bar.set_postfix_str(f"rank {len(state.k)}, gap {state.gap:.1e}")
            if state.gap <= aim:
                if state.audit().relative_gap <= tol:
                    status = Status.CERTIFIED
                    break
                aim /= 2  # double precision finds the gap a little wider
                if aim < torch.finfo(program.tokens.dtype).eps:
                    status = Status.STALLED
                    break
            if stalled(state.gap, state.evaluations):
                status = Status.CERTIFIED if state.audit().relative_gap <= tol else Status.STALLED
                break
            if state.evaluations >= max_iterations:
                break
            last = state.gap
            state.solve_core(aim)
            state.certify()
            if state.gap > aim:
                state.descend(aim)
                state.certify()
            if state.gap > 0.5 * last:
                state.core_gap *= 0.2
            if checkpoint:
                state.save(checkpoint)
    except KeyboardInterrupt:
        status = Status.INTERRUPTED
    finally:
        bar.close()
    return state.solution(status)


class _State:
    """Where the staircase stands: heads u, v in blocks k, their residual, and the best bounds so far."""

    def __init__(self, program: ConvexProgram, start: Solution | None) -> None:
        self.program, self.operator = program, program.factored
        self.moments: AxisMoments | None = None
        # a core need not be solved much better than what is outside it; rounds that gain little make it smaller
        self.core_gap = 1e-2
        self.core_operations = 0.0
        self.slack = rounding(program.tokens.dtype)
        mixer, like = program.mixer, program.tokens
        if start is None:
            self.u, self.k = like.new_zeros(0, mixer.p), torch.zeros(0, dtype=torch.long)
            self.v = like.new_zeros(0, mixer.width, mixer.block_outputs)
        else:
            self.u, self.v = start.factors.u.flatten(1).to(like), start.factors.v.to(like)
            self.k = start.factors.block.cpu()
        self.f = self.operator.predictions(self.u, self.v, self.k)
        self.residual = program.loss.gradient(self.f, program.rows)
        self.best, self.primal = self.factors(), self._objective()
        self.dual, self.point = -float("inf"), torch.zeros_like(self.residual)
        self.directions: list[tuple[int, Tensor, Tensor]] = []
        self.evaluations, self.history = 1, []
        self.audited: tuple[tuple[float, float], Certificate] | None = None

    @property
    def gap(self) -> float:
        """The relative gap of the best bounds, in the arithmetic of the tokens."""
        return Certificate(self.primal, self.dual).relative_gap

    def factors(self) -> Factors:
        """The present heads, largest first."""
        order = self.u.norm(dim=1).argsort(descending=True)
        mixer = self.program.mixer
        return Factors(self.u[order].reshape(-1, *mixer.shape), self.v[order], self.k.to(order.device)[order])

    def _objective(self) -> float:
        (squares,) = self.program.reduce.agree(self.u.square().sum() + self.v.square().sum())
        return self.program.data_loss(self.f) + self.program.beta / 2 * float(squares)

    def _offer(self) -> None:
        """Keep the present heads if they are the best."""
        value = self._objective()
        if value < self.primal:
            self.best, self.primal = self.factors(), value

    def certify(self) -> None:
        """Bound the optimum by the present residual, and find the directions that violate the dual constraint."""
        program = self.program
        gradient = self.operator.adjoint(self.residual) / program.samples
        spectral, self.directions = violated(gradient, program.beta)
        dual, point = program.feasible_dual(self.residual, spectral, self.slack)
        if dual > self.dual:
            self.dual, self.point = dual, point
        self.evaluations += 1
        self.history.append((self.evaluations, self.primal, self.dual))

    def solve_core(self, tol: float) -> None:
        """Solve the program on the span of the heads and of the violated directions."""
        program = self.program
        numbers = max(CORE_BYTES, self.operator.memory) / self.u.element_size()
        room = min(numbers / self.operator.rows, numbers**0.5) / program.mixer.width
        (room,) = program.reduce.agree(torch.tensor(room))
        directions = _fitting(self.k, self.directions, float(room))
        blocks, left, right, cores = program.reduce.agree(*_spans(self.u, self.v, self.k, directions))
        core = self.operator.core(left, right, blocks)
        best, value, dual = cores, float("inf"), -float("inf")
        for count, step in enumerate(splitting.iterates(program, core, cores, self.residual), start=1):
            f = core.forward(step.w)
            at = program.data_loss(f) + program.beta * float(step.penalty)
            if at < value:
                best, value, self.f = step.w, at, f
            residual = program.loss.gradient(step.f, program.rows)
            spectral = float(program.norm.dual(core.adjoint(residual))) / program.samples
            bound, _ = program.feasible_dual(residual, spectral, self.slack)
            if bound > dual:
                dual, self.residual = bound, residual
            if Certificate(value, dual).relative_gap <= max(0.1 * tol, min(0.02 * self.gap, self.core_gap)):
                break
            if count * splitting.CHECK_EVERY >= CORE_STEPS:
                break
        self.core_operations = 3.0 * count * splitting.CHECK_EVERY * sum(part.flops for part in core.maps)
        a, sigma, b = torch.linalg.svd(best, full_matrices=False)
        slot, index = (sigma > 1e-6 * sigma.max()).nonzero(as_tuple=True)
        root = sigma[slot, index].sqrt().unsqueeze(1)
        self.u = (left @ a).mT[slot, index] * root
        self.v = ((right @ b.mT).mT[slot, index] * root).unflatten(1, self.v.shape[1:])
        self.u, self.v, self.k = program.reduce.agree(self.u, self.v, blocks[slot.cpu()])
        self.evaluations += 1
        self._offer()

    def descend(self, tol: float) -> None:
        """Turn the subspaces by descent on the factors."""
        if not len(self.k):
            return
        if self.moments is None:
            self.moments = AxisMoments(self.program, self.operator)
        step = 3.0 * self.operator.flops * len(self.program.tokens) * len(self.k)
        steps = self.program.reduce.agree(torch.tensor(self.core_operations / step))[0]
        size = self.operator.rows * len(self.k) * self.program.mixer.width * self.u.element_size()
        self.u, self.v, self.f, count = minimise(
            self.program,
            self.operator,
            self.moments,
            self.u,
            self.v,
            self.k,
            # a costly core is worth as much descent
            iterations=int(steps.clamp(*DESCENT)),
            tol=0.01 * min(tol, self.gap),
            keep_features=3 * size <= self.operator.memory,
        )
        self.residual = self.program.loss.gradient(self.f, self.program.rows)
        self.evaluations += count
        self._offer()

    def audit(self) -> Certificate:
        """The certificate of the best heads, in double precision."""
        if self.operator.dtype == torch.float64:
            return Certificate(self.primal, self.dual, self.point)
        if self.audited is None or self.audited[0] != (self.primal, self.dual):
            exact = self.program.in_double()
            u, v, k = self.best.u.flatten(1).double(), self.best.v.double(), self.best.block.cpu()
            loss = exact.data_loss(exact.factored.predictions(u, v, k))
            (squares,) = exact.reduce.agree(u.square().sum() + v.square().sum())
            primal = loss + exact.beta / 2 * float(squares)
            point = exact.loss.to_domain(self.point.double(), exact.rows)
            certificate = Certificate(primal, *exact.feasible_dual(point, exact.dual_norm(point)))
            self.audited = (self.primal, self.dual), certificate
        return self.audited[1]

    def save(self, checkpoint: Checkpoint) -> None:
        """Write down everything that the next round depends on."""
        tensors = {"u": self.u, "v": self.v, "k": self.k, "residual": self.operator.reduce.gather(self.residual)}
        tensors |= {"best.u": self.best.u, "best.v": self.best.v, "best.k": self.best.block}
        tensors |= {"point": self.operator.reduce.gather(self.point)}
        for block, left, right in self.directions:
            tensors |= {f"left.{block}": left, f"right.{block}": right}
        if self.operator.reduce.rank == 0:
            checkpoint.write(
                tensors,
                primal=self.primal,
                dual=self.dual,
                evaluations=self.evaluations,
                history=self.history,
                core_gap=self.core_gap,
                blocks=[block for block, _, _ in self.directions],
            )

    def restore(self, tensors: dict[str, Tensor], numbers: dict) -> None:
        """Go back to where :meth:`save` was called."""
        self.u, self.v, self.k = tensors["u"], tensors["v"], tensors["k"].cpu()
        self.residual, self.point = (self.operator.reduce.own(tensors[name]) for name in ("residual", "point"))
        self.f = self.operator.predictions(self.u, self.v, self.k)
        self.best = Factors(*(tensors[f"best.{name}"] for name in "uvk"))
        self.primal, self.dual, self.evaluations = numbers["primal"], numbers["dual"], numbers["evaluations"]
        self.history, self.core_gap = [tuple(row) for row in numbers["history"]], numbers["core_gap"]
        self.directions = [(k, tensors[f"left.{k}"], tensors[f"right.{k}"]) for k in numbers["blocks"]]

    def solution(self, status: Status) -> Solution:
        """The best heads with their certificate."""
        k, p, q = self.operator.shape
        return Solution(
            program=self.program,
            factors=self.best,
            certificate=self.audit(),
            status=status,
            solver=f"staircase on {k} blocks of {p} x {q}, {self.operator.path}",
            evaluations=self.evaluations,
            history=torch.tensor(self.history, dtype=torch.float64).reshape(-1, 3),
        )


def violated(gradient: Tensor, beta: float) -> tuple[float, list[tuple[int, Tensor, Tensor]]]:
    """A bound on the largest singular value of gradients (K, p, q), and of every block its singular vectors near or above beta."""
    wide = gradient.shape[1] < gradient.shape[2]
    tall = gradient.mT if wide else gradient  # (K, long, short)
    limit = max(DIRECTIONS[0] // len(gradient), DIRECTIONS[1])
    tops = [top_singular(matrix, limit) for matrix in tall]
    bound, directions = max(largest for _, _, largest in tops), []
    for k, (matrix, (sigma, vectors, _)) in enumerate(zip(tall, tops, strict=True)):
        keep = sigma > NEAR * min(beta, bound)
        if bool(keep.any()):
            short = vectors[:, keep]
            long = torch.linalg.qr(matrix @ short)[0]
            directions.append((k, short, long) if wide else (k, long, short))
    return bound, directions


def _fitting(k: Tensor, directions: list[tuple[int, Tensor, Tensor]], heads: float) -> list[tuple[int, Tensor, Tensor]]:
    """The largest of the directions, as many a block (and at least one) as leave a core with so many heads, and a Gram matrix to factor."""
    count = max(1, len(set(k.tolist()) | {block for block, _, _ in directions}))
    present = int(torch.bincount(k).max()) if len(k) else 0
    room = max(1, int(min(heads / count, (CORE_COLUMNS / count) ** 0.5)) - present)
    return [(block, left[:, -room:], right[:, -room:]) for block, left, right in directions]


def _spans(
    u: Tensor, v: Tensor, k: Tensor, directions: list[tuple[int, Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Orthonormal bases of what heads and directions span, block by block.

    Returns:
        the blocks (K',), left (K', p, R) and right (K', q, R) padded with zeros, and the present heads in these bases (K', R, R).
    """
    extra = {block: (left, right) for block, left, right in directions}
    blocks = torch.tensor(sorted(set(k.tolist()) | set(extra)), dtype=torch.long)
    v = v.flatten(1)
    pairs = []
    for block in blocks.tolist():
        mine = (k == block).nonzero().squeeze(1)
        left, right = extra.get(block, (u.new_zeros(u.shape[1], 0), v.new_zeros(v.shape[1], 0)))
        pairs.append([torch.linalg.qr(torch.cat(both, 1))[0] for both in ((u[mine].mT, left), (v[mine].mT, right))])
    widths = [max(pair[side].shape[1] for pair in pairs) for side in (0, 1)]
    left, right = (
        torch.stack([torch.nn.functional.pad(pair[side], (0, widths[side] - pair[side].shape[1])) for pair in pairs])
        for side in (0, 1)
    )
    slot = torch.searchsorted(blocks, k)
    inside_u, inside_v = ((base.mT[slot] @ x.unsqueeze(2)).squeeze(2) for base, x in ((left, u), (right, v)))
    cores = u.new_zeros(len(blocks), *widths)
    cores.index_add_(0, slot.to(u.device), inside_u.unsqueeze(2) * inside_v.unsqueeze(1))
    return blocks, left, right, cores
