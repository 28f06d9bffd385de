"""The finished points of a path in a folder, each written whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cvxlib.ground.checks import require, wrong_value
from cvxlib.ground.identity import fingerprint
from cvxlib.ground.tensor_files import read_tensors, write_tensors
from cvxlib.program.program import ConvexProgram
from cvxlib.program.solution import Solution
from cvxlib.workflow.storage import certificate_from_tensors, result_as_tensors, result_from_tensors


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
        self.folder, self.program, self.betas = folder, program, options["betas"]
        parts = (program.mixer, program.activation, program.loss, program.pool)
        self.fingerprint = fingerprint(*parts, program.tokens, program.targets, options)

    def file(self, index: int) -> Path:
        return self.folder / f"point-{index:04d}.safetensors"

    def write(self, index: int, point: Point) -> None:
        """Write a point under a temporary name and rename it: there is a whole file or none."""
        header, tensors = result_as_tensors(point.solution)
        header |= {"fingerprint": self.fingerprint, "screened": point.screened, "solved": point.solved}
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
        try:
            solution = result_from_tensors(
                self.program.with_beta(beta), header, tensors, certificate_from_tensors(header, tensors)
            )
            return Point(solution, int(header["screened"]), int(header["solved"]))
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            came = f"{file}, which does not fit together ({type(error).__name__}: {error})"
            raise wrong_value("checkpoint", ours, came) from None
