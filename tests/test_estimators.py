"""Scikit-learn manners: its own checks, and what they do not look at, on token arrays (n, s, d)."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from family import MIXERS, build, name, normal

import cvxlib

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from cvxlib import ConvexHeadClassifier, ConvexHeadRegressor

N, S, D = 40, 4, 2
X = normal(N, S, D).numpy()
#: pooled linear attention is the mean token times the Gram matrix of the tokens; labels and values that are of this form
CUBIC = np.einsum("ne,nse,nsf->nf", X.mean(1), X, X)
LABELS = np.array(["even", "odd"])[(CUBIC[:, 0] > 0).astype(int)]
VALUES = CUBIC / CUBIC.std(0)


# Scikit-learn's own checks call fit with (n, d) arrays, which are samples of one token, so they all apply. None is declared as an
# expected failure. Skipped by scikit-learn itself: check_array_api_input (needs the environment variable SCIPY_ARRAY_API; arrays of other
# libraries than NumPy and torch are not promised) and the checks of data frames (where pandas is not installed).
@parametrize_with_checks([ConvexHeadClassifier(), ConvexHeadRegressor("FNO", "GatedReLU")])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


# on tokens


def test_fit_and_predict_on_tokens():
    model = ConvexHeadClassifier(beta=0.02).fit(X, LABELS)
    probabilities = model.predict_proba(X)
    assert model.score(X, LABELS) == np.mean(model.predict(X) == LABELS) > 0.85
    assert probabilities.shape == (N, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)
    np.testing.assert_array_equal(model.classes_[probabilities.argmax(1)], model.predict(X))
    assert (model.n_features_in_, list(model.classes_)) == (D, ["even", "odd"])


def test_the_certificate_is_that_of_the_program():
    model = ConvexHeadClassifier("MLPMixer", "GatedReLU", beta=0.1, gates=3, tol=1e-5).fit(X, LABELS)
    labels = (LABELS == "odd").astype(int)
    mixer = cvxlib.MLPMixer(tokens=S, features=D, outputs=2)
    assert model.head_.mixer == mixer
    program = cvxlib.ConvexProgram(
        mixer, model.head_.activation, cvxlib.CrossEntropy(), torch.tensor(X), torch.tensor(labels), model.beta_
    )
    assert model.beta_ == pytest.approx(0.1 * program.beta_max(), rel=1e-12)
    assert model.certificate_.relative_gap <= 1e-5
    audit = cvxlib.certify(program, model.head_, model.certificate_.dual_point)
    assert audit.primal == pytest.approx(model.certificate_.primal, rel=1e-10)
    assert audit.relative_gap <= 1.1e-5
    np.testing.assert_allclose(
        model.predict_proba(X), torch.softmax(model.head_(torch.tensor(X)), 1).detach().numpy(), rtol=1e-12
    )


def test_beta_is_a_fraction_of_beta_max_unless_it_is_absolute():
    assert len(ConvexHeadRegressor(beta=1.0).fit(X, VALUES).head_) == 0
    assert len(ConvexHeadRegressor(beta=0.9).fit(X, VALUES).head_) > 0
    fraction = ConvexHeadRegressor(beta=0.3).fit(X, VALUES)
    absolute = ConvexHeadRegressor(beta=fraction.beta_, relative=False).fit(X, VALUES)
    assert absolute.certificate_ == fraction.certificate_


@pytest.mark.parametrize("y", [VALUES, VALUES[:, 0], VALUES[:, :1]], ids=["(n, 2)", "(n,)", "(n, 1)"])
def test_regression_has_the_shape_of_its_targets(y):
    model = ConvexHeadRegressor(beta=0.01).fit(X, y)
    assert model.predict(X).shape == y.shape
    assert model.score(X, y) > 0.9


@pytest.mark.parametrize("mixer", ["SelfAttention", "CausalSelfAttention", "MLPMixer", "FNO", "MLP"])
def test_mixers_by_name_by_class_and_as_instances(mixer):
    kind = getattr(cvxlib, mixer)
    models = [ConvexHeadRegressor(m, beta=0.3).fit(X, VALUES) for m in (mixer, kind, build(kind))]
    assert [model.head_.mixer for model in models] == [build(kind)] * 3
    for model in models[1:]:
        np.testing.assert_array_equal(model.predict(X), models[0].predict(X))


@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_every_mixer_as_an_instance(mixer):
    model = ConvexHeadClassifier(mixer, "GatedReLU", gates=2, beta=0.3).fit(X, LABELS)
    assert model.head_.mixer == mixer
    assert model.certificate_.relative_gap <= 1e-3
    assert clone(model).mixer == mixer


def test_activations_by_name_and_as_instances():
    gates = cvxlib.GatedReLU.sample(build(cvxlib.MLP), count=3, seed=1)
    model = ConvexHeadRegressor("MLP", gates).fit(X, VALUES)
    assert torch.equal(model.head_.activation.directions, gates.directions)
    drawn = [ConvexHeadRegressor("MLP", "GatedReLU", random_state=seed).fit(X, VALUES) for seed in (0, 0, 1)]
    directions = [model.head_.activation.directions for model in drawn]
    assert torch.equal(directions[0], directions[1])
    assert not torch.equal(directions[0], directions[2])
    assert isinstance(ConvexHeadRegressor("MLP", "Linear").fit(X, VALUES).head_.activation, cvxlib.Linear)


def test_a_relu_on_little_data():
    few, y = X[:4, :1], VALUES[:4, :1]
    model = ConvexHeadRegressor("MLP", "ReLU", beta=0.3).fit(few, y)
    assert isinstance(model.head_.activation, cvxlib.ReLU)
    assert model.certificate_.dual <= model.certificate_.primal


def test_attention_takes_samples_of_another_length():
    model = ConvexHeadClassifier().fit(X, LABELS)
    assert model.predict(X[:, :3]).shape == (N,)
    with pytest.raises(ValueError, match=r"tokens: expected shape \(n, s, d\) with s = 4"):
        ConvexHeadClassifier("FNO").fit(X, LABELS).predict(X[:, :3])


# manners


def test_grid_search_over_beta():
    search = GridSearchCV(ConvexHeadClassifier(tol=1e-2), {"beta": [0.01, 0.1, 0.9]}, cv=2).fit(X, LABELS)
    assert search.best_params_["beta"] in (0.01, 0.1)
    assert isinstance(search.best_estimator_.certificate_, cvxlib.Certificate)
    assert cross_val_score(ConvexHeadRegressor(), X, VALUES, cv=2).shape == (2,)


def test_parameters_are_kept_as_given():
    model = ConvexHeadClassifier("FNO", beta=0.5, gates=3)
    parameters = model.get_params()
    assert (parameters["mixer"], parameters["beta"], parameters["gates"]) == ("FNO", 0.5, 3)
    assert clone(model).get_params() == parameters
    assert model.set_params(beta=0.2).beta == 0.2
    assert model.fit(X, LABELS).get_params() == parameters | {"beta": 0.2}
    assert not hasattr(clone(model), "head_")


def test_a_fitted_model_survives_pickling():
    model = ConvexHeadClassifier("MLP", "GatedReLU").fit(X, LABELS)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(X), model.predict_proba(X))


def test_its_head_can_be_saved_without_pickle(tmp_path):
    model = ConvexHeadClassifier().fit(X, LABELS)
    cvxlib.save(tmp_path / "head.safetensors", model.head_)
    assert torch.equal(cvxlib.load(tmp_path / "head.safetensors")(torch.tensor(X)), model.head_(torch.tensor(X)))


def test_torch_and_lists_and_float32():
    numpy = ConvexHeadClassifier().fit(X, LABELS)
    for tokens in (torch.tensor(X), X.tolist()):
        np.testing.assert_array_equal(
            ConvexHeadClassifier().fit(tokens, LABELS).predict_proba(tokens), numpy.predict_proba(X)
        )
    single = ConvexHeadClassifier().fit(X.astype(np.float32), LABELS)
    assert single.head_.u.dtype == torch.float32
    assert single.certificate_.dtype == torch.float64
    np.testing.assert_allclose(single.predict_proba(X), numpy.predict_proba(X), atol=0.05)
    labels = torch.tensor(LABELS == "odd").long()
    np.testing.assert_array_equal(ConvexHeadClassifier().fit(torch.tensor(X), labels).classes_, [0, 1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    model = ConvexHeadClassifier().fit(torch.tensor(X).cuda(), LABELS)
    assert model.head_.u.device.type == "cuda"
    assert ConvexHeadClassifier(device="cuda").fit(X, LABELS).head_.u.device.type == "cuda"
    assert model.predict(X).shape == (N,)


# the door


def test_not_fitted():
    with pytest.raises(NotFittedError):
        ConvexHeadClassifier().predict(X)


def test_not_converged_is_a_warning_and_still_certified():
    with pytest.warns(ConvergenceWarning, match="The iteration limit was reached first"):
        model = ConvexHeadClassifier(max_iterations=5, tol=1e-9, beta=0.01).fit(X, LABELS)
    assert model.certificate_.relative_gap > 1e-9
    assert model.status_ is cvxlib.Status.ITERATION_LIMIT


WRONG = {
    "mixer: expected one of .*'SelfAttention'.*; got 'Attention'": {"mixer": "Attention"},
    "mixer: expected a Mixer, a class of mixers or the name of one; got float 3.0": {"mixer": 3.0},
    "mixer: expected an instance of BlockFNO, since the data do not tell its blocks": {"mixer": "BlockFNO"},
    "mixer: expected an instance of Convolution, since .* its kernel": {"mixer": cvxlib.Convolution},
    "mixer: expected a mixer with 2 outputs, as y has": {"mixer": cvxlib.MLP(features=2, outputs=3)},
    r"tokens: expected shape \(n, s, d\) with d = 5": {"mixer": cvxlib.MLP(features=5, outputs=2)},
    "activation: expected 'Linear', 'GatedReLU', 'ReLU' or an Activation; got str 'gelu'": {"activation": "gelu"},
    "activation: expected directions of shape": {
        "activation": cvxlib.GatedReLU.sample(cvxlib.MLP(features=7, outputs=2), count=2)
    },
    "beta: expected a finite number, greater than 0; got float 0.0": {"beta": 0.0},
    "tol: expected a finite number": {"tol": -1.0},
    "count: expected a whole number": {"activation": "GatedReLU", "gates": 0},
    "solver: expected one of": {"solver": "magic"},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_wrong_parameters_are_named_at_fit(sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        ConvexHeadClassifier(**WRONG[sentence]).fit(X, LABELS)


@pytest.mark.parametrize(
    "tokens, y, sentence",
    [
        (X[None], LABELS, r"X: expected tokens of shape \(n, s, d\), or \(n, d\) with one token a sample; got 4 axes"),
        (X[:3], LABELS, "inconsistent numbers of samples"),
        (np.where(X > 2, np.nan, X), LABELS, "contains NaN"),
        (X, np.full(N, "one"), "y: expected labels of at least 2 classes; got 1 class"),
        (X, np.linspace(0, 1, N), "Unknown label type"),
        (X, None, "requires y to be passed|y cannot be None"),
    ],
    ids=["axes", "samples", "nan", "one class", "continuous", "no y"],
)
def test_wrong_data_are_refused(tokens, y, sentence):
    with pytest.raises(ValueError, match=sentence):
        ConvexHeadClassifier().fit(tokens, y)


def test_the_number_of_features_is_remembered():
    model = ConvexHeadClassifier().fit(X, LABELS)
    with pytest.raises(ValueError, match="X has 1 features, but ConvexHeadClassifier is expecting 2 features as input"):
        model.predict(X[:, :, :1])


def test_scikit_learn_is_loaded_on_first_use_only():
    code = (
        "import sys, cvxlib; assert 'sklearn' not in sys.modules; assert 'ConvexHeadClassifier' in dir(cvxlib);"
        "from cvxlib import *; assert 'sklearn' not in sys.modules;"
        "cvxlib.ConvexHeadRegressor; assert 'sklearn' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_scikit_learn_one_sentence_says_what_to_install():
    code = "import sys; sys.modules['sklearn'] = None; sys.modules['sklearn.base'] = None; import cvxlib; cvxlib.ConvexHeadClassifier"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert 'the estimators need scikit-learn: pip install "cvxlib[estimators]"' in run.stderr.splitlines()[-1]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'cvxlib' has no attribute 'ConvexTree'"):
        getattr(cvxlib, "ConvexTree")  # noqa: B009
