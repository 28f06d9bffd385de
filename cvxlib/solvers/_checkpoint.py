"""The state of a solve in a file, from which a later call goes on."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from cvxlib.ground.checks import require, wrong_value
from cvxlib.ground.identity import fingerprint
from cvxlib.ground.tensor_files import read_tensors, write_tensors
from cvxlib.program.certificate import Factors
from cvxlib.program.program import ConvexProgram
from cvxlib.solvers.run import Run

#: seconds between two writes of a solver whose iterations are short
INTERVAL = 30.0


class Checkpoint:
    """One file with the state of one solver on one program; the program's data are not in it, only their fingerprint.

    Args:
        path: the file.
        program: what is solved.
        solver: by which solver.
    """

    def __init__(self, path: str | Path, program: ConvexProgram, solver: str) -> None:
        self.path, self.program = Path(path), program
        require(not self.path.is_dir(), "checkpoint", "a file's name", f"the folder {self.path}")
        parts = (program.mixer, program.activation, program.loss, program.pool, program.beta, solver)
        mine = bytes.fromhex(fingerprint(*parts, program.tokens, program.targets))
        every = program.reduce.gather(torch.tensor([list(mine)], device=program.tokens.device))
        self.fingerprint = bytes(every.flatten().tolist()).hex()
        self._last = time.monotonic()

    def read(self) -> tuple[dict[str, Tensor], dict] | None:
        """The tensors and numbers last written, if the file exists (for the first of several processes)."""
        saved = self.program.reduce.first(self._read)
        if saved is None:
            return None
        tensors, numbers = saved
        return {name: tensor.to(self.program.tokens.device) for name, tensor in tensors.items()}, numbers

    def _read(self) -> tuple[dict[str, Tensor], dict] | None:
        if not self.path.exists():
            return None
        ours = "the file of an earlier solve of this program by this solver, or none"
        try:
            tensors, header = read_tensors(self.path)
        except ValueError as error:
            raise wrong_value("checkpoint", ours, str(error)) from None
        require(
            header.pop("fingerprint", None) == self.fingerprint, "checkpoint", ours, f"{self.path}, of another solve"
        )
        return tensors, header

    def write(self, tensors: dict[str, Tensor], **numbers: object) -> None:
        """Replace the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.path, tensors, {"fingerprint": self.fingerprint, **numbers})
        self._last = time.monotonic()

    def read_run(self, run: Run) -> None:
        """Put a run back to where :meth:`write_run` was called, if the file exists."""
        saved = self.read()
        if saved is None:
            return
        tensors, numbers = saved
        if "z" in tensors:
            run.point = tensors["z"]
        else:
            run.point = Factors(*(tensors[f"best.{name}"] for name in "uvk"))
        run.dual_point = self.program.reduce.own(tensors["point"]) if "point" in tensors else None
        run.history = [tuple(row) for row in numbers["history"]]
        _, run.primal, run.dual = run.history[-1]
        run.saved = saved

    def write_run(self, run: Run, state: tuple[dict[str, Tensor], dict]) -> None:
        """Replace the file by a run, and by what the method's next step depends on; every process must call it."""
        tensors, numbers = state
        if isinstance(run.point, Factors):
            best = {"best.u": run.point.u, "best.v": run.point.v, "best.k": run.point.block}
        else:
            best = {"z": run.point}
        tensors = tensors | best
        if run.dual_point is not None:
            tensors["point"] = self.program.reduce.gather(run.dual_point)
        if self.program.reduce.rank == 0:
            self.write(tensors, **numbers, dual=run.dual, evaluations=run.evaluations, history=run.history)
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last write is a while ago."""
        (since,) = self.program.reduce.agree(self.program.tokens.new_tensor(time.monotonic() - self._last))
        return float(since) >= INTERVAL
