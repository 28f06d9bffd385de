"""The convex program: what it accepts, and what its values mean."""

import numpy as np
import pytest
import torch

import cvxlib
from cvxlib.operators.lifted import block_design
from cvxlib.operators.maps import DesignMap, MaskedMap

N, S, D, C = 6, 3, 4, 2
MIXER = cvxlib.SelfAttention(features=D, outputs=C)


def tokens(dtype=torch.float64):
    return torch.randn(N, S, D, generator=torch.Generator().manual_seed(0), dtype=dtype)


def make(**changes):
    arguments = {
        "mixer": MIXER,
        "activation": cvxlib.Linear(),
        "loss": cvxlib.CrossEntropy(),
        "tokens": tokens(),
        "targets": torch.arange(N) % C,
        "beta": 0.1,
        "pool": "mean",
    }
    return cvxlib.ConvexProgram(**(arguments | changes))


def with_nan():
    x = tokens()
    x[1, 2, 3] = torch.nan
    return x


BAD = [
    ({"tokens": tokens()[0]}, ValueError, "tokens", r"\(3, 4\)"),
    ({"tokens": tokens()[:, :, :3]}, ValueError, "tokens", "d = 4"),
    ({"tokens": tokens()[:0]}, ValueError, "tokens", "at least one entry"),
    ({"tokens": with_nan()}, ValueError, "tokens", "1 NaN or infinite"),
    ({"tokens": torch.ones(N, S, D, dtype=torch.int64)}, TypeError, "tokens", "int64"),
    ({"tokens": torch.ones(N, S, D, dtype=torch.float16)}, TypeError, "tokens", "float16"),
    ({"tokens": [[1.0]]}, TypeError, "tokens", "list"),
    ({"targets": torch.arange(N - 1) % C}, ValueError, "targets", r"\(5,\)"),
    ({"targets": torch.arange(N)}, ValueError, "targets", "0 to 5"),
    ({"targets": -torch.ones(N, dtype=torch.int64)}, ValueError, "targets", "-1 to -1"),
    ({"targets": torch.ones(N)}, TypeError, "targets", "float32"),
    ({"targets": torch.arange(N) % C, "pool": None}, ValueError, "targets", r"\(6, 3\)"),
    ({"loss": cvxlib.SquaredLoss(), "targets": torch.ones(N, C + 1)}, ValueError, "targets", r"\(6, 2\)"),
    ({"loss": cvxlib.SquaredLoss(), "targets": torch.arange(N)}, TypeError, "targets", "int64"),
    ({"loss": cvxlib.SquaredLoss(), "targets": torch.full((N, C), torch.inf)}, ValueError, "targets", "finite"),
    ({"loss": "squared"}, TypeError, "loss", "'squared'"),
    ({"beta": 0.0}, ValueError, "beta", "greater than 0"),
    ({"beta": -1}, ValueError, "beta", "-1"),
    ({"beta": float("nan")}, ValueError, "beta", "nan"),
    ({"beta": "small"}, TypeError, "beta", "'small'"),
    ({"pool": "max"}, ValueError, "pool", "'max'"),
    ({"mixer": "attention"}, TypeError, "mixer", "'attention'"),
    ({"mixer": cvxlib.MLPMixer(tokens=S + 1, features=D, outputs=C)}, ValueError, "tokens", "s = 4"),
    ({"activation": torch.relu}, TypeError, "activation", "relu"),
    ({"activation": cvxlib.GatedReLU(torch.randn(2, D, D + 1))}, ValueError, "activation", r"\(P, 4, 4\)"),
    ({"mixer": cvxlib.SelfAttention(D, 1)}, ValueError, "mixer", "at least 2 outputs"),
]


@pytest.mark.parametrize("changes, error, name, came", BAD, ids=lambda v: None)
def test_bad_input_names_the_argument_and_what_came(changes, error, name, came):
    with pytest.raises(error, match=f"{name}: expected .*{came}|{name}: .*{came}"):
        make(**changes)


@pytest.mark.parametrize("value, error", [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)])
def test_mixers_reject_sizes_that_are_not_counts(value, error):
    with pytest.raises(error, match="features: expected a whole number"):
        cvxlib.SelfAttention(features=value, outputs=2)


def test_block_fno_needs_divisors():
    with pytest.raises(ValueError, match="blocks: expected a divisor of features = 3"):
        cvxlib.BlockFNO(tokens=2, features=3, outputs=4, blocks=2)
    with pytest.raises(ValueError, match="blocks: expected a divisor of outputs = 3"):
        cvxlib.BlockFNO(tokens=2, features=4, outputs=3, blocks=2)


@pytest.mark.parametrize(
    "directions", [np.ones((2, 3), dtype=int), [["a"]], torch.zeros(0, 3), torch.full((1, 3), torch.nan)]
)
def test_gates_reject_bad_directions(directions):
    with pytest.raises((TypeError, ValueError), match="directions: expected"):
        cvxlib.GatedReLU(directions)


def test_numpy_and_torch_give_the_same_program():
    by_numpy = make(tokens=tokens().numpy(), targets=(np.arange(N) % C))
    assert by_numpy.beta_max() == make().beta_max()


def test_documented_objective_is_the_computed_one():
    """The objective at a random Z, from the formula of linear self-attention."""
    program = make()
    z = torch.randn(program.operator.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, y = program.tokens, program.targets
    predictions = torch.einsum("nk,nle,kleo->no", x.mean(1), x.mT @ x, z.reshape(D, D, D, C))
    expected = torch.nn.functional.cross_entropy(predictions, y) + 0.1 * torch.linalg.matrix_norm(z[0], "nuc")
    assert program.objective(z) == pytest.approx(float(expected), rel=1e-12)


def test_per_token_loss_is_summed_over_tokens_and_averaged_over_samples():
    y = torch.randn(N, S, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    program = make(loss=cvxlib.SquaredLoss(), targets=y, pool=None)
    assert program.objective(program.operator.zeros()) == pytest.approx(float(y.square().sum()) / 2 / N, rel=1e-12)


def test_with_beta_shares_the_operator():
    program = make()
    operator = program.operator
    other = program.with_beta(0.7)
    assert other.operator is operator and other.beta == 0.7 and program.beta == 0.1


def test_at_beta_max_zero_is_certified_exactly():
    program = make()
    program = program.with_beta(program.beta_max() * (1 + 1e-9))
    certificate = program.certificate(program.operator.zeros())
    assert abs(certificate.relative_gap) < 1e-8
    below = program.with_beta(0.9 * program.beta)
    assert below.certificate(below.operator.zeros()).relative_gap > 1e-4


@pytest.mark.parametrize("mixer", [cvxlib.MLP(D, C), cvxlib.FNO(S, D, C)])
def test_gates_that_mask_rows_share_one_design_tensor(mixer, monkeypatch):
    monkeypatch.setattr("cvxlib.operators.maps.PRODUCTS", 50)  # in several parts
    gates = cvxlib.GatedReLU.sample(mixer, 3, seed=0)
    program = make(mixer=mixer, activation=gates, targets=torch.arange(N * S).reshape(N, S) % C, pool=None)
    operator, (mine,) = program.operator, program.operator.maps
    design = block_design(mixer, program.tokens, gates.masks(mixer, program.tokens)[:, operator.gate], False)
    full = DesignMap(design.flatten(0, 1), mixer.block_outputs)
    assert isinstance(mine, MaskedMap) and mine.shape == full.shape == operator.shape
    assert mine.masks.numel() + mine.design.numel() == operator.bytes // 8
    z, rho = torch.randn(operator.shape, dtype=torch.float64), torch.randn(N * S, C, dtype=torch.float64)
    torch.testing.assert_close(mine.forward(z), full.forward(z))
    torch.testing.assert_close(mine.adjoint(rho), full.adjoint(rho))
    torch.testing.assert_close(mine.gram(), full.gram())
    torch.testing.assert_close(mine.outer(), full.outer())


def test_gates_that_are_pooled_have_design_tensors_of_their_own():
    gates = cvxlib.GatedReLU.sample(cvxlib.MLP(D, C), 3, seed=0)
    assert isinstance(make(mixer=cvxlib.MLP(D, C), activation=gates).operator.maps[0], DesignMap)
