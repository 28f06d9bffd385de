"""What a solve would take: operations and bytes of operator splitting and of the staircase, which decide between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cvxlib.model.losses import SquaredLoss
from cvxlib.program.program import LARGEST_DESIGN, ConvexProgram

#: largest Gram matrix that operator splitting is given to factor
LARGEST_GRAM = 8192
#: iterations of splitting, and rounds, descent steps and core steps of the staircase, that a certified gap of 1e-3 usually takes
EXPECTED_ITERATIONS, EXPECTED_ROUNDS, EXPECTED_STEPS, EXPECTED_CORE_STEPS = 200, 5, 150, 100
#: heads of a solution, and in a core for every block
EXPECTED_HEADS, EXPECTED_DIRECTIONS = 24, 4
#: operator splitting is the more predictable of the two: it may take so many times the operations
COST_RATIO = 3.75


@dataclass(frozen=True)
class Cost:
    """Floating point operations of a solve, and the bytes that it holds at once besides the tokens."""

    operations: float
    bytes: float

    def __str__(self) -> str:
        return f"{self.operations:.1e} operations in {self.bytes / 2**20:,.0f} MiB"


def splitting(program: ConvexProgram) -> Cost:
    """An iteration's products with the design tensor (with second moments where the loss is squared), one Gram matrix, one Cholesky factor."""
    operator, size = program.operator, program.tokens.element_size()
    rows, k, p, w = operator.rows, *operator.shape[:2], program.mixer.width
    columns, side = k * p * w // program.mixer.blocks, gram_side(program)
    moments = isinstance(program.loss, SquaredLoss) and side == columns
    iteration = (2.0 * side**2 + (0.0 if moments else 4.0 * rows * columns)) * program.mixer.outputs
    # gates that only mask rows do so in the Gram matrix of these too
    seen = p * w + k // program.mixer.blocks if operator.masked and side == rows else columns
    once = program.mixer.blocks * (2.0 * rows * seen * side + side**3 / 3)
    return Cost(EXPECTED_ITERATIONS * iteration + once, operator.bytes + 2 * program.mixer.blocks * side**2 * size)


def staircase(program: ConvexProgram) -> Cost:
    """Features and their transposes for two dozen heads (or one a block), cores, and a lifted gradient twice a round."""
    operator, factored, size = program.operator, program.factored, program.tokens.element_size()
    rows, (k, p, q) = operator.rows, operator.shape
    heads = max(EXPECTED_HEADS, k)
    descent = EXPECTED_STEPS * 2.0 * factored.flops * len(program.tokens) * heads
    # a core's features, second moments and products, with a few directions for every block
    side = max(EXPECTED_HEADS, EXPECTED_DIRECTIONS * k)
    features, columns = side * program.mixer.width, side**2 // k
    step = 4.0 * rows * features * program.mixer.block_outputs + 2.0 * columns**2
    cores = EXPECTED_ROUNDS * (
        EXPECTED_CORE_STEPS * step + 2.0 * rows * features**2 / program.mixer.blocks + columns**3
    )
    gradients = 2 * EXPECTED_ROUNDS * 2.0 * rows * k * p * q
    kept = min(factored.memory, factored.bytes * len(program.tokens))
    return Cost(descent + cores + gradients, kept + (rows * features + columns**2 + k * p * q) * size)


def gram_side(program: ConvexProgram) -> int:
    """The side of the Gram matrix that operator splitting factors: of the columns where processes share the rows, else the smaller one."""
    operator = program.operator
    columns = operator.shape[0] * program.mixer.p * program.mixer.width // program.mixer.blocks
    return min(operator.rows, columns) if program.reduce.alone else columns


def choose(program: ConvexProgram) -> tuple[str, str]:
    """The solver for a program with fixed gates, and the reason in words."""
    ours, other = splitting(program), staircase(program)
    fits = program.operator.bytes <= LARGEST_DESIGN and gram_side(program) <= LARGEST_GRAM
    (split,) = program.reduce.agree(torch.tensor(float(fits and ours.operations <= COST_RATIO * other.operations)))
    return "splitting" if split else "staircase", f"expected: splitting {ours}, staircase {other}"
