r"""More than one machine: the samples are shared out over processes, and everything else is done by each of them.

A sum over samples is the sum of every process's part,

.. math:: F(Z) = \frac1n \sum_{r} \sum_{i \in I_r} \ell(A_i(Z), y_i), \qquad A^*\rho = \sum_r A_{I_r}^* \rho_{I_r},

so losses, gradients and the certificate's products are all-reduced, while factors, lifted blocks and every decision are the same on all
processes. Each of them ends with the same certified solution, and with its own samples' rows of the dual point.

``torchrun`` starts the processes. Losing one ends the others with an error within the timeout; a solve's checkpoint resumes it.

May import the program and what is below it.
"""

from cvxlib.parallel.processes import Processes
from cvxlib.parallel.sharded import ShardedProgram, shard

__all__ = ["Processes", "ShardedProgram", "shard"]
