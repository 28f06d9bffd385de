r"""The convex program of a head: primal, dual, gap and the critical regularisation."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import torch
from torch import Tensor

from cvxlib.geometry.cones import any_pattern_bound
from cvxlib.geometry.norms import BlockConeNorm, BlockNuclearNorm, spectral_above
from cvxlib.ground.checks import instance, positive_float, require
from cvxlib.ground.identity import own
from cvxlib.ground.one_process import ALONE, OneProcess
from cvxlib.model.activations import Activation, ReLU
from cvxlib.model.heads import Head
from cvxlib.model.losses import Loss
from cvxlib.model.mixers import Mixer
from cvxlib.model.stacked import exact_rows, lifted_rows, lifted_weights
from cvxlib.operators.factored import FactoredOperator
from cvxlib.operators.gates import Gates
from cvxlib.operators.lifted import LiftedOperator
from cvxlib.program.certificate import Assurance, Certificate, Factors
from cvxlib.program.verified import mean_below, norm_above, scaled_below

#: stacked data of a ReLU with more entries than this are not formed: then no lower bound but 0 is left
LARGEST_STACK = 50_000_000

#: bytes of a design tensor that is formed and kept; a larger one is only contracted
LARGEST_DESIGN = 2**30


class _Lent:
    """Tensors that belong to the caller, and the versions that torch counts of them; a deep copy or a pickle has its own, and lends none."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = {name: (t, t._version) for name, t in tensors.items() if not t.is_inference()}

    def require_unchanged(self) -> None:
        """Raise the ``ValueError`` if one of them was changed in place."""
        for name, (tensor, version) in self.tensors.items():
            came = f"a tensor changed in place {tensor._version - version} times since (copy=False keeps the caller's)"
            require(tensor._version == version, name, "the data that the program was made of", came)

    def __reduce__(self) -> tuple:
        return _Lent, ()


class ConvexProgram:
    r"""The convex program whose optimal value is that of a wide enough head trained with weight decay.

    .. math:: p^\star = \min_Z \frac1n \sum_{i=1}^n \ell\Big(\sum_k A_{i,k}(Z_k),\, y_i\Big) + \beta \sum_k \|Z_k\|_*

    With ``pool="mean"`` predictions are averaged over output positions before the loss; with ``pool=None`` the loss of a sample
    is the sum over its tokens.

    The program keeps its own copy of tokens and targets, so that a certificate is about the data that it was given, whatever becomes of
    the caller's arrays.

    Args:
        mixer: how tokens are mixed.
        activation: which gates pass.
        loss: :class:`cvxlib.SquaredLoss` or :class:`cvxlib.CrossEntropy`.
        tokens: (n, s, d) float32 or float64, NumPy or torch; the program lives on their device and in their dtype.
        targets: (n,) class indices or (n, c) values if pooled; (n, s) indices or (n, s, c) values per token.
        beta: weight decay, greater than 0, for the penalty :math:`\tfrac\beta2 \sum_j (\|u_j\|^2 + \|V_j\|_F^2)`.
        pool: ``"mean"`` or ``None``.
        copy: whether the program keeps a copy of tokens and targets; by default of all but a :class:`numpy.memmap`, which may be larger
            than memory. Without a copy (``False``, for a tensor on a memory map, say) the data must not change while the program is
            used: an in-place operation of torch on the caller's tensor is noticed and refused, a change by other ways is not.

    Raises:
        TypeError: an argument of the wrong kind (tokens of integers, class targets that are floats, ...).
        ValueError: shapes that do not fit each other or the mixer, NaN, targets out of range, beta not above 0; later, where nothing was
            copied, data that were changed in place.

    Source: Sahiner et al. 2022, Theorem 3.1 and section 4; book, chapter "Self-attention".
    """

    #: sums a tensor over the processes that hold samples; here there is one
    reduce: OneProcess = ALONE

    def __init__(
        self,
        mixer: Mixer,
        activation: Activation,
        loss: Loss,
        tokens: Tensor,
        targets: Tensor,
        beta: float,
        pool: str | None = "mean",
        *,
        copy: bool | None = None,
    ) -> None:
        instance("copy", copy, (bool, type(None)), "True, False or None")
        instance("mixer", mixer, Mixer, "a Mixer such as cvxlib.SelfAttention(features=d, outputs=c)")
        instance("activation", activation, Activation, "an Activation such as cvxlib.Linear()")
        instance("loss", loss, Loss, "a Loss such as cvxlib.SquaredLoss()")
        require(pool in ("mean", None), "pool", "'mean' or None", repr(pool))
        self.mixer, self.activation, self.loss, self.pool = mixer, activation, loss, pool
        self.beta = positive_float("beta", beta)
        self._tokens, self._lent = mixer.check(tokens), _Lent()
        activation.check(mixer)
        n = len(self.tokens)
        self.positions = mixer.hidden(mixer.split(self.tokens[:1])[0], self.tokens.new_zeros(1, *mixer.shape)).shape[2]
        targets = loss.check(targets, (n,) if pool else (n, self.positions), mixer.outputs)
        if targets.is_floating_point():
            targets = targets.to(self.tokens.dtype)
        self.targets = targets.to(self.tokens.device)
        if copy or (copy is None and not isinstance(tokens, np.memmap)):
            self._tokens, self.targets = own(self.tokens), own(self.targets)
        else:
            self._lent = _Lent(tokens=self.tokens, targets=self.targets)

    @property
    def tokens(self) -> Tensor:
        """(n, s, d) the tokens."""
        self._lent.require_unchanged()
        return self._tokens

    @property
    def samples(self) -> int:
        """n, the number of samples."""
        return len(self.tokens)

    @functools.cached_property
    def rows(self) -> Tensor:
        """(rows,) or (rows, c) the targets, one row per prediction."""
        return self.targets if self.pool else self.targets.flatten(0, 1)

    @functools.cached_property
    def operator(self) -> LiftedOperator:
        """The lifted linear operator, built once."""
        return LiftedOperator(self.frozen, self.pool == "mean", self.reduce)

    @functools.cached_property
    def factored(self) -> FactoredOperator:
        """The same operator for factors, which never forms the design tensor."""
        return self._factored(self.tokens.dtype)

    def _factored(self, dtype: torch.dtype) -> FactoredOperator:
        operator = self.operator
        return FactoredOperator(
            self.frozen,
            self.pool == "mean",
            operator.gate,
            operator.block,
            operator.rows,
            self.reduce,
            dtype=dtype,
        )

    @functools.cached_property
    def gates(self) -> Activation:
        """The fixed gates: the activation's own, and for ReLU those of all sign patterns (``ValueError`` where these are too many)."""
        return self.activation.gates(self.mixer, self.tokens)

    @functools.cached_property
    def frozen(self) -> Gates:
        """The gates on the program's own tokens, decided once in float64: the masks that every bound is about."""
        return Gates(self.mixer, self.gates, self._tokens)

    @functools.cached_property
    def enumerated(self) -> bool:
        """Whether the gates are finitely many and known; false for a ReLU with more sign patterns than its limit."""
        if isinstance(self.activation, ReLU) and 2 * self.stacked * self.mixer.p > LARGEST_STACK:
            return False
        try:
            return self.gates is not None
        except ValueError:
            return False

    @functools.cached_property
    def stacked(self) -> int:
        """R, the number of rows of the stacked data of one block: samples times output positions times hidden entries."""
        seen = self.mixer.split(self.tokens[:1])[0]
        return self.samples * self.mixer.hidden(seen, seen.new_zeros(1, *self.mixer.shape)).numel()

    @functools.cached_property
    def norm(self) -> BlockNuclearNorm | BlockConeNorm:
        """The norm of the lifted blocks that the weight decay becomes."""
        if not isinstance(self.activation, ReLU):
            return BlockNuclearNorm()
        rows = [exact_rows(self.mixer, seen) for seen in self.mixer.split(self.tokens)]
        directions = self.gates.directions.reshape(self.gates.count, self.mixer.blocks, self.mixer.p)
        return BlockConeNorm(rows, directions[self.operator.gate, self.operator.block], self.operator.block)

    def relaxation(self) -> ConvexProgram:
        """The same program without the cones: for ReLU, gated ReLU over all sign patterns, whose optimum is a lower bound."""
        return ConvexProgram(
            self.mixer, self.gates, self.loss, self.tokens, self.targets, self.beta, self.pool, copy=False
        )

    def with_beta(self, beta: float) -> ConvexProgram:
        """The same program at another weight decay, sharing everything already computed."""
        other = copy.copy(self)
        other.beta = positive_float("beta", beta)
        return other

    def double(self) -> ConvexProgram:
        """The same program in float64, from the same tokens."""
        if self.tokens.dtype == torch.float64:
            return self
        targets = self.targets.double() if self.targets.is_floating_point() else self.targets
        return self.on(self.tokens.double(), targets, self.beta)

    def on(self, tokens: Tensor, targets: Tensor, beta: float) -> ConvexProgram:
        """The same mixer, activation, loss and pooling on other data, which are not copied, at another weight decay."""
        return ConvexProgram(self.mixer, self.activation, self.loss, tokens, targets, beta, self.pool, copy=False)

    def in_double(self) -> ConvexProgram:
        """The same program for arithmetic in float64 on the tokens as they are, which are converted part by part and never copied whole."""
        other = copy.copy(self)
        if self.tokens.dtype == torch.float64:
            return other
        other.__dict__.pop("rows", None)
        other.targets = self.targets.double() if self.targets.is_floating_point() else self.targets
        other.factored = self._factored(torch.float64)
        return other

    # values

    def data_loss(self, predictions: Tensor) -> float:
        """The loss of predictions (rows, c), summed over a sample's rows and averaged over samples."""
        return float(self.reduce(self.loss.value(predictions, self.rows).sum())) / self.samples

    def objective(self, z: Tensor) -> float:
        """The regularised objective at lifted blocks (K, p, q)."""
        return self.data_loss(self.operator.forward(z)) + self.beta * float(self.norm.value(z))

    def gradient(self, predictions: Tensor) -> Tensor:
        """(K, p, q) the gradient of the data term in the lifted blocks, at predictions (rows, c)."""
        return self.adjoint(self.loss.gradient(predictions, self.rows)) / self.samples

    def adjoint(self, dual: Tensor) -> Tensor:
        """(K, p, q) the adjoint of the lifted operator, applied to (rows, c); it uses the design tensor only where that is there already."""
        formed = "maps" in vars(self.operator) and dual.dtype == self.tokens.dtype
        return (self.operator if formed else self.factored).adjoint(dual)

    def beta_max(self) -> float:
        r"""The smallest beta whose solution is 0, :math:`\max_k \|\nabla_k F(0)\|_2`."""
        zero = self.tokens.new_zeros(len(self.rows), self.mixer.outputs)
        return self.dual_norm(self.loss.gradient(zero, self.rows))

    # duality

    def dual_norm(self, point: Tensor) -> float:
        r"""The dual norm :math:`\max_k \|\tfrac1n A_k^*\rho\|_\circ` of a point (rows, c); for ReLU an upper bound on it.

        The bound is exact where every cone could be searched through, and needs no pattern where they cannot be enumerated; it is
        infinite where the stacked data are too large to be formed.
        """
        if self.enumerated:
            return float(self.norm.dual(self.adjoint(point))) / self.samples
        if self.stacked * self.mixer.p > LARGEST_STACK:
            return math.inf
        per_sample = point.reshape(self.samples, -1, self.mixer.blocks, self.mixer.block_outputs).double().cpu()
        bounds = [
            any_pattern_bound(
                lifted_rows(self.mixer, seen).numpy(), lifted_weights(self.mixer, seen, per_sample[:, :, b]).numpy()
            )
            for b, seen in enumerate(self.mixer.split(self.tokens.double().cpu()))
        ]
        return max(bounds) / self.samples

    def dual_value(self, point: Tensor) -> float:
        r"""The dual objective :math:`-\tfrac1n \sum_i \ell^*(\rho_i, y_i)` at a point (rows, c); a lower bound where it is feasible."""
        return -float(self.reduce(self.loss.conjugate(point, self.rows).sum())) / self.samples

    def feasible_dual(self, residual: Tensor, spectral: float, slack: float | None = None) -> tuple[float, Tensor]:
        r"""The best dual value along the ray of a residual, among the feasible points.

        A multiple :math:`t\rho` is feasible where :math:`t \max_k \|\tfrac1n A_k^*\rho\|_2 \le \beta`; the dual objective is concave in t.

        Args:
            residual: (rows, c) loss gradients at any predictions.
            spectral: :math:`\max_k \|\tfrac1n A_k^*\rho\|_2`, the largest singular value over all blocks.
            slack: relative error of that value, by default a bound on its rounding.

        Returns:
            the dual value and the feasible point (rows, c).
        """
        (agreed,) = self.reduce.agree(residual.new_tensor(spectral, dtype=torch.float64))
        spectral = float(agreed)
        # the singular value is known to rounding only: stay inside the ball by more than that
        if slack is None:
            slack = 4 * max(self.mixer.p, self.mixer.q) * torch.finfo(residual.dtype).eps
        limit = self.beta / (spectral * (1 + slack)) if spectral > 0 else 1.0
        step = _golden_section(lambda t: self.dual_value(t * residual), min(limit, 16.0))
        return self.dual_value(step * residual), step * residual

    def certificate(self, z: Tensor) -> Certificate:
        """The interval that lifted blocks (K, p, q) and their residual certify."""
        predictions = self.operator.forward(z)
        residual = self.loss.gradient(predictions, self.rows)
        _, point = self.feasible_dual(residual, self.dual_norm(residual))
        primal = self.data_loss(predictions) + self.beta * float(self.norm.value(z))
        return self.certify_point(primal, point, z.dtype)

    def certify_point(self, primal: float, point: Tensor, dtype: torch.dtype = torch.float64) -> Certificate:
        r"""The interval below an upper bound that a dual point (rows, c) proves, in float64 whatever the program's type.

        Rigorous where :attr:`why_not_rigorous` has nothing to say: then the lower bound holds in exact arithmetic.

        Args:
            primal: an upper bound on the optimum, computed in ``dtype``.
            point: (rows, c) a point that is feasible to rounding.
            dtype: the arithmetic of the primal value.
        """
        exact = self.in_double()
        point = point.double()
        if self.activation.fixed:
            self.frozen.warn_if_close()
        assurance = Assurance.RIGOROUS if self.why_not_rigorous is None else Assurance.ROUNDING
        bounded = self.mixer.bounded_by is not None and (self.activation.fixed or self.enumerated)
        conjugate = exact.loss.conjugate_above(point, exact.rows) if bounded else None
        if conjugate is not None:
            above, distance = conjugate
            at_zero, _ = exact.loss.conjugate_above(torch.zeros_like(point), exact.rows)
            value, zero = (mean_below(part, self.samples, self.reduce) for part in (above, at_zero))
            adjoint, distances = exact.factored.adjoint_within(point, distance)
            norms = spectral_above(adjoint) if self.activation.fixed else self.norm.dual(adjoint) + self._moved(point)
            dual, factor = scaled_below(value, zero, norm_above(norms, distances, self.samples), self.beta)
            return Certificate(primal, dual, factor * point, dtype, assurance)
        dual, point = exact.feasible_dual(exact.loss.to_domain(point, exact.rows), exact.dual_norm(point))
        return Certificate(primal, dual, point, dtype, assurance)

    def _moved(self, point: Tensor) -> float:
        r"""What a ReLU's unscaled dual norm can owe to rows that were taken for parallel: :math:`2 \sum_r \delta_r \|w_r\|`, once in the rows and once in G."""
        dual, total = point.reshape(self.samples, -1, self.mixer.blocks, self.mixer.block_outputs), 0.0
        for b, seen in enumerate(self.mixer.split(self.tokens.double())):
            off = torch.as_tensor(self.norm.moved(b)).to(seen.device)
            if bool((off > 0).any()):
                rows, weights = lifted_rows(self.mixer, seen), lifted_weights(self.mixer, seen, dual[:, :, b])
                total += 2 * float((off * rows.norm(dim=1) * weights.norm(dim=1)).sum()) * (1 + 1e-6)
        return total

    @property
    def why_not_rigorous(self) -> str | None:
        """What a bound of this program rests on besides exact arithmetic, in words; ``None`` where it rests on nothing else."""
        if not self.activation.fixed:
            return "the search through the cones of a ReLU holds to rounding"
        if self.mixer.bounded_by is None:
            return f"{type(self.mixer).__name__} does not say that its maps are sums of products"
        if type(self.loss).conjugate_above is Loss.conjugate_above:
            return f"{type(self.loss).__name__} does not say how its conjugate rounds"
        if self.tokens.device.type != "cpu":
            return f"nothing here bounds the rounding of products on {self.tokens.device.type}"
        return None

    # the network

    def lift(self, factors: Factors) -> Tensor:
        """(K, p, q) the lifted blocks of rank-one terms."""
        terms = factors.u.flatten(1).unsqueeze(2) * factors.v.flatten(1).unsqueeze(1)
        block = factors.block
        if isinstance(self.activation, ReLU):
            block = self.norm.locate(factors.u.flatten(1), block)
        return self.operator.zeros().index_add_(0, block, terms)

    def head(self, factors: Factors) -> Head:
        """The network whose heads are the rank-one terms."""
        if isinstance(self.activation, ReLU):
            gate, block = torch.zeros_like(factors.block), factors.block
        else:
            gate, block = self.operator.gate[factors.block], self.operator.block[factors.block]
        return Head(self.mixer, self.activation, factors.u, factors.v, gate, block, pool=self.pool)

    def __repr__(self) -> str:
        n, s, d = self.tokens.shape
        return (
            f"ConvexProgram({self.mixer!r}, {self.activation!r}, {self.loss!r}, "
            f"tokens (n={n}, s={s}, d={d}), beta={self.beta:.3g}, pool={self.pool!r})"
        )


def _golden_section(function, upper: float, steps: int = 32) -> float:
    """The maximiser on [0, upper] of a concave function, finite near 0 and perhaps minus infinity further out."""
    ratio = (5**0.5 - 1) / 2
    low, high = 0.0, upper
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(steps):
        if at_left > at_right or at_left == -float("inf"):
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return max((low, left, right, high), key=function)
