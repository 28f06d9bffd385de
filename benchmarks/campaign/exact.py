r"""A program without rounding: tokens, targets, masks and beta as they are stored, in integers times powers of two.

Shares no code with the package's operators: the two maps of every mixer are written here again, from their definitions.
"""

from __future__ import annotations

from dataclasses import dataclass

import mpmath
import numpy as np
import torch

import cvxlib

#: bits of every sum that is not made of integers: 300 digits, so that sums over a range of 1e120 keep sixty
BITS = 1000
#: bits of logarithms and exponentials, which are taken of numbers that are free of cancellation by then
LOG_BITS = 256

mp = mpmath.mp.clone()
mp.prec = BITS
logs = mpmath.mp.clone()
logs.prec = LOG_BITS


@dataclass(frozen=True)
class Dyadic:
    """An array of numbers without rounding: integers (an object array) times two to the power of ``exponent``."""

    integers: np.ndarray
    exponent: int

    @classmethod
    def of(cls, floats: np.ndarray) -> Dyadic:
        """The floats as they are."""
        mantissas, exponents = np.frexp(np.asarray(floats, dtype=np.float64))
        whole = (mantissas * 2.0**53).astype(np.int64).astype(object)
        used = exponents[mantissas != 0] - 53
        least = int(used.min()) if used.size else 0
        shifts = np.where(mantissas != 0, exponents - 53 - least, 0).astype(object)
        return cls(np.asarray(whole * 2**shifts, dtype=object), least)

    def numbers(self) -> np.ndarray:
        """An object array of numbers of :data:`BITS` bits."""
        out = np.empty(self.integers.shape, dtype=object)
        for index, integer in np.ndenumerate(self.integers):
            out[index] = mp.ldexp(mp.mpf(int(integer)), self.exponent)
        return out

    def floats(self) -> np.ndarray:
        """The nearest floats."""
        return np.array([float(x) for x in self.numbers().flat]).reshape(self.integers.shape)


class Undecided(Exception):
    """A mask has an entry that rounding decides: then two programs are one, and nothing can be compared."""


class ExactProgram:
    """What a :class:`cvxlib.ConvexProgram` states, in exact arithmetic.

    Args:
        program: with a built-in mixer.

    Raises:
        Undecided: a mask depends on rounding.
    """

    def __init__(self, program: cvxlib.ConvexProgram) -> None:
        mixer = self.mixer = program.mixer
        self.program, self.pooled, self.n = program, program.pool == "mean", program.samples
        self.squared = isinstance(program.loss, cvxlib.SquaredLoss)
        self.relu = isinstance(program.activation, cvxlib.ReLU)
        self.beta = mp.mpf(program.beta)
        tokens = Dyadic.of(program.tokens.double().numpy())
        self.maps, self.exponent = [], 0
        for seen in np.split(tokens.integers, mixer.blocks, axis=2):
            left, right, degree = maps(mixer, seen)
            self.maps.append((left, right))
            self.exponent = degree * tokens.exponent
        self.positions = self.maps[0][0].shape[1]
        targets = program.targets.double().numpy() if self.squared else program.targets.numpy()
        self.targets = targets.reshape(-1, mixer.outputs) if self.squared else targets.reshape(-1)
        self.exact_targets = Dyadic.of(self.targets).numbers() if self.squared else self.targets
        self.masks = None if self.relu else [self._masks(b) for b in range(mixer.blocks)]

    # gates

    def _masks(self, block: int) -> np.ndarray:
        """(n, P, a, h) masks of a block in exact arithmetic, which every float computation must share with a margin."""
        program, (left, _) = self.program, self.maps[block]
        if isinstance(program.activation, cvxlib.Linear):
            return np.ones((self.n, 1, *left.shape[1:3]), dtype=object)
        directions = program.activation.directions.double().numpy()
        if self.mixer.blocks > 1:
            directions = directions[:, block]
        directions = Dyadic.of(directions.reshape(len(directions), -1)).integers
        hidden = np.moveaxis(left @ directions.T, 3, 1)
        size = np.moveaxis(np.abs(left) @ np.abs(directions).T, 3, 1)
        mixes = isinstance(self.mixer, cvxlib.FNO | cvxlib.BlockFNO)  # a transform spreads rounding over a sample
        scale = np.broadcast_to(size.max(axis=(2, 3), keepdims=True), size.shape) if mixes else size
        margin = 2**14 if program.tokens.dtype == torch.float32 else 2**40
        masks = hidden >= 0
        if ((np.abs(hidden) * margin <= scale) & (scale > 0)).any():
            raise Undecided
        seen = self.mixer.split(program.tokens)[block]
        for tokens in (seen, seen.double()):
            if not np.array_equal(program.activation.masks(self.mixer, tokens, block).numpy(), masks):
                raise Undecided
        return masks.astype(int).astype(object)

    # the network

    def predictions(self, u: np.ndarray, v: np.ndarray, gate: np.ndarray, block: np.ndarray) -> np.ndarray:
        r"""(rows, c) predictions of a head with weights u (m, p), v (m, w, c / B)."""
        total = np.zeros((self.n, 1 if self.pooled else self.positions, self.mixer.outputs), dtype=object)
        width = self.mixer.block_outputs
        left_weights, right_weights = Dyadic.of(u.reshape(len(u), self.mixer.p)), Dyadic.of(v)
        for j in range(len(u)):
            left, right = self.maps[block[j]]
            hidden = left @ left_weights.integers[j]
            hidden = np.maximum(hidden, 0) if self.relu else hidden * self.masks[block[j]][:, gate[j]]
            if self.pooled:
                hidden = hidden.sum(1, keepdims=True)
            projected = right @ right_weights.integers[j]
            columns = slice(block[j] * width, (block[j] + 1) * width)
            total[:, :, columns] = total[:, :, columns] + hidden @ projected
        exponent = self.exponent + left_weights.exponent + right_weights.exponent
        numbers = Dyadic(total.reshape(-1, self.mixer.outputs), exponent).numbers()
        return numbers / self.positions if self.pooled else numbers

    def data_loss(self, predictions: np.ndarray) -> mpmath.mpf:
        """The loss of predictions (rows, c)."""
        if self.squared:
            return sum((difference * difference for difference in (predictions - self.exact_targets).flat), mp.zero) / (
                2 * self.n
            )
        total = mp.zero
        for row, target in zip(predictions, self.targets, strict=True):
            top = max(row)
            total += top - row[target] + mp.mpf(logs.log(sum(logs.exp(entry - top) for entry in row)))
        return total / self.n

    def objective(self, head: cvxlib.Head) -> mpmath.mpf:
        r"""The least objective of a head over the scales of its neurons: weight decay :math:`\sum_j \|u_j\| \|V_j\|_F`."""
        with torch.no_grad():
            u, v = head.u.double().numpy().reshape(len(head), self.mixer.p), head.v.double().numpy()
        gate, block = head.gate.numpy(), head.block.numpy()
        decay = sum((norm(a) * norm(b) for a, b in zip(u, v, strict=True)), mp.zero)
        return self.data_loss(self.predictions(u, v, gate, block)) + self.beta * decay

    # the lifted operator

    def design(self) -> list[tuple[int, Dyadic]]:
        """For every block of the program the mixer's block and a (rows, p, w) map, summed over positions if pooled; for a ReLU the open gate's."""
        found = []
        for b, (left, right) in enumerate(self.maps):
            masks = np.ones((self.n, 1, *left.shape[1:3]), dtype=object) if self.relu else self.masks[b]
            for mask in np.moveaxis(masks, 1, 0):
                gated = left * mask[..., None]
                if self.pooled:
                    gated = gated.sum(1, keepdims=True)
                lifted = np.einsum("nahp,nhw->napw", gated, right)
                found.append((b, Dyadic(lifted.reshape(-1, *lifted.shape[2:]), self.exponent)))
        return found

    def float_adjoint(self, point: np.ndarray) -> list[np.ndarray]:
        r"""The matrices :math:`\tfrac1n A_k^* x` in plain floats."""
        if not hasattr(self, "_float_design"):
            self._float_design = [(b, lifted.floats()) for b, lifted in self.design()]
        width, scale = self.mixer.block_outputs, self.n * (self.positions if self.pooled else 1)
        return [
            np.einsum("rpw,rc->pwc", lifted, point[:, b * width : (b + 1) * width] / scale).reshape(len(lifted[0]), -1)
            for b, lifted in self._float_design
        ]

    def float_bound(self, point: np.ndarray, shrink: float = 1.0) -> float:
        """The plain float bound along the ray of a point: no error term, no rounding direction.

        Args:
            point: (rows, c).
            shrink: a factor on the spectral norm; below 1 it plants a fault.
        """
        if not self.squared:
            corner = np.eye(self.mixer.outputs)[self.targets]
            probabilities = np.maximum(point + corner, 0)
            point = probabilities / probabilities.sum(1, keepdims=True) - corner
        spectral = shrink * max(spectral_norm(gradient) for gradient in self.float_adjoint(point))
        if not np.isfinite(spectral):
            return -np.inf
        limit = min(float(self.program.beta) / spectral, 16.0) if spectral > 0 else 1.0
        with np.errstate(all="ignore"):
            if self.squared:
                square, cross = float((point * point).sum()), float((point * self.targets).sum())
                step = min(max(-cross / square, 0.0), limit) if square > 0 else 0.0
                return -step * (step * square / 2 + cross) / self.n
            steps = min(limit, 1.0) * np.array([0.0, 0.5, 0.9, 0.99, 1.0])
            probabilities = np.maximum(steps[:, None, None] * point + corner, 0)
            return (
                float(-np.where(probabilities > 0, probabilities * np.log(probabilities), 0).sum((1, 2)).min()) / self.n
            )


def maps(mixer: cvxlib.Mixer, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(n, a, h, p) rows of the hidden map, (n, h, w) values, and the degree of their product in the tokens (n, s, d), for one block."""
    n, s, d = tokens.shape
    kind = type(mixer)
    if kind in (cvxlib.SelfAttention, cvxlib.CausalSelfAttention, cvxlib.CrossAttention):
        crossed = kind is cvxlib.CrossAttention
        queries, keys = (tokens[:, : mixer.queries], tokens[:, mixer.queries :]) if crossed else (tokens, tokens)
        left = queries[:, :, None, :, None] * keys[:, None, :, None, :]
        left = left.reshape(*left.shape[:3], d * d)
        if kind is cvxlib.CausalSelfAttention:
            left = left * np.tri(s, dtype=int).astype(object)[None, :, :, None]
        return left, keys, 3
    if kind is cvxlib.MLPMixer:
        left = np.zeros((n, s, d, s, s), dtype=object)
        for a in range(s):
            left[:, a, :, a, :] = np.swapaxes(tokens, 1, 2)
        return left.reshape(n, s, d, s * s), _identity(n, d), 1
    if kind in (cvxlib.FNO, cvxlib.BlockFNO):
        left = np.zeros((n, s, 1, s, d), dtype=object)
        for a in range(s):
            for k in range(s):
                left[:, a, 0, k] = tokens[:, (a - k) % s]
        return left.reshape(n, s, 1, s * d), _identity(n, 1), 1
    if kind is cvxlib.MLP:
        return tokens[:, :, None, :], _identity(n, 1), 1
    if kind is cvxlib.Convolution:
        places = s - mixer.kernel + 1
        left = np.stack([tokens[:, k : k + mixer.kernel].reshape(n, -1) for k in range(places)], 1)
        return left[:, None], _identity(n, places), 1
    raise TypeError(f"no exact maps of {kind.__name__}")


def norm(floats: np.ndarray) -> mpmath.mpf:
    """The Euclidean norm of floats to :data:`BITS` bits."""
    exact = Dyadic.of(floats.reshape(-1))
    return mp.ldexp(mp.sqrt(mp.mpf(int((exact.integers**2).sum()))), exact.exponent)


def spectral_norm(matrix: np.ndarray) -> float:
    """The spectral norm in floats, of a matrix of any scale."""
    largest = float(np.abs(matrix).max())
    if not 0 < largest < np.inf:
        return largest
    exponent = int(np.frexp(largest)[1])
    with np.errstate(all="ignore"):
        return float(np.ldexp(np.linalg.norm(np.ldexp(matrix, -exponent), 2), exponent))


def _identity(n: int, size: int) -> np.ndarray:
    return np.broadcast_to(np.eye(size, dtype=int).astype(object), (n, size, size))
