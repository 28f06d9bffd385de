"""Programs whose samples several processes hold."""

from __future__ import annotations

import functools

from torch import Tensor

from cvxlib.ground.checks import instance, require
from cvxlib.ground.identity import fingerprint
from cvxlib.model.activations import Activation, ReLU
from cvxlib.model.losses import Loss
from cvxlib.model.mixers import Mixer
from cvxlib.parallel.processes import Processes
from cvxlib.program.program import ConvexProgram


@functools.cache
def _everyone() -> Processes:
    return Processes()


class ShardedProgram(ConvexProgram):
    r"""A convex program of which this process holds some of the samples, and others the rest.

    Solvers and certificates take it as they take a :class:`cvxlib.ConvexProgram`; every process must make the same calls in the same order.

    Args:
        mixer: how tokens are mixed, the same on every process; so are all arguments but the next two.
        activation: which gates pass.
        loss: :class:`cvxlib.SquaredLoss` or :class:`cvxlib.CrossEntropy`.
        tokens: (n_r, s, d) this process's samples.
        targets: theirs.
        beta: weight decay of the whole program.
        pool: ``"mean"`` or ``None``.
        processes: who holds the samples; by default all that were started.
        copy: as in :class:`cvxlib.ConvexProgram`.

    Raises:
        TypeError, ValueError: as :class:`cvxlib.ConvexProgram`, and a ``ValueError`` on every process if one of them was given bad
            arguments or others than the rest; for ReLU, whose sign patterns depend on all samples.
    """

    reduce: Processes

    def __init__(
        self,
        mixer: Mixer,
        activation: Activation,
        loss: Loss,
        tokens: Tensor,
        targets: Tensor,
        beta: float,
        pool: str | None = "mean",
        processes: Processes | None = None,
        *,
        copy: bool | None = None,
    ) -> None:
        processes = processes or _everyone()

        def words() -> dict[str, str]:
            instance("processes", processes, Processes, "a Processes")
            require(
                not isinstance(activation, ReLU),
                "activation",
                "fixed gates; the sign patterns of a ReLU depend on all samples at once",
                repr(activation),
            )
            super(ShardedProgram, self).__init__(mixer, activation, loss, tokens, targets, beta, pool, copy=copy)
            parts = {"mixer": self.mixer, "activation": self.activation, "loss": self.loss}
            return {
                **{name: f"{part!r} with digest {fingerprint(part)}" for name, part in parts.items()},
                "tokens": f"(n, {', '.join(map(str, self.tokens.shape[1:]))}) {self.tokens.dtype} on a {self.tokens.device.type}",
                "beta": repr(self.beta),
                "pool": repr(self.pool),
            }

        processes.require_same(words)
        self.reduce = processes.holding(len(self.tokens))

    @property
    def samples(self) -> int:
        """n, the number of samples of all processes."""
        return sum(self.reduce.shares)

    def relaxation(self) -> ShardedProgram:
        """The same program without the cones, which only ReLU has: this one."""
        return self

    def on(self, tokens: Tensor, targets: Tensor, beta: float) -> ShardedProgram:
        """The same mixer, activation, loss and pooling on other data, which are not copied, at another weight decay."""
        parts = (self.mixer, self.activation, self.loss)
        return ShardedProgram(*parts, tokens, targets, beta, self.pool, self.reduce, copy=False)

    def __repr__(self) -> str:
        whole = super().__repr__().replace("ConvexProgram", "ShardedProgram").removesuffix(")")
        return f"{whole}, rank {self.reduce.rank} of {self.reduce.size}, {self.samples} samples in all)"


def shard(program: ConvexProgram, processes: Processes | None = None) -> ShardedProgram:
    """This process's share of a program that every process has made from all the samples.

    Where the samples do not fit into one memory, let every process read its own (or take ``processes.part`` of a memory map) and make a
    :class:`ShardedProgram` of them.

    Args:
        program: the same program on every process; its samples beyond this process's share may be let go afterwards.
        processes: who shares; by default all that were started.

    Returns:
        The program on this process's samples.

    Raises:
        ValueError: the programs differ, or there are fewer samples than processes.
    """
    instance("program", program, ConvexProgram, "a ConvexProgram")
    processes = processes or _everyone()
    processes.require_same(lambda: {"tokens": f"{program.samples} samples"})
    return ShardedProgram(
        program.mixer,
        program.activation,
        program.loss,
        processes.part(program.tokens),
        processes.part(program.targets),
        program.beta,
        program.pool,
        processes,
        copy=False,
    )
