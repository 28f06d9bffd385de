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

from collections.abc import Iterator

import torch
from torch import Tensor

from cvxlib.geometry.norms import top_singular
from cvxlib.program.certificate import Factors, relative_gap
from cvxlib.program.program import ConvexProgram
from cvxlib.program.solution import Solution
from cvxlib.solvers import splitting
from cvxlib.solvers.descent import AxisMoments, minimise
from cvxlib.solvers.drive import CHECK_EVERY, Method
from cvxlib.solvers.run import Run, Step, rounding

DESCENT = 40, 160  # fewest and most steps of descent in a round
CORE_STEPS = 300  # steps of operator splitting on a core
CORE_BYTES = 2**31  # of a core's features, of their second moments, and
CORE_COLUMNS = 3000  # side of its Gram matrix: with more heads than these allow, a round adds one direction a block
DIRECTIONS = 16, 8  # new directions in a round, over all blocks, but at least so many a block
VIOLATED_FROM = 0.9  # a singular value counts as violated from this fraction of beta on: it may become so


class Staircase(Method):
    """Heads u, v in blocks k, and their residual; a step is a core, or a descent from it."""

    title = "staircase"
    long_steps = True
    patience = 24

    def __init__(self, program: ConvexProgram) -> None:
        super().__init__(program)
        self.operator = program.factored
        self.moments: AxisMoments | None = None
        # a core need not be solved much better than what is outside it; rounds that gain little make it smaller
        self.core_gap, self.last = 1e-2, float("inf")
        self.core_operations = 0.0
        self.descends = False  # whether the next step is a descent
        self.directions: list[tuple[int, Tensor, Tensor]] = []

    def start(self, solution: Solution | None) -> Factors:
        """The given heads, or none."""
        mixer, like = self.program.mixer, self.program.tokens
        if solution is not None:
            found = solution.factors
            return Factors(found.u.to(like), found.v.to(like), found.block)
        none = like.new_zeros(0, mixer.width, mixer.block_outputs)
        return Factors(like.new_zeros(0, *mixer.shape), none, torch.zeros(0, dtype=torch.long))

    def steps(self, point: Factors, run: Run) -> Iterator[Step]:
        """Cores and descents by turns."""
        if run.saved:
            self.restore(*run.saved)
        else:
            self.u, self.v, self.k = point.u.flatten(1), point.v, point.block.cpu()
            self.f = self.operator.predictions(self.u, self.v, self.k)
            self.residual = self.program.loss.gradient(self.f, self.program.rows)
            yield self.look(2)
        while True:
            if self.descends:
                self.descends = False
                yield self.look(self.descend(run) + 1)
            else:
                if run.gap > 0.5 * self.last:
                    self.core_gap *= 0.2
                self.last = run.gap
                self.solve_core(run)
                self.descends = True
                yield self.look(2)

    def look(self, evaluations: int) -> Step:
        """The present heads and their residual, and the directions that violate the dual constraint."""
        program = self.program
        gradient = self.operator.adjoint(self.residual) / program.samples
        spectral, self.directions = violated(gradient, program.beta)
        (squares,) = program.reduce.agree(self.u.square().sum() + self.v.square().sum())
        value = program.data_loss(self.f) + program.beta / 2 * float(squares)
        order = self.u.norm(dim=1).argsort(descending=True)  # largest first
        u = self.u[order].reshape(-1, *program.mixer.shape)
        factors = Factors(u, self.v[order], self.k.to(order.device)[order])
        return Step(factors, value, [(self.residual, spectral)], evaluations, f"rank {len(self.k)}")

    def solve_core(self, run: Run) -> None:
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
            bound, _ = program.feasible_dual(residual, spectral, rounding(self.u.dtype))
            if bound > dual:
                dual, self.residual = bound, residual
            if relative_gap(value, dual) <= max(0.1 * run.aim, min(0.02 * run.gap, self.core_gap)):
                break
            if count * CHECK_EVERY >= CORE_STEPS:
                break
        self.core_operations = 3.0 * count * CHECK_EVERY * sum(part.flops for part in core.maps)
        a, sigma, b = torch.linalg.svd(best, full_matrices=False)
        slot, index = (sigma > 1e-6 * sigma.max()).nonzero(as_tuple=True)
        root = sigma[slot, index].sqrt().unsqueeze(1)
        self.u = (left @ a).mT[slot, index] * root
        self.v = ((right @ b.mT).mT[slot, index] * root).unflatten(1, self.v.shape[1:])
        self.u, self.v, self.k = program.reduce.agree(self.u, self.v, blocks[slot.cpu()])

    def descend(self, run: Run) -> int:
        """Turn the subspaces by descent on the factors; how many evaluations that took."""
        if not len(self.k):
            return 0
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
            tol=0.01 * min(run.aim, run.gap),
            keep_features=3 * size <= self.operator.memory,
        )
        self.residual = self.program.loss.gradient(self.f, self.program.rows)
        return count

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Everything that the next step depends on."""
        tensors = {"u": self.u, "v": self.v, "k": self.k, "residual": self.operator.reduce.gather(self.residual)}
        for block, left, right in self.directions:
            tensors |= {f"left.{block}": left, f"right.{block}": right}
        names = ("core_gap", "last", "core_operations", "descends")
        numbers = {name: getattr(self, name) for name in names}
        return tensors, numbers | {"blocks": [block for block, _, _ in self.directions]}

    def restore(self, tensors: dict[str, Tensor], numbers: dict) -> None:
        """Go back to where :meth:`state` was called."""
        self.u, self.v, self.k = tensors["u"], tensors["v"], tensors["k"].cpu()
        self.residual = self.operator.reduce.own(tensors["residual"])
        self.core_gap, self.last = numbers["core_gap"], numbers["last"]
        self.core_operations, self.descends = numbers["core_operations"], numbers["descends"]
        self.directions = [(k, tensors[f"left.{k}"], tensors[f"right.{k}"]) for k in numbers["blocks"]]

    def words(self) -> str:
        """The blocks, and the contraction."""
        k, p, q = self.operator.shape
        return f"staircase on {k} blocks of {p} x {q}, {self.operator.path}"


def violated(gradient: Tensor, beta: float) -> tuple[float, list[tuple[int, Tensor, Tensor]]]:
    """A bound on the largest singular value of gradients (K, p, q), and of every block its singular vectors near or above beta."""
    wide = gradient.shape[1] < gradient.shape[2]
    tall = gradient.mT if wide else gradient  # (K, long, short)
    limit = max(DIRECTIONS[0] // len(gradient), DIRECTIONS[1])
    tops = [top_singular(matrix, limit) for matrix in tall]
    bound, directions = max(largest for _, _, largest in tops), []
    for k, (matrix, (sigma, vectors, _)) in enumerate(zip(tall, tops, strict=True)):
        keep = sigma > VIOLATED_FROM * min(beta, bound)
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
