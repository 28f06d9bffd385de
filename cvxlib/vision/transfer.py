r"""The transfer experiment: heads on the tokens of a frozen backbone, trained by a protocol and solved to a certificate.

Every head is trained by AdamW, and where its training problem has a convex program with fixed gates, that is solved as well. A result is a
*row*, a dictionary ready for JSON; finished rows are kept on disk, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import cvxlib
from cvxlib.ground.checks import instance, positive_float, positive_int, require, wrong_type
from cvxlib.ground.provenance import write_json
from cvxlib.model.activations import Activation, GatedReLU, Linear, ReLU
from cvxlib.model.baselines import Baseline, LinearHead, SoftmaxAttention
from cvxlib.model.heads import Head
from cvxlib.model.losses import CrossEntropy
from cvxlib.model.mixers import FNO, MLP, BlockFNO, Mixer, MLPMixer, SelfAttention
from cvxlib.program.certificate import Status
from cvxlib.program.program import ConvexProgram
from cvxlib.solvers import solve
from cvxlib.vision.digits import TokenSplit
from cvxlib.vision.measures import logits_of, rank_of, top_k_accuracy
from cvxlib.vision.protocol import Protocol, choose_rate
from cvxlib.vision.ridge import ridge

#: the heads, and the activations that each can have
HEADS: dict[str, tuple[str, ...]] = {
    "linear": ("none",),
    "MLP": ("linear", "gated ReLU", "ReLU"),
    "self-attention": ("linear", "gated ReLU", "ReLU", "softmax"),
    "MLP-Mixer": ("linear", "gated ReLU", "ReLU"),
    "FNO": ("linear", "gated ReLU", "ReLU"),
    "block FNO": ("linear", "gated ReLU", "ReLU"),
}

#: the activations whose training problem has a certified optimum of its own
CONVEX = ("none", "linear", "gated ReLU")


@dataclass(frozen=True)
class Experiment:
    r"""Data, protocol and sizes of a transfer experiment; makes the networks, trains them and solves their programs.

    Args:
        data: tokens and labels; see :func:`interleave` for block FNO.
        protocol: how AdamW trains.
        neurons: m, of every network that is trained; a multiple of ``gates`` times ``blocks``.
        gates: P, of gated ReLU: one that is always open and P - 1 random ones.
        blocks: B, of block FNO.
        tol: certified relative gap at which a solve stops.
        max_iterations: of a solve.
        gate_seed: of the random gates.
    """

    data: TokenSplit = field(repr=False)
    protocol: Protocol = field(default_factory=Protocol)
    neurons: int = 16
    gates: int = 4
    blocks: int = 2
    tol: float = 1e-2
    max_iterations: int = 20_000
    gate_seed: int = 0

    def __post_init__(self) -> None:
        instance("data", self.data, TokenSplit, "a TokenSplit")
        instance("protocol", self.protocol, Protocol, "a Protocol")
        for name in ("neurons", "gates", "blocks", "max_iterations"):
            positive_int(name, getattr(self, name))
        positive_float("tol", self.tol)
        step = self.gates * self.blocks
        require(self.neurons % step == 0, "neurons", f"a multiple of gates x blocks = {step}", self.neurons)

    @cached_property
    def setting(self) -> dict[str, Any]:
        """All that a row depends on besides its own entries, ready for JSON; the data by their shapes and a SHA-256."""
        digest = hashlib.sha256()
        for part in (self.data.tokens, self.data.labels, self.data.test_tokens, self.data.test_labels):
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("data", "protocol")}
        return {
            "data": {
                "train": len(self.data.tokens),
                "test": len(self.data.test_tokens),
                "tokens": self.data.tokens.shape[1],
                "features": self.data.tokens.shape[2],
                "classes": self.data.classes,
                "sha256": digest.hexdigest(),
            },
            "protocol": json.loads(json.dumps(dataclasses.asdict(self.protocol))),
            "sizes": sizes,
            "cvxlib": cvxlib.__version__,
        }

    # the parts

    def mixer(self, head: str) -> Mixer:
        """The mixer of a head; the linear head and softmax attention borrow that of the token-wise MLP and of self-attention."""
        (_, s, d), c = self.data.tokens.shape, self.data.classes
        mixers: dict[str, Callable[[], Mixer]] = {
            "linear": lambda: MLP(d, c),
            "MLP": lambda: MLP(d, c),
            "self-attention": lambda: SelfAttention(d, c),
            "MLP-Mixer": lambda: MLPMixer(s, d, c),
            "FNO": lambda: FNO(s, d, c),
            "block FNO": lambda: BlockFNO(s, d, c, self.blocks),
        }
        require(head in mixers, "head", f"one of {', '.join(mixers)}", repr(head))
        return mixers[head]()

    def activation(self, head: str, activation: str) -> Activation:
        """The activation of a head."""
        known = HEADS.get(head, ())
        require(activation in known, "activation", f"one of {', '.join(known)} for {head}", repr(activation))
        if activation == "gated ReLU":
            directions = GatedReLU.sample(self.mixer(head), self.gates, self.gate_seed).directions
            directions[0] = 0  # 0 >= 0: open everywhere, so the optimum is no worse than the linear one
            return GatedReLU(directions)
        return ReLU() if activation == "ReLU" else Linear()

    def program(self, head: str, activation: str, beta: float, dtype: torch.dtype = torch.float64) -> ConvexProgram:
        """The program of a head, pooled, with cross-entropy; for the linear head and softmax it only supplies the training data."""
        mixer, gates = self.mixer(head), self.activation(head, activation)
        tokens = self.data.tokens.to(dtype)  # of the experiment's own, and large
        return ConvexProgram(mixer, gates, CrossEntropy(), tokens, self.data.labels, beta, copy=False)

    def network(self, head: str, activation: str, seed: int) -> nn.Module:
        """The network that is trained, with ``neurons`` neurons and random weights, in float32."""
        d, c = self.data.tokens.shape[2], self.data.classes
        if activation == "none":
            return LinearHead(d, c)
        if activation == "softmax":
            return SoftmaxAttention(d, c, self.neurons, seed=seed)
        mixer, gates = self.mixer(head), self.activation(head, activation)
        return Head.random(mixer, gates, self.neurons // (gates.count * mixer.blocks), seed=seed)

    # the rows

    def train(self, head: str, activation: str, beta: float, *, rate: float, epochs: int, seed: int) -> dict[str, Any]:
        """One training by the protocol, in float32, evaluated in float64.

        Returns:
            The row: objective, accuracies, neurons, rank, parameters and seconds; objective and rank are None where training diverged.

        Raises:
            KeyboardInterrupt: the training was interrupted.
        """
        begin = time.perf_counter()
        program = self.program(head, activation, beta, torch.float32)
        network = self.network(head, activation, seed)
        training = self.protocol.fit(program, network, rate, epochs=epochs, seed=seed)
        if training.interrupted:
            raise KeyboardInterrupt
        seconds = time.perf_counter() - begin
        row = {"head": head, "activation": activation, "beta": beta, "method": "AdamW"}
        row |= {"rate": rate, "epochs": epochs, "seed": seed}
        return row | self._evaluate(training.head, beta) | {"seconds": round(seconds, 2)}

    def optimum(self, head: str, activation: str, beta: float) -> dict[str, Any]:
        """The certified optimum of a head's training problem.

        Returns:
            The row: the same entries as of a training, and dual value, relative gap, status, solver and evaluations.

        Raises:
            ValueError: an activation without a convex program of fixed gates.
            KeyboardInterrupt: the solve was interrupted.
        """
        require(activation in CONVEX, "activation", f"one of {', '.join(CONVEX)}", repr(activation))
        begin = time.perf_counter()
        program = self.program(head, activation, beta)
        if activation == "none":
            network: nn.Module
            facts: dict[str, object]
            network, certificate = ridge(program, self.max_iterations)
            facts = {"status": "strongly convex", "solver": "L-BFGS on the weights", "evaluations": None}
        else:
            solution = solve(program, tol=self.tol, max_iterations=self.max_iterations)
            if solution.status is Status.INTERRUPTED:
                raise KeyboardInterrupt
            network, certificate = solution.head(), solution.certificate
            facts = {"status": solution.status.name, "solver": solution.solver, "evaluations": solution.evaluations}
        seconds = time.perf_counter() - begin
        row = {"head": head, "activation": activation, "beta": beta, "method": "optimum"}
        row |= self._evaluate(network, beta) | {"seconds": round(seconds, 2)}
        # the certificate's own primal value, which the network attains to rounding
        bounds = {"objective": certificate.primal, "dual": certificate.dual, "gap": certificate.relative_gap}
        return row | bounds | facts

    @torch.no_grad()
    def _evaluate(self, network: nn.Module, beta: float) -> dict[str, Any]:
        """Objective, accuracies and sizes of a network."""
        if not isinstance(network, (Head, Baseline)):
            raise wrong_type("network", "a head of this package or a baseline", network)
        network = network.double()
        data, classes = self.data, self.data.classes
        logits = logits_of(network, data.tokens.double())
        test_logits = logits_of(network, data.test_tokens.double())
        loss = float(CrossEntropy().value(logits, data.labels).mean())
        objective = loss + beta * float(network.weight_decay())
        finite = math.isfinite(objective)
        return {
            "objective": objective if finite else None,
            "loss": loss if finite else None,
            "train_top1": top_k_accuracy(logits, data.labels, classes, 1),
            "top1": top_k_accuracy(test_logits, data.test_labels, classes, 1),
            "top5": top_k_accuracy(test_logits, data.test_labels, classes, 5),
            "neurons": len(network.u) if isinstance(network, (Head, SoftmaxAttention)) else 0,
            "rank": rank_of(network) if finite else None,
            "parameters": sum(weight.numel() for weight in network.parameters()),
        }


def interleave(data: TokenSplit, blocks: int) -> TokenSplit:
    """Features dealt out in turn, so that each of ``blocks`` blocks sees some of the leading features and some of the positions.

    Raises:
        ValueError: ``blocks`` does not divide the number of features.
    """
    d = data.tokens.shape[2]
    require(d % positive_int("blocks", blocks) == 0, "blocks", f"a divisor of the {d} features", blocks)
    order = torch.arange(d).reshape(-1, blocks).T.flatten()
    return dataclasses.replace(data, tokens=data.tokens[..., order], test_tokens=data.test_tokens[..., order])


class Rows:
    """Finished rows, one small file each; several processes may fill the same folder.

    Args:
        folder: where they are kept.
        setting: what all rows depend on; rows of another setting are never mixed up with these.
    """

    def __init__(self, folder: str | Path, setting: dict[str, Any]) -> None:
        self.folder, self.setting = Path(folder), setting

    def path(self, key: dict[str, Any]) -> Path:
        """The file of a row."""
        digest = hashlib.sha256(json.dumps([self.setting, key], sort_keys=True).encode()).hexdigest()
        name = "-".join(str(key[part]) for part in ("head", "activation", "method")).replace(" ", "_")
        return self.folder / f"{name}-{digest[:16]}.json"

    def get(self, key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a key: from its file where there is one, else computed and written."""
        path = self.path(key)
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        row = compute()
        write_json(path, row)
        return row


def run(
    experiment: Experiment,
    rows: Rows,
    *,
    heads: Iterable[str] = tuple(HEADS),
    betas: Sequence[float] | None = None,
    seeds: int = 3,
    lengths: Sequence[int] = (),
    progress: bool | None = None,
) -> list[dict[str, Any]]:
    """Train and solve every head; finished rows are taken from disk, and an interrupt loses the row in progress at most.

    The learning rate is chosen by training accuracy, with the first seed and the protocol's full length; the other seeds, and the
    shorter trainings, run at the chosen rate.

    Args:
        experiment: what to run.
        rows: where rows are kept.
        heads: some of :data:`HEADS`.
        betas: weight decays of the programs; the protocol's own by default.
        seeds: number of seeds 0, 1, ...
        lengths: further numbers of epochs, each a training of its own with the schedule squeezed to it.
        progress: show a bar; by default only on a terminal.

    Returns:
        All rows in a fixed order.
    """
    instance("experiment", experiment, Experiment, "an Experiment")
    if isinstance(heads, str):
        raise wrong_type("heads", f"a list of {', '.join(HEADS)}", heads)
    heads = list(heads)
    for head in heads:
        require(head in HEADS, "heads", f"some of {', '.join(HEADS)}", repr(head))
    protocol, seeds = experiment.protocol, positive_int("seeds", seeds)
    betas = [protocol.weight_decay(len(experiment.data.tokens))] if betas is None else list(betas)
    lengths = [positive_int("lengths", length) for length in lengths]
    jobs = [(beta, head, activation) for beta in betas for head in heads for activation in HEADS[head]]
    found: list[dict[str, Any]] = []
    with tqdm(jobs, desc="heads", disable=None if progress is None else not progress) as bar:
        for beta, head, activation in bar:
            key: dict[str, Any] = {"head": head, "activation": activation, "beta": beta}

            def training(rate: float, epochs: int, seed: int, key: dict[str, Any] = key) -> dict[str, Any]:
                job: dict[str, Any] = {"rate": rate, "epochs": epochs, "seed": seed}
                row = rows.get(key | {"method": "AdamW"} | job, lambda: experiment.train(**key, **job))
                found.append(row)
                return row

            bar.set_postfix_str(f"{head}, {activation}, beta {beta:.1e}")
            if activation in CONVEX:
                found.append(rows.get(key | {"method": "optimum"}, partial(experiment.optimum, **key)))
            tried = {rate: training(rate, protocol.epochs, 0)["train_top1"] for rate in protocol.learning_rates}
            rate = choose_rate(tried)
            for seed in range(seeds):
                for epochs in (protocol.epochs, *lengths):
                    if (seed, epochs) != (0, protocol.epochs):
                        training(rate, epochs, seed)
    return found
