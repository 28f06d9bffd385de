"""Data-parallel programs: every process ends with what one process finds, and the loss of a process is an error, not a hang.

The file is its own script: ``torchrun`` runs it with the name of a check and a folder for what the processes found.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from family import normal

import cvxlib
from cvxlib.parallel import Processes, ShardedProgram, shard
from cvxlib.solvers.training import train

TOL = 5e-7
#: (activation, pool, solver, dtype); the losses take turns
CASES = [
    ("linear", "mean", "splitting", torch.float64),
    ("gated", None, "splitting", torch.float64),
    ("linear", "mean", "staircase", torch.float64),
    ("gated", "mean", "staircase", torch.float64),
    ("linear", None, "staircase", torch.float64),
    ("gated", None, "staircase", torch.float64),
    ("linear", "mean", "proximal", torch.float64),
    ("linear", "mean", "staircase", torch.float32),
]
ALL, FEW = list(range(len(CASES))), [1, 2]
#: samples of each process, by the number of processes
SHARES = {2: [47, 14], 4: [30, 1, 19, 11]}


def build(activation, pool, dtype=torch.float64, device="cpu", samples=61, fraction=0.1):
    """A whole program; two of its four gates are one and the same on all samples, and more agree on a few samples."""
    mixer = cvxlib.SelfAttention(features=3, outputs=2)
    gates = cvxlib.Linear()
    if activation == "gated":
        directions = cvxlib.GatedReLU.sample(mixer, 3).directions
        gates = cvxlib.GatedReLU(torch.cat([directions, 2 * directions[:1]]))
    loss = cvxlib.CrossEntropy() if pool else cvxlib.SquaredLoss()
    tokens = normal(samples, 4, 3, seed=1).to(device, dtype)
    if pool:
        targets = (tokens.sum((1, 2)) + normal(samples, seed=2).to(tokens) > 0).long()
    else:
        targets = normal(samples, 4, 2, seed=2).to(tokens) + tokens.cumsum(1)[..., :2]
    program = cvxlib.ConvexProgram(mixer, gates, loss, tokens, targets, 1.0, pool)
    # in float64, or a sum that rounds otherwise in another process would make it another program
    return program.with_beta(fraction * program.double().beta_max())


def share(program, processes):
    """This process's part of a program, in unequal shares."""
    rows = slice(*np.cumsum([0, *SHARES[processes.size]])[processes.rank :][:2])
    return ShardedProgram(
        program.mixer,
        program.activation,
        program.loss,
        program.tokens[rows],
        program.targets[rows],
        program.beta,
        program.pool,
        processes,
    )


def numbers(certificate):
    return [certificate.primal, certificate.dual]


# what the processes do: each check returns what the test is to see


def sums(processes, folder):
    """Sums of tensors of every kind that programs need, and rank 0's tensors."""
    rank, results = processes.rank, {}
    generator = torch.Generator().manual_seed(rank)
    for size in (1, 3, 1000, 100_003):
        for dtype in (torch.float32, torch.float64):
            mine = torch.randn(size, generator=generator, dtype=dtype)
            before = mine.clone()
            total = processes(mine)
            assert torch.equal(mine, before) and total.dtype == dtype
            results[f"{size} {dtype}"] = mine, total
    large = torch.full((2, 2), 2**62, dtype=torch.int64)
    results["int64"] = large, processes(large)
    scalar, strided = torch.tensor(1.5 + rank), normal(4, 6, seed=rank).mT
    results["scalar"], results["strided"] = (scalar, processes(scalar)), (strided, processes(strided))
    rows = normal(rank + 1, 2, seed=rank)
    results["gather"] = rows, processes.gather(rows)
    own = processes.holding(rank + 1).own(torch.arange(3 * sum(range(1, processes.size + 1))))
    agreed = processes.agree(torch.full((rank + 1, 2), float(rank)), torch.tensor([rank]))
    whole = np.lib.format.open_memmap(Path(folder, f"whole{rank}.npy"), "w+", np.float64, (11, 2))
    whole[:] = np.arange(22).reshape(11, 2)
    return results | {"own": own, "agreed": agreed, "part": torch.from_numpy(processes.part(whole))}


def solutions(processes, folder, cases):
    """Solutions of every case, and audits of them and of a head that each process has trained a little differently."""
    results = []
    for case in cases:
        activation, pool, solver, dtype = CASES[case]
        program = share(build(activation, pool, dtype, processes.device), processes)
        tol = TOL if dtype == torch.float64 else 1e-3
        solution = cvxlib.solve(program, tol=tol if solver != "proximal" else 1e-4, solver=solver)
        point = solution.certificate.dual_point
        other = cvxlib.Head.random(
            program.mixer, program.activation, 2, pool=pool, seed=processes.rank, dtype=torch.float64
        )
        results.append(
            {
                "samples": program.samples,
                "beta_max": program.beta_max(),
                "gates": program.operator.gate.cpu(),
                "certificate": numbers(solution.certificate),
                "status": solution.status.name,
                "weights": [x.cpu() for x in (solution.factors.u, solution.factors.v, solution.factors.block)],
                "point": point.cpu(),
                "audit": numbers(cvxlib.certify(program, solution.head(), point)),
                "independent": numbers(cvxlib.certify(program, solution.head(), independent=True)),
                "other": numbers(cvxlib.certify(program, other)),
            }
        )
    return results


def complaints(processes, folder):
    """What processes are told that disagree or bring something that is wrong."""
    first, program = processes.rank == 0, build("gated", "mean", samples=6)
    fits = {
        "mixer": program.mixer,
        "activation": program.activation,
        "loss": program.loss,
        "tokens": program.tokens,
        "targets": program.targets,
        "beta": 0.1,
        "pool": "mean",
    }
    double = torch.cat([program.tokens, program.tokens], 2)
    wrong = {
        "beta": {"beta": 0.1 if first else 0.2},
        "activation": {"activation": cvxlib.GatedReLU.sample(program.mixer, 4, seed=processes.rank)},
        "mixer": {}
        if first
        else {"mixer": cvxlib.SelfAttention(features=6, outputs=2), "activation": cvxlib.Linear(), "tokens": double},
        "tokens": {} if first else {"tokens": program.tokens.float()},
        "not finite": {} if first else {"tokens": program.tokens / 0},
        "relu": {"activation": cvxlib.ReLU()},
        "pool": {"pool": "mean" if first else "max"},
    }
    told = {}
    for name, changes in wrong.items():
        with pytest.raises(ValueError) as error:
            ShardedProgram(**fits | changes, processes=processes)
        told[name] = str(error.value)
    with pytest.raises(ValueError) as error:
        shard(build("linear", "mean", samples=6 + processes.rank), processes)
    told["shard"] = str(error.value)
    with pytest.raises(ValueError) as error:
        processes.part(torch.zeros(1, 2))
    told["part"] = str(error.value)
    sharded = shard(build("linear", "mean", samples=7), processes)
    told["shares"] = [len(sharded.tokens), sharded.samples, repr(sharded)]
    solution = cvxlib.solve(shard(build("gated", "mean", samples=7, fraction=0.7), processes), tol=1e-6)
    told["zero"] = cvxlib.screen(solution.program, solution.certificate)
    for name, refused in {
        "save": lambda: cvxlib.save(Path(folder, "solution"), solution),
        "path": lambda: cvxlib.path(solution.program),
        "train": lambda: train(solution.program, heads=1),
    }.items():
        with pytest.raises(ValueError) as error:
            refused()
        told[name] = str(error.value)
    told["automatic"] = cvxlib.solve(sharded, tol=1e-3).status.name
    return told


def interrupted(processes, folder):
    """Ctrl-C on one of the processes, in the middle of a solve."""
    results, original = [], cvxlib.BlockNuclearNorm.prox
    for solver in ("splitting", "proximal", "staircase"):
        calls = iter(range(10**6))

        def prox(self, z, threshold, calls=calls):
            if next(calls) == 25 and processes.rank == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, z, threshold)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cvxlib.BlockNuclearNorm, "prox", prox)
            solution = cvxlib.solve(share(build("linear", "mean"), processes), tol=1e-12, solver=solver)
        results.append((solution.status.name, numbers(solution.certificate)))
    return results


def resumable(processes, folder, victim=None, sign="SIGKILL"):
    """A solve with a checkpoint, in the middle of which one of the processes may be lost."""
    from cvxlib.solvers import staircase

    file = Path(folder, "state.safetensors")
    descend = staircase.Staircase.descend

    def lose(self, run):
        if victim == processes.rank and file.exists() and not resumed:
            os.kill(os.getpid(), signal.Signals[sign])
        return descend(self, run)

    staircase.Staircase.descend = lose
    resumed, whole = file.exists(), build("linear", "mean", fraction=0.005)
    try:
        solution = cvxlib.solve(share(whole, processes), tol=TOL, solver="staircase", checkpoint=file)
    except RuntimeError as error:
        return {"resumed": resumed, "error": str(error)}
    return {"resumed": resumed, "certificate": numbers(solution.certificate), "history": solution.history}


CHECKS = {check.__name__: check for check in (sums, solutions, complaints, interrupted, resumable)}


def script(folder, timeout, checks):
    torch.set_num_threads(1)
    processes = Processes(timeout=float(timeout))
    for check, *rest in json.loads(checks):
        torch.save(CHECKS[check](processes, folder, *rest), Path(folder, f"{check}-{processes.rank}.pt"))


# the tests


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def launch(count, folder, *checks, timeout=60.0, restarts=0):
    """What every process found, by check."""
    options = ["--standalone", "--nproc-per-node", str(count), "--max-restarts", str(restarts)]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *options,
            __file__,
            str(folder),
            str(timeout),
            json.dumps(checks),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return {name: [found(folder, name, rank) for rank in range(count)] for name, *_ in checks}


def found(folder, check, rank):
    return torch.load(Path(folder, f"{check}-{rank}.pt"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found: starting them takes most of the time, so they do it once."""
    return launch(2, tmp_path_factory.mktemp("two"), ["sums"], ["complaints"], ["interrupted"], ["solutions", ALL])


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What four processes found."""
    return launch(4, tmp_path_factory.mktemp("four"), ["sums"], ["solutions", FEW])


@pytest.fixture(params=["two", "four"])
def several(request):
    """What two processes found, and what four did."""
    return request.getfixturevalue(request.param)


def close(one, other, tol=1e-10):
    return one == pytest.approx(other, rel=tol, abs=0)


def test_sums_are_the_same_everywhere_and_leave_their_argument_alone(several):
    every = several["sums"]
    count = len(every)
    for name in [name for name, value in every[0].items() if name not in ("own", "agreed", "part")]:
        parts, totals = zip(*(here[name] for here in every), strict=True)
        assert all(torch.equal(total, totals[0]) for total in totals), name
        expected = torch.cat(parts) if name == "gather" else torch.stack(parts).sum(0)
        torch.testing.assert_close(totals[0], expected)
    assert torch.equal(torch.cat([here["own"] for here in every]), torch.arange(3 * sum(range(1, count + 1))))
    assert torch.equal(torch.cat([here["part"] for here in every]), torch.arange(22.0).reshape(11, 2).double())
    for here in every:
        assert torch.equal(here["agreed"][0], torch.zeros(1, 2)) and here["agreed"][1].tolist() == [0]


def check_solutions(every, cases, device="cpu"):
    for case, results in zip(cases, zip(*every, strict=True), strict=True):
        activation, pool, solver, dtype = CASES[case]
        whole = build(activation, pool, dtype, device)
        first = results[0]
        for here in results:
            assert here["status"] == "CERTIFIED" and here["samples"] == whole.samples
            for name in ("certificate", "audit", "independent", "other", "beta_max"):
                assert here[name] == first[name], name
            assert all(torch.equal(a, b) for a, b in zip(here["weights"], first["weights"], strict=True))
            assert torch.equal(here["gates"], whole.operator.gate.cpu())
        single = torch.finfo(dtype).eps * 100
        assert close(first["beta_max"], whole.beta_max(), max(single, 1e-10))

        # one process finds the same numbers for the same head and dual point
        u, v, block = (x.to(device) for x in first["weights"])
        head = whole.head(cvxlib.Factors(u, v, block))
        point = torch.cat([here["point"] for here in results]).to(device)
        assert close(first["audit"], numbers(cvxlib.certify(whole, head, point)))
        assert close(first["independent"], numbers(cvxlib.certify(whole, head, independent=True)))
        other = cvxlib.Head.random(whole.mixer, whole.activation, 2, pool=pool, seed=0, dtype=torch.float64)
        assert close(first["other"], numbers(cvxlib.certify(whole, other)))
        assert close(first["audit"], first["certificate"], TOL)

        # and the same optimum
        if solver != "proximal" and dtype == torch.float64:
            alone = cvxlib.solve(whole, tol=TOL, solver=solver).certificate
            assert close(first["certificate"], numbers(alone), 1e-6)
            assert first["certificate"][1] <= alone.primal and alone.dual <= first["certificate"][0]


def test_every_process_ends_with_the_solution_of_one(several):
    every = several["solutions"]
    check_solutions(every, ALL if len(every) == 2 else FEW)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl_agrees_with_one_gpu(tmp_path):
    check_solutions(launch(2, tmp_path, ["solutions", FEW])["solutions"], FEW, "cuda")


def test_disagreement_is_an_error_on_every_process(two):
    one, other = two["complaints"]
    assert (
        one["beta"] == other["beta"] == "beta: expected the same on every process; got 0.1 on rank 0 and 0.2 on rank 1"
    )
    for name in ("activation", "mixer", "tokens"):
        assert one[name] == other[name] and one[name].startswith(f"{name}: expected the same on every process; got")
    assert one["not finite"] == "rank 1 of 2: " + other["not finite"] and other["not finite"].startswith(
        "tokens: expected finite"
    )
    assert one["pool"] == "rank 1 of 2: " + other["pool"] and other["pool"].startswith("pool: expected")
    assert one["relu"].startswith("activation: expected fixed gates") and one["relu"] == other["relu"]
    assert (
        one["shard"]
        == other["shard"]
        == "tokens: expected the same on every process; got 6 samples on rank 0 and 7 samples on rank 1"
    )
    assert one["part"].startswith("whole: expected at least one sample for each of 2 processes")
    assert [one["shares"][:2], other["shares"][:2]] == [[3, 7], [4, 7]]
    assert one["shares"][2].startswith("ShardedProgram(") and "rank 0 of 2, 7 samples in all" in one["shares"][2]
    for name in ("save", "path", "train"):
        assert "expected a program with all its samples in this process; got one that 2 processes share" in one[name]
    whole = cvxlib.solve(build("gated", "mean", samples=7, fraction=0.7), tol=1e-6)
    zero = cvxlib.screen(whole.program, whole.certificate)
    assert torch.equal(one["zero"], zero) and torch.equal(other["zero"], zero) and zero.any() and not zero.all()
    assert one["automatic"] == other["automatic"] == "CERTIFIED"


def test_an_interrupt_of_one_process_stops_all_at_the_same_place(two):
    one, other = two["interrupted"]
    assert one == other
    optimum = cvxlib.solve(build("linear", "mean"), tol=1e-7).certificate
    for status, (primal, dual) in one:
        assert status == "INTERRUPTED"
        assert dual <= optimum.primal and optimum.dual <= primal


def start(folder, timeout, check):
    """Two processes without torchrun, which would end the others itself when one is lost."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, str(folder), str(timeout), json.dumps([check])]
    common = environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [subprocess.Popen(command, env=common | {"RANK": str(rank)}) for rank in range(2)]


def lose(folder, timeout, sign):
    """What rank 0 found when rank 1 was lost in the middle of a solve."""
    runs = start(folder, timeout, ["resumable", 1, sign])
    try:
        assert runs[0].wait(timeout=120) == 0
    finally:
        for run in runs:
            run.kill()
            run.wait()
    survivor = found(folder, "resumable", 0)
    assert not survivor["resumed"]
    assert survivor["error"].startswith("rank 0 of 2: the processes cannot go on together, no word from rank 1")
    assert "checkpoint" in survivor["error"]
    assert [file.name for file in folder.glob("state*")] == ["state.safetensors"]  # whole, and no other


def test_a_killed_process_is_an_error_on_the_others(tmp_path):
    lose(tmp_path, 60.0, "SIGKILL")


def test_a_solve_goes_on_from_its_checkpoint_when_torchrun_starts_the_processes_again(tmp_path):
    one, other = launch(2, tmp_path, ["resumable", 1, "SIGKILL"], restarts=1)["resumable"]
    assert one["resumed"] and other["resumed"] and one["certificate"] == other["certificate"]
    assert torch.equal(one["history"], other["history"])
    alone = cvxlib.solve(build("linear", "mean", fraction=0.005), tol=TOL, solver="staircase")
    assert close(one["certificate"], numbers(alone.certificate), 1e-6)


def test_a_process_that_hangs_is_an_error_on_the_others_within_the_timeout(tmp_path):
    lose(tmp_path, 3.0, "SIGSTOP")


def test_processes_need_a_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="expected to be started by torchrun"):
        Processes()
    with pytest.raises(ValueError, match="timeout: expected"):
        Processes(timeout=0)


if __name__ == "__main__":
    script(*sys.argv[1:])
