r"""The battery that every mixer must pass: :func:`check_mixer`.

A mixer of your own needs two linear maps; the dual, the certificate, the solver and the recovered network are then right only if
the maps are what they claim to be. Each check below holds one claim to the light, and a failure is one sentence.
"""

from __future__ import annotations

import copy
import functools
import itertools
import numbers
import pickle
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from cvxlib.audit.certificates import certify, lifted_gradient
from cvxlib.ground.checks import instance
from cvxlib.model.activations import Activation, GatedReLU, Linear
from cvxlib.model.heads import Head
from cvxlib.model.losses import CrossEntropy, SquaredLoss
from cvxlib.model.mixers import Mixer
from cvxlib.program.certificate import Status
from cvxlib.program.program import ConvexProgram
from cvxlib.program.recovery import factor
from cvxlib.solvers import solve

#: relative error allowed between two float64 computations of the same thing
ROUNDING = 1e-10
#: certified relative gap of the battery's solves
TOL = 1e-6
GATES = 3

T = TypeVar("T")


#: ways to copy a mixer, as checkpoints of a training, worker processes and caches do
COPIES: dict[str, Callable[[Mixer], Mixer]] = {
    "a deep copy": copy.deepcopy,
    "a pickle": lambda mixer: pickle.loads(pickle.dumps(mixer)),
}


class MixerError(AssertionError):
    """A mixer is not what it claims to be; the message says in what."""


def check_mixer(mixer: Mixer, tokens: Tensor) -> None:
    r"""Run the whole battery on a mixer, yours or the package's own.

    .. math:: f(X) = \sum_j \sigma(L_X u_j) R_X V_j = \sum_k A_k(Z_k), \qquad Z_k = \sum_{j \in k} u_j \operatorname{vec}(V_j)^\top

    Checked are: the declared sizes; that ``hidden`` and ``values`` have the shapes, dtype and device they should, repeat themselves,
    and treat every sample and every head by itself; that deep copies and pickles, of the mixer and of programs, equal it and do what it does;
    that ``hidden`` is linear in u; that the lifted operator equals the network, its adjoint is its adjoint, and autograd gives the same
    adjoint; that a head without neurons breaks nothing; that beta_max is critical; that a small solve is certified, that the
    recovered network has the program's objective, and that certificates are sound, with both losses, pooled and per token.

    Args:
        mixer: the mixer.
        tokens: (n, s, d) a few samples of the kind it is for. Keep them small: programs with lifted blocks p x q are solved.

    Raises:
        MixerError: an ``AssertionError`` whose message says in one sentence what is wrong with the mixer.
        TypeError: ``mixer`` is not a :class:`cvxlib.Mixer`.

    Source: the protocol of :class:`cvxlib.Mixer`; book, chapter "Your own mixer".
    """
    instance("mixer", mixer, Mixer, "a Mixer")
    tokens = _attempt("check(tokens)", lambda: mixer.check(tokens)).double()
    for check in CHECKS:
        check(mixer, tokens)


# the declared sizes, and the form of the two maps


def check_sizes(mixer: Mixer, tokens: Tensor) -> None:
    """shape, width, outputs and blocks are whole numbers that fit together; split gives B token sets."""
    shape = _attempt("shape", lambda: mixer.shape)
    _expect(
        isinstance(shape, tuple) and len(shape) > 0 and all(_whole(size) for size in shape),
        f"shape must be a tuple of whole numbers of at least 1, the shape of one u, but is {shape!r}",
    )
    for name in ("width", "outputs", "blocks"):
        size = _attempt(name, functools.partial(getattr, mixer, name))
        _expect(_whole(size), f"{name} must be a whole number of at least 1, but is {size!r}")
    _expect(mixer.outputs % mixer.blocks == 0, f"blocks = {mixer.blocks} must divide outputs = {mixer.outputs}")
    parts = _attempt("split(tokens)", lambda: mixer.split(tokens))
    _expect(
        len(parts) == mixer.blocks,
        f"split(tokens) must give blocks = {mixer.blocks} token sets, but gives {len(parts)}",
    )
    _expect(
        all(part.ndim == 3 and len(part) == len(tokens) for part in parts),
        f"split(tokens) must give token sets (n, s, d) with all n = {len(tokens)} samples, "
        f"but gives shapes {', '.join(str(tuple(part.shape)) for part in parts)}",
    )


def check_form(mixer: Mixer, tokens: Tensor) -> None:
    """hidden is (n, m, a, h) and values (n, h, w), on the device and in the dtype of the tokens, also without any head."""
    for dtype in (torch.float64, torch.float32):
        for b, seen in enumerate(mixer.split(tokens.to(dtype))):
            for heads in (3, 1, 0):
                hidden = _hidden(mixer, seen, _draw(mixer, heads, seed=b).to(seen))
                where = f"for tokens {tuple(seen.shape)} and u {(heads, *mixer.shape)}"
                _expect(
                    isinstance(hidden, Tensor) and hidden.ndim == 4 and hidden.shape[:2] == (len(seen), heads),
                    f"hidden must be (n, m, a, h) with n = {len(seen)}, m = {heads} {where}, but is {_form(hidden)}",
                )
                _alike("hidden", hidden, seen)
            values = _values(mixer, seen)
            expected = (len(seen), hidden.shape[3], mixer.width)
            _expect(
                isinstance(values, Tensor) and tuple(values.shape) == expected,
                f"values must be (n, h, w) = {expected} by the last axis of hidden and by width, but is {_form(values)}",
            )
            _alike("values", values, seen)


def check_purity(mixer: Mixer, tokens: Tensor) -> None:
    """Equal arguments give equal results, tokens are left as they were, and each sample and each head is treated by itself."""
    for seen in mixer.split(tokens):
        u = _draw(mixer, 3, seed=1).to(seen)
        before = seen.clone()
        hidden, values = _hidden(mixer, seen, u), _values(mixer, seen)
        again, values_again = _hidden(mixer, seen, u), _values(mixer, seen)
        _expect(
            torch.equal(seen, before), "hidden and values must leave the tokens as they are, but change them in place"
        )
        _expect(_close(hidden, again), "hidden must repeat itself, but gives two results for the same arguments")
        _expect(_close(values, values_again), "values must repeat itself, but gives two results for the same tokens")
        for i in range(len(seen)):
            alone = seen[i : i + 1]
            _expect(
                _close(_hidden(mixer, alone, u), hidden[i : i + 1]),
                "hidden must treat each sample by itself, but gives a sample another result among others than alone",
            )
            _expect(
                _close(_values(mixer, alone), values[i : i + 1]),
                "values must treat each sample by itself, but gives a sample another result among others than alone",
            )
        for j in range(len(u)):
            _expect(
                _close(_hidden(mixer, seen, u[j : j + 1]), hidden[:, j : j + 1]),
                "hidden must treat each head u_j by itself, but gives a head another result among others than alone",
            )


def check_copies(mixer: Mixer, tokens: Tensor) -> None:
    """Deep copies and pickles of a mixer that has been used equal it, and do what it does; to use it does not change it."""
    before = _attempt("hash", lambda: hash(mixer))
    for seen in mixer.split(tokens):
        _values(mixer, seen), _hidden(mixer, seen, _draw(mixer, 2, seed=9).to(seen))
    _expect(hash(mixer) == before, "its fields must stay as they are when it is used: keep caches in cached properties")
    for way, make in COPIES.items():
        again = _attempt(f"{way} of it", lambda make=make: make(mixer))
        _expect(
            _attempt("==", lambda again=again: bool(again == mixer)) and hash(again) == before,
            f"{way} of it must equal it and hash like it, or trained heads cannot be matched with programs: "
            "make the class a frozen dataclass",
        )
        for seen, theirs in zip(mixer.split(tokens), again.split(tokens), strict=True):
            u = _draw(mixer, 2, seed=9).to(seen)
            alike = _close(_hidden(again, theirs, u), _hidden(mixer, seen, u))
            alike &= _close(_values(again, theirs), _values(mixer, seen))
            _expect(alike, f"{way} of it must do what it does, but gives other hidden or values")


def check_linearity(mixer: Mixer, tokens: Tensor) -> None:
    """hidden(tokens, a u + b w) = a hidden(tokens, u) + b hidden(tokens, w)."""
    for seen in mixer.split(tokens):
        u, w = _draw(mixer, 3, seed=2).to(seen), _draw(mixer, 3, seed=3).to(seen)
        zero = _hidden(mixer, seen, torch.zeros_like(u))
        _expect(float(zero.abs().max()) == 0.0, "hidden must be linear in u, but is not 0 at u = 0")
        combined = _hidden(mixer, seen, -1.5 * u + 0.7 * w)
        _expect(
            _close(combined, -1.5 * _hidden(mixer, seen, u) + 0.7 * _hidden(mixer, seen, w)),
            "hidden must be linear in u, but hidden(a u + b w) differs from a hidden(u) + b hidden(w)",
        )
        u.requires_grad_()
        _expect(
            _hidden(mixer, seen, u).requires_grad,
            "hidden must be differentiable in u, but its result is cut off from u (detach, NumPy or no_grad inside it)",
        )


# the lifted operator


def check_lifting(mixer: Mixer, tokens: Tensor) -> None:
    """The lifted operator at sum_j u_j vec(V_j)^T gives the network's own predictions."""
    for program in _programs(mixer, tokens, losses=1):
        factors = factor(mixer, _blocks(program, seed=4))
        with torch.no_grad():
            network = program.head(factors)(program.tokens).reshape(-1, mixer.outputs)
        lifted = program.operator.forward(program.lift(factors))
        _expect(
            _close(network, lifted),
            f"the lifted operator must give the network's predictions, but they differ ({_case(program)}): "
            "hidden and values do not act on heads as they act on the unit vectors",
        )


def check_adjoint(mixer: Mixer, tokens: Tensor) -> None:
    """<A(Z), R> = <Z, A*(R)>, and autograd through hidden gives the same adjoint."""
    for program in _programs(mixer, tokens, losses=1):
        operator = program.operator
        z = _blocks(program, seed=5)
        predictions = operator.forward(z)
        dual = _normal(predictions.shape, seed=6).to(z)
        adjoint = operator.adjoint(dual)
        left, right = float((predictions * dual).sum()), float((z * adjoint).sum())
        scale = float(predictions.norm() * dual.norm()) + float(z.norm() * adjoint.norm())
        _expect(
            abs(left - right) <= ROUNDING * scale,
            f"the lifted operator and its adjoint must satisfy <A(Z), R> = <Z, A*(R)>, "
            f"but give {left:.6g} and {right:.6g} ({_case(program)})",
        )
        for contracted in program.factored.every_way():
            _expect(
                _close(contracted.adjoint(dual), adjoint),
                f"{contracted.path} must give the adjoint of the lifted operator, but do not ({_case(program)}): "
                "pooled is not the mean of the gated hidden matrices times the values",
            )
        per_sample = dual.reshape(program.samples, -1, mixer.outputs)
        for b in range(mixer.blocks):
            columns = slice(b * mixer.block_outputs, (b + 1) * mixer.block_outputs)
            audit = lifted_gradient(program.frozen, per_sample[..., columns], b)
            mine = operator.block == b
            _expect(
                _close(audit[operator.gate[mine]], adjoint[mine]),
                f"autograd through hidden must give the adjoint of the lifted operator, but does not ({_case(program)}): "
                "part of hidden is cut off from u, or has a wrong derivative of its own",
            )


def check_nothing(mixer: Mixer, tokens: Tensor) -> None:
    """Nothing breaks on nothing: a head without neurons predicts 0, has gradients, is certified, and every contraction takes it."""
    u, v = (tokens.new_zeros(0, *shape) for shape in (mixer.shape, (mixer.width, mixer.block_outputs)))
    none = torch.zeros(0, dtype=torch.long, device=tokens.device)
    for program in _programs(mixer, tokens, losses=1):
        head = Head(mixer, program.activation, u, v, none, none, program.pool)
        predictions = _attempt(f"a head without neurons ({_case(program)})", functools.partial(head, tokens))
        _expect(
            predictions.numel() == len(program.rows) * mixer.outputs and not bool(predictions.detach().any()),
            f"a head without neurons must predict 0 everywhere, but gives {_form(predictions)} ({_case(program)})",
        )
        total = predictions.sum() + head.weight_decay()
        _attempt(f"the gradient of a head without neurons ({_case(program)})", total.backward)
        residual = program.loss.gradient(predictions.detach().reshape(-1, mixer.outputs), program.rows)
        for way in program.factored.every_way():
            where = f"{way.path} without neurons ({_case(program)})"
            zero = _attempt(where, functools.partial(way.predictions, u.flatten(1), v, none.cpu()))
            _expect(not bool(zero.any()), f"{where} must predict 0")
            arguments = (u.flatten(1), v, none.cpu(), residual)
            gradients = _attempt(f"the gradient of {where}", functools.partial(way.gradients, *arguments))
            _expect(all(part.numel() == 0 for part in gradients), f"the gradient of {where} must be empty")
        audit = _attempt("certify without neurons", functools.partial(certify, program, head))
        objective = program.objective(program.operator.zeros())
        _expect(
            abs(audit.primal - objective) <= ROUNDING * objective,
            f"a head without neurons must have the objective of Z = 0, {objective:.10g}, but has {audit.primal:.10g}",
        )


# the program, its solution and the certificates


def check_beta_max(mixer: Mixer, tokens: Tensor) -> None:
    """At beta_max the solution is 0, a little below it is not."""
    for program in _programs(mixer, tokens, losses=1):
        critical = program.beta_max()
        _expect(
            critical > 0 or program.activation.count > 1,
            "the head must see its tokens, but its predictions on them do not depend on its weights",
        )
        if critical == 0:  # none of the sampled gates opens on these tokens
            continue
        zero = program.objective(program.operator.zeros())
        above = solve(program.with_beta(1.001 * critical), tol=TOL, progress=False)
        _expect(
            above.rank == 0 and above.objective == zero,
            f"the solution at beta >= beta_max must be 0, but has {above.rank} heads ({_case(program)})",
        )
        predictions = _attempt("the head of the zero solution", functools.partial(above.head(), program.tokens))
        _expect(
            not bool(predictions.detach().any()), f"the head of the zero solution must predict 0 ({_case(program)})"
        )
        below = solve(program.with_beta(0.9 * critical), tol=TOL, progress=False)
        _expect(
            below.rank > 0 and below.objective < zero,
            f"the solution below beta_max must not be 0, but it is ({_case(program)})",
        )


def check_solution(mixer: Mixer, tokens: Tensor) -> None:
    """A small solve is certified; the recovered network has the program's objective, no more heads than the rank bound, and sound certificates."""
    for program in _programs(mixer, tokens):
        solution = solve(program, tol=TOL, progress=False)
        _expect(
            solution.status is Status.CERTIFIED,
            f"a small solve must be certified ({_case(program)}), but: {solution.status}",
        )
        head = solution.head()
        objective = network_objective(program, head)
        _expect(
            abs(objective - solution.objective) <= 1e-8 * abs(solution.objective),
            f"the recovered network's regularised objective must be the program's {solution.objective:.10g}, "
            f"but is {objective:.10g} ({_case(program)})",
        )
        blocks, p, q = program.operator.shape
        _expect(
            len(head) <= blocks * min(p, q),
            f"the recovered network must have at most {blocks * min(p, q)} heads, but has {len(head)} ({_case(program)})",
        )
        audit = certify(program, head, solution.certificate.dual_point)
        _expect(
            -ROUNDING <= audit.relative_gap <= 2 * TOL,
            f"the independent audit of the solution must find a small gap, but finds {audit.relative_gap:.1e} ({_case(program)})",
        )
        _check_certificates(program, solution.objective)


def check_copied_programs(mixer: Mixer, tokens: Tensor) -> None:
    """A deep copy and a pickle of a program, with all that a solve has left in it, have its solution."""
    for program in _programs(mixer, tokens, losses=1):
        if program.pool is None:
            continue
        objective = solve(program, tol=TOL, progress=False).objective
        for way, make in COPIES.items():
            again = _attempt(f"{way} of a program that was solved", lambda make=make, program=program: make(program))
            found = solve(again, tol=TOL, progress=False).objective
            _expect(
                abs(found - objective) <= ROUNDING * abs(objective),
                f"{way} of a program must have the solution of the program, but has objective {found:.10g} "
                f"and not {objective:.10g} ({_case(program)})",
            )


def _check_certificates(program: ConvexProgram, optimum: float) -> None:
    """No certificate, of lifted blocks or of a head, however far from optimal, excludes the optimum (known from above)."""
    for seed, scale in enumerate((0.01, 1.0, 30.0)):
        head = Head.random(
            program.mixer, program.activation, 2, pool=program.pool, scale=scale, seed=seed, dtype=torch.float64
        )
        certificates = (
            program.certificate(scale * _blocks(program, seed=seed)),
            certify(program, head.to(program.tokens.device)),
        )
        for certificate in certificates:
            _expect(
                certificate.dual <= optimum * (1 + ROUNDING) and certificate.primal >= optimum * (1 - 2 * TOL),
                f"a certificate must enclose the optimum {optimum:.8g}, "
                f"but one is [{certificate.dual:.8g}, {certificate.primal:.8g}] ({_case(program)})",
            )


#: the battery, in order: a check may rely on those before it
CHECKS: tuple[Callable[[Mixer, Tensor], None], ...] = (
    check_sizes,
    check_form,
    check_purity,
    check_copies,
    check_linearity,
    check_lifting,
    check_adjoint,
    check_nothing,
    check_beta_max,
    check_solution,
    check_copied_programs,
)


@torch.no_grad()
def network_objective(program: ConvexProgram, head: Head) -> float:
    r"""The regularised objective of a network, from its own forward pass: data loss plus :math:`\tfrac\beta2 \sum_j (\|u_j\|^2 + \|V_j\|_F^2)`."""
    predictions = head(program.tokens).reshape(-1, program.mixer.outputs)
    return program.data_loss(predictions) + program.beta * float(head.weight_decay())


# helpers


def _expect(condition: bool, sentence: str) -> None:
    if not condition:
        raise MixerError(sentence + ".")


def _attempt(what: str, call: Callable[[], T]) -> T:
    """The result of a call into the mixer; whatever it raises becomes a sentence."""
    try:
        return call()
    except Exception as error:
        raise MixerError(f"{what} must not fail, but raised {type(error).__name__}: {error}") from error


def _hidden(mixer: Mixer, tokens: Tensor, u: Tensor) -> Tensor:
    what = f"hidden(tokens, u) for tokens {tuple(tokens.shape)} and u {tuple(u.shape)}"
    return _attempt(what, lambda: mixer.hidden(tokens, u))


def _values(mixer: Mixer, tokens: Tensor) -> Tensor:
    return _attempt(f"values(tokens) for tokens {tuple(tokens.shape)}", lambda: mixer.values(tokens))


def _alike(name: str, result: Tensor, tokens: Tensor) -> None:
    _expect(
        result.dtype == tokens.dtype and result.device == tokens.device,
        f"{name} must stay in the dtype and on the device of the tokens, {tokens.dtype} on {tokens.device}, "
        f"but is {result.dtype} on {result.device}",
    )
    _expect(
        bool(torch.isfinite(result).all()),
        f"{name} must be finite for finite arguments, but has NaN or infinite entries",
    )


def _form(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return float((one - other).norm()) <= ROUNDING * float(one.norm() + other.norm())


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _draw(mixer: Mixer, heads: int, seed: int) -> Tensor:
    return _normal((heads, *mixer.shape), seed)


def _blocks(program: ConvexProgram, seed: int) -> Tensor:
    return _normal(program.operator.shape, seed).to(program.tokens)


def _programs(mixer: Mixer, tokens: Tensor, losses: int = 2) -> Iterator[ConvexProgram]:
    """Programs on the tokens: linear and gated, pooled and per token, with both losses or only the squared one."""
    activations: tuple[Activation, ...] = (Linear(), GatedReLU.sample(mixer, count=GATES))
    seen = mixer.split(tokens)[0]
    positions = mixer.hidden(seen[:1], seen.new_zeros(1, *mixer.shape)).shape[2]
    for activation, pool in itertools.product(activations, ("mean", None)):
        rows = (len(tokens),) if pool else (len(tokens), positions)
        program = ConvexProgram(
            mixer, activation, SquaredLoss(), tokens, _normal((*rows, mixer.outputs), seed=7).to(tokens), 1.0, pool
        )
        yield _at_fraction(program)
        if losses == 2 and mixer.outputs >= 2:
            generator = torch.Generator().manual_seed(8)
            labels = torch.randint(mixer.outputs, rows, generator=generator).to(tokens.device)
            yield _at_fraction(ConvexProgram(mixer, activation, CrossEntropy(), tokens, labels, 1.0, pool))


def _at_fraction(program: ConvexProgram) -> ConvexProgram:
    critical = program.beta_max()
    return program.with_beta(0.2 * critical) if critical > 0 else program


def _case(program: ConvexProgram) -> str:
    """The program in a few words, for a message."""
    gates = "linear" if program.activation.count == 1 else f"{program.activation.count} gates"
    return f"{gates}, {program.loss!r}, {'pooled' if program.pool else 'per token'}"
