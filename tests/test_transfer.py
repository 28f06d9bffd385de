"""The transfer experiment: protocol, choice of the rate, rows that survive an interrupt, and what is certified about them."""

import dataclasses
import json

import pytest
import torch

import cvxlib
from cvxlib.solvers.training import Training
from cvxlib.vision import protocol as protocol_module
from cvxlib.vision.digits import TokenSplit
from cvxlib.vision.measures import logits_of, rank_of, top_k_accuracy
from cvxlib.vision.protocol import Protocol, choose_rate
from cvxlib.vision.ridge import ridge
from cvxlib.vision.summary import gap, spread, summarise
from cvxlib.vision.transfer import (
    CONVEX,
    HEADS,
    Experiment,
    Rows,
    interleave,
    run,
)

pytest.importorskip("torchmetrics")

SHORT = Protocol(epochs=3, learning_rates=(5e-2, 1e-3), warmup_epochs=1, batch=10, attention_batch=10)


def tokens(n=40, seed=0):
    """Six classes that the second moments of four tokens tell apart, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 6
    prototypes = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    noise = torch.randn(n, 4, 4, generator=generator, dtype=torch.float64)
    return (prototypes[labels] + 0.5 * noise) / 4, labels


@pytest.fixture
def data():
    return TokenSplit(*tokens(40, 0), *tokens(30, 1), 6)


@pytest.fixture
def experiment(data):
    return Experiment(data, SHORT, neurons=4, gates=2, blocks=2, tol=1e-2)


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# the protocol


def test_the_protocol_has_the_numbers_of_the_paper():
    assert dataclasses.asdict(Protocol()) == {
        "epochs": 70,
        "beta": 2e-2,
        "learning_rates": (5e-3, 1e-4),
        "warmup_epochs": 3,
        "warmup_rate": 2e-7,
        "final_fraction": 2e-2,
        "batch": 100,
        "attention_batch": 20,
    }
    assert Protocol().weight_decay(50_000) == pytest.approx(4e-7)  # the paper adds up the loss, a program averages it


def test_the_protocol_reaches_the_training(monkeypatch, experiment):
    program, network = (
        experiment.program("self-attention", "linear", 1e-3),
        experiment.network("self-attention", "linear", 0),
    )
    seen = {}
    monkeypatch.setattr(protocol_module, "train", lambda program, **options: seen.update(options))
    Protocol().fit(program, network, 1e-4, seed=3)
    assert seen.pop("head") is network
    assert seen == {
        "epochs": 70,
        "batch": 20,
        "learning_rate": 1e-4,
        "warmup_epochs": 3,
        "warmup_rate": 2e-7,
        "final_fraction": 2e-2,
        "seed": 3,
        "progress": None,
    }
    Protocol().fit(experiment.program("FNO", "linear", 1e-3), network, 5e-3, epochs=7)
    assert (seen["batch"], seen["epochs"], seen["learning_rate"]) == (100, 7, 5e-3)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"epochs": 0}, ValueError, "epochs"),
        ({"beta": -1.0}, ValueError, "beta"),
        ({"batch": 2.5}, TypeError, "batch"),
        ({"learning_rates": ()}, ValueError, "learning_rates"),
        ({"learning_rates": 1e-3}, TypeError, "learning_rates"),
        ({"learning_rates": (1e-3, 0.0)}, ValueError, "learning_rates"),
    ],
)
def test_a_protocol_says_what_is_wrong(options, error, name):
    with pytest.raises(error, match=f"^{name}: expected"):
        Protocol(**options)


def test_the_rate_with_the_best_training_accuracy_is_chosen():
    assert choose_rate({5e-3: 0.7, 1e-4: 0.9}) == 1e-4
    assert choose_rate({5e-3: 0.9, 1e-4: 0.9}) == 5e-3
    with pytest.raises(ValueError, match="at least one learning rate"):
        choose_rate({})


class Pretence(Experiment):
    """Trainings whose better test accuracy comes with the worse training accuracy."""

    def train(self, head, activation, beta, *, rate, epochs, seed):
        row = {"head": head, "activation": activation, "beta": beta, "method": "AdamW"}
        row |= {"rate": rate, "epochs": epochs, "seed": seed, "objective": 1.0 + rate}
        row |= {"train_top1": 0.8 if rate == 5e-2 else 0.6, "top1": 0.3 if rate == 5e-2 else 0.9, "top5": 1.0}
        return row | {"rank": 1, "neurons": 1, "parameters": 1, "seconds": 0.0}


def test_test_accuracy_has_no_say_in_the_rate(tmp_path, data):
    experiment = Pretence(data, SHORT, neurons=4, gates=2)
    rows = run(experiment, Rows(tmp_path, experiment.setting), heads=["linear"], seeds=3, progress=False)
    trained = [(row["rate"], row["seed"]) for row in rows if row["method"] == "AdamW"]
    assert trained == [(5e-2, 0), (1e-3, 0), (5e-2, 1), (5e-2, 2)]
    (entry,) = summarise(rows, SHORT.epochs)
    assert (entry["AdamW"]["rate"], entry["AdamW"]["seeds"]) == (5e-2, 3)
    assert entry["AdamW"]["top1"] == {"mean": pytest.approx(0.3), "spread": pytest.approx(0)}


# rows


def test_a_run_goes_on_after_an_interrupt_and_ends_alike(tmp_path, experiment, monkeypatch):
    def whole(folder):
        rows = Rows(tmp_path / folder, experiment.setting)
        return run(experiment, rows, heads=["linear", "MLP"], betas=[1e-2], seeds=2, lengths=[2], progress=False)

    unbroken = whole("a")
    count = {"calls": 0}
    train = Experiment.train

    def counted(self, *args, **options):
        count["calls"] += 1
        if count["calls"] == 4:
            raise KeyboardInterrupt
        return train(self, *args, **options)

    monkeypatch.setattr(Experiment, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        whole("b")
    kept = len(list((tmp_path / "b").glob("*.json")))
    assert kept == 1 + 3  # the optimum of the linear head and three trainings
    resumed = whole("b")
    trainings = sum(row["method"] == "AdamW" for row in unbroken)
    assert count["calls"] == 4 + trainings - 3  # nothing that was finished is done again
    assert without_seconds(resumed) == without_seconds(unbroken)
    assert summarise(resumed, 3)[0]["AdamW"]["objective"] == summarise(unbroken, 3)[0]["AdamW"]["objective"]
    assert {(row["epochs"], row["seed"]) for row in resumed if row["method"] == "AdamW"} == {
        (3, 0),
        (3, 1),
        (2, 0),
        (2, 1),
    }


def test_an_interrupted_training_or_solve_leaves_no_row(tmp_path, experiment, monkeypatch):
    broken = Training(torch.nn.Identity(), torch.zeros(1), interrupted=True)
    monkeypatch.setattr(Protocol, "fit", lambda *args, **options: broken)
    rows = Rows(tmp_path, experiment.setting)
    with pytest.raises(KeyboardInterrupt):
        run(experiment, rows, heads=["linear"], betas=[1e-2], progress=False)
    assert {json.loads(path.read_text())["method"] for path in tmp_path.glob("*.json")} == {"optimum"}

    def interrupted(program, **options):
        return dataclasses.replace(cvxlib.solve(program, tol=0.5), status=cvxlib.Status.INTERRUPTED)

    monkeypatch.setattr("cvxlib.vision.transfer.solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        experiment.optimum("MLP", "linear", 1e-2)


def test_rows_of_other_settings_are_never_mixed_up(tmp_path, experiment, data):
    key = {"head": "MLP", "activation": "linear", "beta": 1e-2, "method": "optimum"}
    other = dataclasses.replace(data, tokens=data.tokens + 1e-9)
    changed = [dataclasses.replace(experiment, data=other), dataclasses.replace(experiment, gate_seed=1)]
    changed.append(dataclasses.replace(experiment, protocol=Protocol(epochs=4)))
    paths = {Rows(tmp_path, each.setting).path(key) for each in [experiment, *changed]}
    assert len(paths) == 4
    assert Rows(tmp_path, experiment.setting).path(key) == Rows(
        tmp_path, json.loads(json.dumps(experiment.setting))
    ).path(key)


# what is certified


def test_no_training_ends_below_the_certified_bound(tmp_path, experiment):
    rows = run(experiment, Rows(tmp_path, experiment.setting), betas=[1e-2], seeds=1, progress=False)
    optima = {(row["head"], row["activation"]): row for row in rows if row["method"] == "optimum"}
    assert set(optima) == {(head, kind) for head, kinds in HEADS.items() for kind in kinds if kind in CONVEX}
    for row in rows:
        optimum = optima.get((row["head"], row["activation"]))
        if optimum:
            assert row["objective"] >= optimum["dual"]
            assert 0 <= gap(row, optimum) <= 1
            assert optimum["gap"] <= experiment.tol
        else:
            assert row["activation"] in ("ReLU", "softmax")
    for head in HEADS:  # the first gate is open everywhere
        if head != "linear":
            assert optima[head, "gated ReLU"]["dual"] <= optima[head, "linear"]["objective"]
    assert len(summarise(rows, SHORT.epochs)) == sum(map(len, HEADS.values()))


def test_the_row_of_a_training_is_the_objective_of_the_program(experiment, monkeypatch):
    kept = []
    fit = Protocol.fit

    def keep(self, *args, **options):
        kept.append(fit(self, *args, **options))
        return kept[-1]

    monkeypatch.setattr(Protocol, "fit", keep)
    row = experiment.train("self-attention", "gated ReLU", 1e-2, rate=5e-2, epochs=3, seed=0)
    certificate = cvxlib.certify(experiment.program("self-attention", "gated ReLU", 1e-2), kept[0].head)
    assert row["objective"] == pytest.approx(certificate.primal, rel=1e-12)
    assert row["parameters"] == 4 * (16 + 24)


def test_ridge_is_the_optimum_of_the_linear_head(experiment, data):
    linear_model = pytest.importorskip("sklearn.linear_model")
    head, certificate = ridge(experiment.program("linear", "none", 1e-2))
    mean = data.tokens.mean(1).numpy()
    other = linear_model.LogisticRegression(C=1 / (40 * 1e-2), fit_intercept=False, tol=1e-10, max_iter=10_000)
    other.fit(mean, data.labels.numpy())
    assert torch.allclose(head.weight, torch.from_numpy(other.coef_.T), atol=1e-6)
    assert certificate.dual <= certificate.primal
    assert certificate.relative_gap < 1e-12
    # the bound of strong convexity holds far from the optimum too
    _, early = ridge(experiment.program("linear", "none", 1e-2), max_iterations=2)
    assert early.dual < certificate.dual
    assert early.relative_gap > 1e-6


# numbers


def test_top_k_accuracy_is_a_count():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 7, generator=generator), torch.randint(0, 7, (200,), generator=generator)
    for k in (1, 5):
        count = sum(int(label in row.topk(k).indices) for row, label in zip(logits, labels, strict=True))
        assert top_k_accuracy(logits, labels, 7, k) == pytest.approx(count / 200, abs=1e-6)
    assert top_k_accuracy(logits[:, :3], labels % 3, 3, 5) == 1.0


def test_rank_counts_merged_neurons(experiment):
    head = experiment.network("MLP", "gated ReLU", 0).double()  # two neurons for each of two gates
    z = torch.zeros(2, 4, 6, dtype=torch.float64)
    z.index_add_(0, head.gate, head.u.detach().flatten(1).unsqueeze(2) * head.v.detach().flatten(1).unsqueeze(1))
    assert rank_of(head) == int(torch.linalg.matrix_rank(z).sum()) == 4
    head.u.data[2:] = head.u.data[:2]  # the second neuron of each gate now looks where the first does
    assert rank_of(head) == 2
    relu = experiment.network("MLP", "ReLU", 0)
    relu.v.data[0] = 0
    assert rank_of(relu) == 3
    linear = experiment.network("linear", "none", 0)
    assert rank_of(linear) == 0
    linear.weight.data[:2, :2] = torch.eye(2)
    assert rank_of(linear) == 2


def test_interleaving_deals_features_out_to_blocks(data):
    dealt = interleave(data, 2)
    assert torch.equal(dealt.tokens, data.tokens[..., [0, 2, 1, 3]])
    assert torch.equal(dealt.test_tokens, data.test_tokens[..., [0, 2, 1, 3]])
    with pytest.raises(ValueError, match="divisor of the 4 features"):
        interleave(data, 3)


def test_logits_in_parts_are_those_of_the_network(experiment):
    many = tokens(450)[0].float()
    for head, activation in (("linear", "none"), ("self-attention", "softmax"), ("FNO", "ReLU")):
        network = experiment.network(head, activation, 0)
        assert torch.allclose(logits_of(network, many), network(many), atol=1e-6)


def test_spread_of_missing_and_single_values():
    assert spread([0.5]) == {"mean": 0.5, "spread": 0.0}
    assert spread([0.0, 1.0])["spread"] == pytest.approx(0.5**0.5)
    assert spread([0.5, None]) is None  # a training that diverged has no objective
    assert gap({"objective": None}, {"dual": 1.0}) is None
    assert gap({"objective": 2.0}, {"dual": 1.0}) == pytest.approx(0.5)


def test_diverged_trainings_are_rows_too(experiment):
    row = experiment.train("self-attention", "linear", 1e-2, rate=1e30, epochs=3, seed=0)
    assert row["objective"] is None
    assert 0 <= row["top1"] <= 1
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda e, r: dataclasses.replace(e, neurons=3), ValueError, "neurons: expected a multiple of gates x blocks"),
        (lambda e, r: e.program("CNN", "linear", 1e-2), ValueError, "head: expected one of linear, MLP"),
        (lambda e, r: e.activation("linear", "ReLU"), ValueError, "activation: expected one of none for linear"),
        (lambda e, r: e.optimum("MLP", "ReLU", 1e-2), ValueError, "activation: expected one of none, linear"),
        (lambda e, r: run(e, r, heads=["CNN"]), ValueError, "heads: expected some of linear, MLP"),
        (lambda e, r: run(e, r, heads="MLP"), TypeError, "heads: expected a list"),
        (lambda e, r: run(e, r, seeds=0), ValueError, "seeds: expected a whole number"),
    ],
)
def test_bad_input_is_named(tmp_path, experiment, call, error, text):
    with pytest.raises(error, match=text):
        call(experiment, Rows(tmp_path, experiment.setting))


# pictures


def test_pictures_show_every_training_and_optimum(tmp_path, experiment):
    pytest.importorskip("matplotlib").use("Agg")
    from cvxlib.workflow import figures

    rows = run(experiment, Rows(tmp_path, experiment.setting), heads=["MLP"], betas=[1e-2], seeds=2, progress=False)
    linear = [row for row in rows if row["activation"] == "linear"]
    ax = figures.accuracy_against_distance(linear)
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    (diamond,) = [line for line in ax.lines if line.get_marker() == "D"]
    assert sum(len(line.get_xdata()) for line in dots) == len(linear) - 1
    assert diamond.get_xdata()[0] <= min(min(line.get_xdata()) for line in dots)
    with pytest.raises(ValueError, match="one certified optimum for each head"):
        figures.accuracy_against_distance(rows)  # linear and gated
    table = summarise(rows, SHORT.epochs)
    ax = figures.transfer_accuracy(table)
    assert len(ax.get_yticklabels()) == 3
    assert sum(len(line.get_xdata()) for line in ax.lines if line.get_marker() == "D") == 2
