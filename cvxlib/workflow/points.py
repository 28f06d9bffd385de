"""The finished points of a path in a folder, each written whole or not at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from cvxlib.ground.checks import require, wrong_value
from cvxlib.ground.tensor_files import digest, read_tensors, write_tensors
from cvxlib.program.certificate import Certificate, Factors, Status
from cvxlib.program.program import ConvexProgram
from cvxlib.program.solution import Solution


@dataclass(frozen=True)
class Point:
    """A finished point: its solution, how many lifted blocks are proved to be zero, and how many it was solved on."""

    solution: Solution
    screened: int
    solved: int


class Points:
    """A folder with one file for each finished point, and the fingerprint of the call in each.

    The program's tokens are not written: they are in the caller's hands, and the fingerprint tells whether they are the same.
    """

    def __init__(self, folder: Path, program: ConvexProgram, options: dict) -> None:
        require(
            not folder.exists() or folder.is_dir(), "checkpoint", "a folder, or a path where there is none", str(folder)
        )
        self.folder, self.program, self.fingerprint = folder, program, _fingerprint(program, options)
        self.betas = options["betas"]

    def file(self, index: int) -> Path:
        return self.folder / f"point-{index:04d}.safetensors"

    def write(self, index: int, point: Point) -> None:
        """Write a point under a temporary name and rename it: there is a whole file or none."""
        solution = point.solution
        header = {
            "fingerprint": self.fingerprint,
            "primal": solution.certificate.primal,
            "dual": solution.certificate.dual if math.isfinite(solution.certificate.dual) else None,
            "dtype": str(solution.certificate.dtype).removeprefix("torch."),
            "status": solution.status.name,
            "solver": solution.solver,
            "evaluations": solution.evaluations,
            "screened": point.screened,
            "solved": point.solved,
        }
        factors = solution.factors
        tensors = {"u": factors.u, "v": factors.v, "block": factors.block, "history": solution.history}
        if solution.certificate.dual_point is not None:
            tensors["dual_point"] = solution.certificate.dual_point
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self.file(index), tensors, header)

    def read(self) -> list[Point]:
        """The finished points."""
        points = []
        while len(points) < len(self.betas) and self.file(len(points)).exists():
            points.append(self.point(self.file(len(points)), self.betas[len(points)]))
        return points

    def point(self, file: Path, beta: float) -> Point:
        ours = "a folder with points of this program at these betas, with these options"
        try:
            tensors, header = read_tensors(file, self.program.tokens.device)
        except ValueError as error:
            raise wrong_value("checkpoint", ours, str(error)) from None
        same = header.get("fingerprint") == self.fingerprint
        require(same, "checkpoint", ours, f"those of another call in {self.folder}")
        certificate = Certificate(
            header["primal"],
            -math.inf if header["dual"] is None else header["dual"],
            tensors.get("dual_point"),
            getattr(torch, header["dtype"]),
        )
        solution = Solution(
            self.program.with_beta(beta),
            Factors(tensors["u"], tensors["v"], tensors["block"]),
            certificate,
            Status[header["status"]],
            header["solver"],
            header["evaluations"],
            tensors["history"].cpu(),
        )
        return Point(solution, header["screened"], header["solved"])


def _fingerprint(program: ConvexProgram, options: dict) -> str:
    """A digest of everything that a path depends on."""
    words = [program.mixer, program.activation, program.loss, program.pool, program.tokens.dtype, options]
    return digest(words, program.tokens, program.targets, getattr(program.activation, "directions", None))
