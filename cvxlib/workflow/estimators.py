r"""Scikit-learn estimators: a convex head behind ``fit`` and ``predict``, on token arrays (n, s, d)."""

from __future__ import annotations

import dataclasses
import inspect
import warnings

import numpy as np
import torch
from torch import Tensor

from cvxlib.audit.certificates import predict
from cvxlib.ground.checks import describe, needs_extra, positive_float, require, wrong_type, wrong_value
from cvxlib.model import mixers
from cvxlib.model.activations import Activation, GatedReLU, Linear, ReLU
from cvxlib.model.losses import CrossEntropy, Loss, SquaredLoss
from cvxlib.model.mixers import Mixer
from cvxlib.program.certificate import Status
from cvxlib.program.program import ConvexProgram
from cvxlib.solvers import solve

with needs_extra("the estimators", "estimators"):
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_array, check_is_fitted, check_X_y, column_or_1d, validate_data

DTYPES = (np.float64, np.float32)
#: what the data tell of a mixer's sizes
READ_OFF = ("tokens", "features", "outputs")


class _ConvexHead(BaseEstimator):
    """What the classifier and the regressor share."""

    def __init__(
        self,
        mixer="SelfAttention",
        activation="Linear",
        beta=0.1,
        *,
        relative=True,
        gates=8,
        tol=1e-3,
        max_iterations=20_000,
        solver=None,
        device=None,
        random_state=0,
    ):
        self.mixer = mixer
        self.activation = activation
        self.beta = beta
        self.relative = relative
        self.gates = gates
        self.tol = tol
        self.max_iterations = max_iterations
        self.solver = solver
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    # the parts of fit and predict

    def _validate(self, X, **target):
        """Tokens (n, s, d), from such an array or from (n, d), and with ``y=...`` the targets; fit passes y, predict does not."""
        X = _array(X)
        axes = np.ndim(X) if isinstance(X, np.ndarray | list | tuple) else getattr(X, "ndim", 2)
        require(axes <= 3, "X", "tokens of shape (n, s, d), or (n, d) with one token a sample", f"{axes} axes")
        if axes < 3:
            checked = validate_data(self, X, reset=bool(target), dtype=DTYPES, **target)
            return (checked[0][:, None], checked[1]) if target else checked[:, None]
        if target:
            X, y = check_X_y(X, allow_nd=True, dtype=DTYPES, estimator=self, **target)
            self.n_features_in_ = X.shape[2]
            return X, y
        X = check_array(X, allow_nd=True, dtype=DTYPES, estimator=self, input_name="X")
        if X.shape[2] != self.n_features_in_:
            name = type(self).__name__
            raise ValueError(
                f"X has {X.shape[2]} features, but {name} is expecting {self.n_features_in_} features as input"
            )
        return X

    def _solve(self, X: np.ndarray, targets: np.ndarray, outputs: int, loss: Loss, device: torch.device) -> None:
        """Solve the program of the data and keep the network."""
        tokens = torch.tensor(X, device=device)
        mixer = self._mixer(X.shape[1], X.shape[2], outputs)
        program = ConvexProgram(
            mixer, self._activation(mixer), loss, tokens, torch.tensor(targets, device=device), 1.0, copy=False
        )
        beta = positive_float("beta", self.beta)
        if self.relative:
            beta *= program.beta_max() or 1.0
        solution = solve(
            program.with_beta(beta),
            tol=self.tol,
            max_iterations=self.max_iterations,
            solver=self.solver,
            progress=False,
        )
        if solution.status not in (Status.CERTIFIED, Status.EXACT):
            warnings.warn(str(solution.status), ConvergenceWarning, stacklevel=3)
        self.beta_, self.head_, self.certificate_ = beta, solution.head(), solution.certificate
        self.status_, self.n_iter_ = solution.status, solution.evaluations

    def _predictions(self, X) -> np.ndarray:
        """(n, c) what the network gives."""
        check_is_fitted(self)
        tokens = torch.tensor(self._validate(X)).to(self.head_.u)
        return predict(self.head_, self.head_.mixer.check(tokens)).cpu().numpy()

    def _device(self, X) -> torch.device:
        return torch.device(self.device or (X.device if isinstance(X, Tensor) else "cpu"))

    def _mixer(self, tokens: int, features: int, outputs: int) -> Mixer:
        mixer, sizes = self.mixer, {"tokens": tokens, "features": features, "outputs": outputs}
        if isinstance(mixer, str):
            mixer = _named(mixer)
        if inspect.isclass(mixer) and issubclass(mixer, Mixer):
            fields = [field.name for field in dataclasses.fields(mixer)]
            if unknown := [name for name in fields if name not in READ_OFF]:
                expected = f"an instance of {mixer.__name__}, since the data do not tell its {' and '.join(unknown)}"
                raise wrong_value("mixer", expected, describe(self.mixer))
            return mixer(**{name: sizes[name] for name in fields})
        if not isinstance(mixer, Mixer):
            raise wrong_type("mixer", "a Mixer, a class of mixers or the name of one", mixer)
        require(mixer.outputs == outputs, "mixer", f"a mixer with {outputs} outputs, as y has", mixer)
        return mixer

    def _activation(self, mixer: Mixer) -> Activation:
        match self.activation:
            case Activation():
                return self.activation
            case "Linear":
                return Linear()
            case "GatedReLU":
                seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
                return GatedReLU.sample(mixer, count=self.gates, seed=seed)
            case "ReLU":
                return ReLU()
        raise wrong_value("activation", "'Linear', 'GatedReLU', 'ReLU' or an Activation", describe(self.activation))


class ConvexHeadClassifier(ClassifierMixin, _ConvexHead):
    r"""A head of any mixer, trained to a certified global optimum of the penalised cross-entropy, as a scikit-learn classifier.

    .. math:: \min_{u, V} \frac1n \sum_i \ell\Big(\frac1s \sum_a f(X_i)_a,\, y_i\Big) + \frac\beta2 \sum_j \big(\|u_j\|^2 + \|V_j\|_F^2\big)

    ``X`` is an array (n, s, d) of tokens, NumPy or torch; an array (n, d) is taken as one token a sample. Predictions are NumPy arrays.

    Args:
        mixer: the name of a mixer (``"SelfAttention"``, ``"CausalSelfAttention"``, ``"MLPMixer"``, ``"FNO"``, ``"MLP"``), its class, or an
            instance; an instance where the data do not tell all sizes (``cvxlib.BlockFNO(tokens, features, outputs, blocks)``).
        activation: ``"Linear"``, ``"GatedReLU"`` with random directions, ``"ReLU"`` (few small tokens only), or an instance.
        beta: weight decay, greater than 0.
        relative: ``beta`` is a fraction of beta_max, the weight decay from which on every weight is 0.
        gates: how many directions ``"GatedReLU"`` draws.
        tol, max_iterations, solver: as in :func:`cvxlib.solve`.
        device: where to compute; by default where a torch ``X`` lies, and on the CPU for other arrays.
        random_state: seed of the directions.

    Attributes:
        head_: the network, a :class:`cvxlib.Head`.
        certificate_: the :class:`cvxlib.Certificate` of its training.
        beta_: the weight decay used.
        status_: how the solve ended; a ``ConvergenceWarning`` tells when that is not within ``tol``.
        classes_: (c,) the labels.
        n_features_in_: number of features, d.
        n_iter_: evaluations of the predictions.

    Raises:
        TypeError, ValueError: in ``fit`` and ``predict``, arguments or data that do not fit.

    Source: book, chapter "Self-attention".
    """

    def fit(self, X, y):
        """Solve the convex program of tokens X (n, s, d) and labels y (n,)."""
        device = self._device(X)
        X, y = self._validate(X, y=_array(y))
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        self.classes_, indices = np.unique(y, return_inverse=True)
        require(len(self.classes_) >= 2, "y", "labels of at least 2 classes", "1 class")
        self._solve(X, indices.astype(np.int64), len(self.classes_), CrossEntropy(), device)
        return self

    def predict_proba(self, X):
        """(n, c) the softmax of the network's predictions for tokens (n, s, d)."""
        return torch.softmax(torch.from_numpy(self._predictions(X)), 1).numpy()

    def predict(self, X):
        """(n,) the likeliest label of each sample of tokens (n, s, d)."""
        best = self._predictions(X).argmax(1)
        return self.classes_[best]


class ConvexHeadRegressor(RegressorMixin, _ConvexHead):
    r"""A head of any mixer, trained to a certified global optimum of the penalised squared loss, as a scikit-learn regressor.

    .. math:: \min_{u, V} \frac1{2n} \sum_i \Big\|\frac1s \sum_a f(X_i)_a - y_i\Big\|^2 + \frac\beta2 \sum_j \big(\|u_j\|^2 + \|V_j\|_F^2\big)

    ``X`` is an array (n, s, d) of tokens, NumPy or torch; an array (n, d) is taken as one token a sample. The heads have no intercept:
    centre ``y`` where that matters.

    Args:
        mixer, activation, beta, relative, gates, tol, max_iterations, solver, device, random_state: as for
            :class:`cvxlib.ConvexHeadClassifier`.

    Attributes:
        head_, certificate_, beta_, status_, n_features_in_, n_iter_: as for :class:`cvxlib.ConvexHeadClassifier`.

    Raises:
        TypeError, ValueError: in ``fit`` and ``predict``, arguments or data that do not fit.

    Source: book, chapter "Self-attention".
    """

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X, y):
        """Solve the convex program of tokens X (n, s, d) and values y (n,) or (n, c)."""
        device = self._device(X)
        X, y = self._validate(X, y=_array(y), multi_output=True, y_numeric=True)
        self._single = y.ndim == 1
        values = y.reshape(len(y), -1).astype(X.dtype)
        self._solve(X, values, values.shape[1], SquaredLoss(), device)
        return self

    def predict(self, X):
        """(n,) or (n, c), as y was, the network's predictions for tokens (n, s, d)."""
        predictions = self._predictions(X)
        return predictions[:, 0] if self._single else predictions


def _array(value):
    """A tensor as a NumPy array, and anything else as it is."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _named(name: str) -> type[Mixer]:
    """The class of a mixer of this package."""
    names = {
        key: kind
        for key, kind in vars(mixers).items()
        if inspect.isclass(kind) and issubclass(kind, Mixer) and kind is not Mixer
    }
    require(name in names, "mixer", f"one of {', '.join(map(repr, names))}, a class or an instance", repr(name))
    return names[name]
