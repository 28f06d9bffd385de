r"""ReLU programs: column generation over the cones of the arrangement, with a bound from both sides at every round.

A network is trained, polished inside the cones its neurons lie in (a smooth problem with linear constraints), and given the neurons that
the linear oracle of the cone-constrained norm finds to violate :math:`u^\top G v \le \beta`; then again. Upper bound: the best
network met. Lower bound: the dual value of a residual, scaled by a bound on its dual norm over *all* cones.

Source: Pilanci and Ergen 2020 (the program); book, chapter "ReLU and its cones" (the bounds).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cvxlib.geometry.arrangements import PARALLEL, Hyperplanes, inner_point
from cvxlib.model.heads import Head
from cvxlib.model.stacked import exact_rows
from cvxlib.operators.lifted import block_design
from cvxlib.program.certificate import Certificate, Factors, Status
from cvxlib.program.program import ConvexProgram
from cvxlib.program.solution import Solution
from cvxlib.solvers import barrier
from cvxlib.solvers.barrier import HeldNetwork
from cvxlib.solvers.drive import Method
from cvxlib.solvers.run import Run, Step

#: neurons that one round of column generation may add
NEW_NEURONS = 12
#: rounds without progress of either bound after which column generation gives up
STALL_ROUNDS = 4
#: weights up to which Newton's method is used to polish
LARGEST_NEWTON = 1_200
#: random networks trained to begin with, where no oracle can improve on the first
STARTS = 5
#: networks trained at a smaller beta, whose residuals improve a lower bound that is not tight
SHADOWS = 3


@dataclass
class _Neurons:
    """Neurons u (m, p), v (m, q) of the mixer's blocks (m,), and directions (m, p) inside the cones they are held in, if they are."""

    u: Tensor
    v: Tensor
    block: Tensor
    inside: Tensor | None

    def __len__(self) -> int:
        return len(self.u)

    def join(self, other: _Neurons) -> _Neurons:
        pairs = ((self.u, other.u), (self.v, other.v), (self.block, other.block), (self.inside, other.inside))
        return _Neurons(*(torch.cat(pair) for pair in pairs))


class ColumnGeneration(Method):
    """The best network, the last polished one, and the bound on all networks that the oracle gives; a step is a round."""

    title = "column generation"

    def __init__(self, program: ConvexProgram) -> None:
        super().__init__(program)
        self.tokens = program.mixer.split(program.tokens)
        mixer = program.mixer
        empty = program.tokens.new_zeros(0, mixer.p)
        none = _Neurons(
            empty, empty.new_zeros(0, mixer.q), torch.zeros(0, dtype=torch.long, device=empty.device), empty
        )
        self.best, self.value = none, self.objective(none)
        #: the last polished network as Newton's method left it: its residual is the most accurate, its objective perhaps not the least
        self.last = none
        self.taken, self.rounds, self.searched = 1, 0, True
        self._bounds, self._stale = (np.inf, -np.inf), 0

    def start(self, solution: Solution | None) -> Factors | None:
        """The given neurons, if any: the search makes its own starts."""
        return None if solution is None else solution.factors

    def steps(self, point: Factors | None, run: Run) -> Iterator[Step]:
        """Trainings to begin with; then the neurons that the oracle finds join, until it finds none."""
        #: how much of the objective a polished network may miss
        self.precision = 0.1 * run.tol
        self.begin(point)
        while True:
            rays, terms = self.bound()
            taken, self.taken = self.taken, 0
            yield Step(self.factors(), self.value, rays, taken, f"neurons {len(self.best)}")
            if not terms:
                return
            self.grow(terms)

    def factors(self) -> Factors:
        """The best network."""
        mixer, best = self.program.mixer, self.best
        v = best.v.unflatten(1, (mixer.width, mixer.block_outputs))
        return Factors(best.u.unflatten(1, mixer.shape), v, best.block)

    def stalled(self, run: Run) -> bool:
        """Whether neither bound has moved for some rounds."""
        primal, dual = self._bounds
        moved = primal - run.primal > 1e-9 * abs(run.primal) or run.dual - dual > 1e-6 * abs(run.dual)
        self._stale, self._bounds = 0 if moved else self._stale + 1, (run.primal, run.dual)
        return self._stale >= STALL_ROUNDS

    def status(self, status: Status, certificate: Certificate) -> Status:
        """What the bounds mean, and not what ended the search: that it can get no further is usual."""
        if status is Status.INTERRUPTED:
            return status
        if status is Status.CERTIFIED:
            return Status.EXACT
        if certificate.dual <= 0:
            return Status.UPPER_BOUND
        if not self.program.enumerated:
            return Status.INTERVAL_PATTERNS
        return Status.INTERVAL if self.searched else Status.INTERVAL_CONES

    def words(self) -> str:
        """How many patterns there are, and how often the oracle was asked."""
        program = self.program
        patterns = program.enumerated and f"all {program.operator.shape[0]} sign patterns"
        return f"{self.title}, {patterns or 'more sign patterns than the limit'}, {self.rounds} rounds"

    @staticmethod
    def norm_at_zero(program: ConvexProgram, residual: Tensor) -> float:
        """Nothing is known before the cones are searched through."""
        return np.inf

    @functools.cached_property
    def planes(self) -> list[np.ndarray]:
        """For each block of the mixer the unit normals (N, p) of its hyperplanes."""
        return [Hyperplanes(exact_rows(self.program.mixer, seen), merge=PARALLEL).normals for seen in self.tokens]

    def polishable(self, m: int) -> bool:
        """Whether m neurons and their walls are few enough for Newton's method."""
        weights = m * (self.program.mixer.p + self.program.mixer.q)
        return 0 < weights <= LARGEST_NEWTON and (self.program.enumerated or self.program.stacked <= LARGEST_NEWTON)

    # the network

    def head(self, neurons: _Neurons) -> Head:
        mixer = self.program.mixer
        u = neurons.u.unflatten(1, mixer.shape)
        v = neurons.v.unflatten(1, (mixer.width, mixer.block_outputs))
        return Head(
            mixer, self.program.activation, u, v, torch.zeros_like(neurons.block), neurons.block, self.program.pool
        )

    def predictions(self, neurons: _Neurons) -> Tensor:
        return self.head(neurons)(self.program.tokens).reshape(-1, self.program.mixer.outputs)

    def objective(self, neurons: _Neurons) -> float:
        """The ReLU network's own objective: an upper bound wherever the neurons lie."""
        decay = float(neurons.u.square().sum() + neurons.v.square().sum()) / 2
        return self.program.data_loss(self.predictions(neurons)) + self.program.beta * decay

    def begin(self, start: Factors | None) -> None:
        """Start from given neurons and from a few trainings, whichever is best."""
        candidates = []
        if start is not None:
            u, v, block = start.u.flatten(1), start.v.flatten(1), start.block
            candidates.append(_Neurons(u.to(self.best.u), v.to(self.best.v), block.to(self.best.block), None))
        mixer = self.program.mixer
        width = min(mixer.p * mixer.q, len(self.program.rows) * mixer.outputs, 60) + 4
        for seed in range(1 if self.program.enumerated else STARTS):
            head = Head.random(mixer, self.program.activation, width, seed=seed, dtype=torch.float64)
            u, v = 0.5 * head.u.detach().flatten(1), 0.5 * head.v.detach().flatten(1)
            candidates.append(
                self.train(_Neurons(u.to(self.best.u), v.to(self.best.v), head.block.to(self.best.block), None))
            )
        for neurons in sorted(candidates, key=self.objective)[:1]:
            self.keep(neurons)
            self.keep(self.polish(self.settle(neurons)))

    def keep(self, neurons: _Neurons) -> None:
        value = self.objective(neurons)
        if value < self.value:
            self.value, self.best = value, neurons

    def settle(self, neurons: _Neurons, cut: float = 1e-10) -> _Neurons:
        """Drop the neurons that have died, balance the others, and note the cone that each lies in."""
        long, wide = neurons.u.norm(dim=1), neurons.v.norm(dim=1)
        alive = long * wide > cut * max(float((long * wide).amax()) if len(neurons) else 0.0, 1e-300)
        # where a block's tokens are all zero there is nothing to see, and no cone to be held in
        sees = torch.tensor([bool(seen.any()) for seen in self.tokens], device=alive.device)
        alive &= sees[neurons.block]
        root = (wide[alive] / long[alive]).sqrt().unsqueeze(1)
        u, v, block = neurons.u[alive] * root, neurons.v[alive] / root, neurons.block[alive]
        if neurons.inside is not None:
            return _Neurons(u, v, block, neurons.inside[alive])
        if self.program.enumerated:
            inside = [self.program.norm.direction(k) for k in self.program.norm.locate(u, block).tolist()]
        elif not self.polishable(len(u)):
            inside = list(u.cpu().numpy())
        else:
            inside = []
            for vector, b in zip(u.cpu().numpy(), block.tolist(), strict=True):
                rows = self.planes[b]
                found = inner_point(np.where(rows @ vector >= 0, 1.0, -1.0)[:, None] * rows)
                inside.append(vector if found is None else found)
        return _Neurons(u, v, block, torch.as_tensor(np.array(inside).reshape(u.shape)).to(u))

    def grow(self, terms: list) -> None:
        """Add the oracle's neurons at the length that lowers the objective most, and polish."""
        norm, cells = self.program.norm, [k for _, k, _, _ in terms[:NEW_NEURONS]]
        u, v = (torch.as_tensor(np.array([term[i] for term in terms[:NEW_NEURONS]])).to(self.best.u) for i in (2, 3))
        inside = torch.as_tensor(np.array([norm.direction(k) for k in cells])).to(u)
        block = torch.tensor([norm.block[k] for k in cells], device=u.device)
        base = max(float(self.best.u.norm(dim=1).amax()) if len(self.best) else 0.0, 1.0)
        best = self.settle(self.best)
        trials = [best.join(_Neurons(a * base * u, -a * base * v, block, inside)) for a in np.geomspace(1e-3, 1, 13)]
        self.keep(self.polish(min(trials, key=self.objective)))

    # upper bound

    def train(self, neurons: _Neurons, steps: int = 200, beta: float | None = None) -> _Neurons:
        """Descend on the network itself, its gates free to change, at the program's or another beta."""
        program, p = self.program if beta is None else self.program.with_beta(beta), self.program.mixer.p
        head = self.head(neurons)

        def value_and_gradient(x: Tensor) -> tuple[float, Tensor]:
            head.u.data, head.v.data = x[:, :p].reshape(head.u.shape), x[:, p:].reshape(head.v.shape)
            with torch.enable_grad():
                predictions = head(program.tokens).reshape(-1, program.mixer.outputs)
                value = program.loss.value(predictions, program.rows).sum() / program.samples
                value = value + program.beta * head.weight_decay()
                gradients = torch.autograd.grad(value, (head.u, head.v))
            return float(value), torch.cat([gradient.flatten(1) for gradient in gradients], 1)

        x = self.minimise(value_and_gradient, torch.cat([neurons.u, neurons.v], 1), steps, 1e-6)
        return _Neurons(x[:, :p], x[:, p:], neurons.block, None)

    def polish(self, neurons: _Neurons) -> _Neurons:
        """A local minimum with every neuron held in its cone, where the problem is small enough for Newton's method."""
        mixer = self.program.mixer
        if not self.polishable(len(neurons)):
            return neurons
        members = [(neurons.block == b).nonzero().squeeze(1) for b in range(mixer.blocks)]
        designs = []
        for seen, mine in zip(self.tokens, members, strict=True):
            masks = mixer.hidden(seen, neurons.inside[mine].unflatten(1, mixer.shape)) >= 0
            design = block_design(mixer, seen, masks, self.program.pool == "mean")
            designs.append(design if self.program.pool else design.flatten(0, 1))  # (rows, m, p, w)
        network = HeldNetwork(self.program, designs, members, self.walls(neurons))
        # neurons on a wall are moved inside, where the barrier is finite
        unit = neurons.inside / neurons.inside.norm(dim=1, keepdim=True)
        margin = network.slack(unit).amin(1, keepdim=True)
        short = (
            1e-3 * neurons.u.norm(dim=1, keepdim=True) * margin - network.slack(neurons.u).amin(1, keepdim=True)
        ).clamp(min=0)
        u = neurons.u + 2 * short / margin * unit
        precision = 0.02 * self.precision * max(abs(self.value), 1e-300)
        u, v = barrier.polish(network, u, neurons.v, precision, self.count)
        polished = self.settle(_Neurons(u, v, neurons.block, neurons.inside))
        self.precision = max(self.precision / 10, 1e-12)
        self.last, merged = polished, self.merge(polished)
        return merged if self.objective(merged) <= self.objective(polished) * (1 + 1e-14) else polished

    def merge(self, neurons: _Neurons) -> _Neurons:
        r"""Neurons of one cone with (nearly) the same output direction as one: :math:`\sum_j \|v_j\| u_j` lies in the cone and is shorter than its terms."""
        size, order = neurons.v.norm(dim=1), neurons.u.norm(dim=1).argsort(descending=True).tolist()
        unit = neurons.v / size.unsqueeze(1)
        taken, u, v, first = set(), [], [], []
        for j in order:
            if j in taken:
                continue
            alike = (unit @ unit[j] > 1 - 1e-8) & (neurons.block == neurons.block[j])
            alike &= (neurons.inside == neurons.inside[j]).all(1)
            group = [k for k in alike.nonzero().squeeze(1).tolist() if k not in taken]
            taken.update(group)
            u.append((neurons.u[group] * size[group].unsqueeze(1)).sum(0))
            v.append((unit[group] * (size * neurons.u.norm(dim=1))[group].unsqueeze(1)).sum(0))
            first.append(j)
        if not first:
            return neurons
        v = torch.stack(v)
        joined = _Neurons(torch.stack(u), v / v.norm(dim=1, keepdim=True), neurons.block[first], neurons.inside[first])
        return self.settle(joined, 1e-7)

    def count(self) -> None:
        self.taken += 1

    def walls(self, neurons: _Neurons) -> Tensor:
        """(m, f, p) unit rows of the neurons' cones, padded with zeros: facets where the patterns are enumerated, otherwise every row."""
        if self.program.enumerated:
            index = self.program.norm.locate(neurons.inside, neurons.block)
            cones = [self.program.norm.cone(k) for k in index.tolist()]
        else:
            cones = []
            for inside, b in zip(neurons.inside.cpu().numpy(), neurons.block.tolist(), strict=True):
                rows = self.planes[b]
                cones.append(np.sign(rows @ inside)[:, None] * rows)
        walls = np.zeros((len(cones), max(map(len, cones)), neurons.u.shape[1]))
        for wall, cone in zip(walls, cones, strict=True):
            wall[: len(cone)] = cone
        return torch.as_tensor(walls).to(neurons.u)

    def minimise(self, function, x: Tensor, steps: int, tolerance: float) -> Tensor:
        """L-BFGS on a matrix of weights, in float64."""
        from scipy.optimize import minimize

        shape, device = x.shape, x.device

        def flat(values: np.ndarray) -> tuple[float, np.ndarray]:
            self.count()
            value, gradient = function(torch.as_tensor(values, device=device).reshape(shape))
            return value, gradient.cpu().numpy().ravel()

        options = {"maxiter": steps, "maxcor": 30, "ftol": 1e-16, "gtol": tolerance * self.program.beta, "maxls": 40}
        result = minimize(flat, x.cpu().numpy().ravel(), jac=True, method="L-BFGS-B", options=options)
        return torch.as_tensor(result.x, device=device).reshape(shape)

    # lower bound

    def bound(self) -> tuple[list[tuple[Tensor, float]], list]:
        """Residuals that bound the optimum, with their dual norms, and the oracle's answers."""
        program = self.program
        self.rounds += 1
        self.last = self.last if len(self.last) else self.best
        residual = program.loss.gradient(self.predictions(self.last), program.rows)
        if program.enumerated:
            gradient = program.operator.adjoint(residual) / program.samples
            found, terms = program.norm.search(gradient, threshold=program.beta * (1 + 1e-3 * self.precision))
            self.searched = found.exact(1e-7)
            return [(residual, found.upper)], terms
        # a residual whose bound is k times too large must be shrunk; that of a network trained at beta / k need not be
        neurons, beta, rays = self.best, program.beta, [(residual, program.dual_norm(residual))]
        for _ in range(SHADOWS if beta < rays[0][1] < np.inf else 0):
            beta *= program.beta / rays[-1][1]
            neurons = self.train(neurons, beta=beta)
            residual = program.loss.gradient(self.predictions(neurons), program.rows)
            rays.append((residual, program.dual_norm(residual)))
        return rays, []
