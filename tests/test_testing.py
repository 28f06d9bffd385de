"""The battery itself: every deliberately wrong mixer is refused, with the sentence that says what is wrong with it."""

import dataclasses
import functools
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import cvxlib
from cvxlib.operators.lifted import LiftedOperator
from cvxlib.testing import MixerError, check_mixer
from cvxlib.testing import mixers as testing

N, S, D, C = 5, 4, 2, 2
TOKENS = torch.randn(N, S, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclass(frozen=True)
class Sound(cvxlib.MLP):
    """A token-wise network, from which each wrong mixer below departs in one point."""


class NonlinearHidden(Sound):
    def hidden(self, tokens, u):
        return super().hidden(tokens, u).relu()


class AffineHidden(Sound):
    def hidden(self, tokens, u):
        return super().hidden(tokens, u) + 1


class SamplesMixed(Sound):
    def hidden(self, tokens, u):
        return super().hidden(tokens - tokens.mean(0), u)


class ValuesMixed(Sound):
    def values(self, tokens):
        return super().values(tokens) * tokens.square().sum()


class HeadsMixed(Sound):
    def hidden(self, tokens, u):
        return super().hidden(tokens, u) / max(1, len(u))


class WrongWidth(Sound):
    @property
    def width(self):
        return 3


class WrongValues(Sound):
    def values(self, tokens):
        return super().values(tokens)[0]


class MissingPositions(Sound):
    def hidden(self, tokens, u):
        return super().hidden(tokens, u).squeeze(3)


class AxesSwapped(Sound):
    def hidden(self, tokens, u):
        return super().hidden(tokens, u).transpose(1, 2)


class ShapeNotTuple(Sound):
    @property
    def shape(self):
        return self.features


class ShapeTooLong(Sound):
    @property
    def shape(self):
        return (self.features + 1,)


class NoHeads(Sound):
    def hidden(self, tokens, u):
        return torch.stack([(tokens @ w).unsqueeze(2) for w in u], 1)


class CutOff(Sound):
    def hidden(self, tokens, u):
        return super().hidden(tokens, u.detach())


class HalfCutOff(Sound):
    def hidden(self, tokens, u):
        return super().hidden(tokens, u / 2) + super().hidden(tokens, u.detach() / 2)


class NoisyHidden(Sound):
    def hidden(self, tokens, u):
        return super().hidden(tokens, u) * torch.rand(()).to(tokens)


class NoisyValues(Sound):
    def values(self, tokens):
        return super().values(tokens) + torch.rand(()).to(tokens)


class InPlace(Sound):
    def hidden(self, tokens, u):
        return super().hidden(tokens.mul_(0.5), u)


class AlwaysDouble(Sound):
    def hidden(self, tokens, u):
        return super().hidden(tokens, u).double()


class NotFinite(Sound):
    def hidden(self, tokens, u):
        return super().hidden(tokens / 0, u)


class Blind(Sound):
    def values(self, tokens):
        return 0 * super().values(tokens)


class TwoBlocks(Sound):
    blocks = 2


class HalfTheSamples(Sound):
    def split(self, tokens):
        return (tokens[::2],)


class ReturnsArray(Sound):
    def hidden(self, tokens, u):
        return np.asarray(super().hidden(tokens.detach(), u.detach()))


class NotEqualToItsCopy(Sound):
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Remembering(Sound):
    def hidden(self, tokens, u):
        object.__setattr__(self, "calls", getattr(self, "calls", 0) + 1)
        return super().hidden(tokens, u)


class Forgetting(Sound):
    def __init__(self, features, outputs, scale=2.0):
        super().__init__(features, outputs)
        object.__setattr__(self, "scale", scale)

    def __deepcopy__(self, memo):
        return type(self)(self.features, self.outputs, self.scale)

    def __reduce__(self):
        return type(self), (self.features, self.outputs, 1.0)


class KeepingAFunction(Sound):
    @functools.cached_property
    def map(self):
        return lambda tokens, u: (tokens @ u.mT).mT.unsqueeze(3)

    def hidden(self, tokens, u):
        return self.map(tokens, u)

    def __deepcopy__(self, memo):
        return type(self)(self.features, self.outputs)


class DrawingItsOwn(Sound):
    @functools.cached_property
    def scale(self):
        return float(torch.rand(()))

    def hidden(self, tokens, u):
        return super().hidden(tokens, u) * self.scale

    def __deepcopy__(self, memo):
        return type(self)(self.features, self.outputs)


class Refusing(Sound):
    def check(self, tokens):
        raise ValueError("not these tokens")


class FailsBackward(torch.autograd.Function):
    """The identity, with a derivative that does not take an empty batch."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        if gradient.numel() == 0:
            raise RuntimeError("empty batch")
        return gradient


class NoHeadsBackward(Sound):
    def hidden(self, tokens, u):
        return FailsBackward.apply(super().hidden(tokens, u))


WRONG = {
    NonlinearHidden: "hidden must be linear in u, but hidden(a u + b w) differs",
    AffineHidden: "hidden must be linear in u, but is not 0 at u = 0",
    SamplesMixed: "hidden must treat each sample by itself",
    ValuesMixed: "values must treat each sample by itself",
    HeadsMixed: "hidden must treat each head u_j by itself",
    WrongWidth: "values must be (n, h, w) = (5, 1, 3) by the last axis of hidden and by width, but is (5, 1, 1)",
    WrongValues: "values must be (n, h, w) = (5, 1, 1) by the last axis of hidden and by width, but is (1, 1)",
    MissingPositions: "hidden must be (n, m, a, h) with n = 5, m = 3 for tokens (5, 4, 2) and u (3, 2), but is (5, 3, 4)",
    AxesSwapped: "hidden must be (n, m, a, h) with n = 5, m = 3 for tokens (5, 4, 2) and u (3, 2), but is (5, 4, 3, 1)",
    ShapeNotTuple: "shape must be a tuple of whole numbers of at least 1, the shape of one u, but is 2",
    ShapeTooLong: "hidden(tokens, u) for tokens (5, 4, 2) and u (3, 3) must not fail, but raised RuntimeError",
    NoHeads: "hidden(tokens, u) for tokens (5, 4, 2) and u (0, 2) must not fail, but raised RuntimeError",
    NoHeadsBackward: "the gradient of a head without neurons (linear, SquaredLoss(), pooled) must not fail",
    CutOff: "hidden must be differentiable in u",
    HalfCutOff: "autograd through hidden must give the adjoint of the lifted operator",
    NoisyHidden: "hidden must repeat itself",
    NoisyValues: "values must repeat itself",
    InPlace: "hidden and values must leave the tokens as they are",
    AlwaysDouble: "hidden must stay in the dtype and on the device of the tokens, torch.float32 on cpu, but is torch.float64",
    NotFinite: "hidden must be finite",
    Blind: "the head must see its tokens",
    TwoBlocks: "split(tokens) must give blocks = 2 token sets, but gives 1",
    HalfTheSamples: "split(tokens) must give token sets (n, s, d) with all n = 5 samples",
    ReturnsArray: "hidden must be (n, m, a, h) with n = 5, m = 3 for tokens (5, 4, 2) and u (3, 2), but is a ndarray",
    NotEqualToItsCopy: "a deep copy of it must equal it and hash like it",
    Remembering: "its fields must stay as they are when it is used",
    Forgetting: "a pickle of it must equal it and hash like it",
    KeepingAFunction: "a pickle of it must not fail, but raised",
    DrawingItsOwn: "a deep copy of it must do what it does, but gives other hidden or values",
    Refusing: "check(tokens) must not fail, but raised ValueError: not these tokens",
}


def test_the_sound_mixer_passes():
    check_mixer(Sound(D, C), TOKENS)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_wrong_mixer_is_refused_in_one_sentence(wrong):
    with pytest.raises(MixerError, match=re.escape(WRONG[wrong])) as caught:
        check_mixer(wrong(D, C), TOKENS.clone())
    assert "\n" not in str(caught.value).split("raised")[0]


def test_the_battery_is_an_assertion_for_pytest():
    assert issubclass(MixerError, AssertionError)


@pytest.mark.parametrize("mixer", [None, cvxlib.MLP, "MLP"])
def test_what_is_no_mixer_is_refused(mixer):
    with pytest.raises(TypeError, match="mixer: expected a Mixer"):
        check_mixer(mixer, TOKENS)


# The remaining checks guard this package's own arithmetic: break it, and they must notice.


def _scaled(method, factor):
    return lambda *arguments, **options: factor * method(*arguments, **options)


def test_a_wrong_operator_is_noticed(monkeypatch):
    monkeypatch.setattr(LiftedOperator, "forward", _scaled(LiftedOperator.forward, 1 + 1e-8))
    with pytest.raises(MixerError, match="the lifted operator must give the network's predictions"):
        testing.check_lifting(Sound(D, C), TOKENS)


def test_a_wrong_adjoint_is_noticed(monkeypatch):
    monkeypatch.setattr(LiftedOperator, "adjoint", _scaled(LiftedOperator.adjoint, 1 + 1e-8))
    with pytest.raises(MixerError, match=re.escape("<A(Z), R> = <Z, A*(R)>")):
        testing.check_adjoint(Sound(D, C), TOKENS)


class WrongPooled(cvxlib.SelfAttention):
    hidden = cvxlib.SelfAttention.hidden
    values = cvxlib.SelfAttention.values

    def pooled(self, tokens, masks):
        return super().pooled(tokens * 1.01, masks)


class InheritedPooled(cvxlib.SelfAttention):
    def hidden(self, tokens, u):
        return super().hidden(tokens, u).triu()


def test_a_wrong_contraction_is_noticed_and_an_inherited_one_is_not_used():
    with pytest.raises(MixerError, match="pooled is not the mean of the gated hidden matrices"):
        testing.check_adjoint(WrongPooled(D, C), TOKENS)
    testing.check_adjoint(InheritedPooled(D, C), TOKENS)


def test_a_wrong_beta_max_is_noticed(monkeypatch):
    true = cvxlib.ConvexProgram.beta_max
    monkeypatch.setattr(cvxlib.ConvexProgram, "beta_max", _scaled(true, 0.9))
    with pytest.raises(MixerError, match="the solution at beta >= beta_max must be 0"):
        testing.check_beta_max(Sound(D, C), TOKENS)
    monkeypatch.setattr(cvxlib.ConvexProgram, "beta_max", _scaled(true, 1.2))
    with pytest.raises(MixerError, match="the solution below beta_max must not be 0"):
        testing.check_beta_max(Sound(D, C), TOKENS)


def _solve_with(change):
    def solve(program, **options):
        solution = cvxlib.solve(program, **options)
        return dataclasses.replace(solution, **change(solution))

    return solve


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda it: {"status": cvxlib.Status.ITERATION_LIMIT}, "a small solve must be certified"),
        (
            lambda it: {"factors": dataclasses.replace(it.factors, u=it.factors.u * (1 + 1e-3))},
            "the recovered network's regularised objective must be the program's",
        ),
    ],
)
def test_a_wrong_solution_is_noticed(monkeypatch, change, sentence):
    monkeypatch.setattr(testing, "solve", _solve_with(change))
    with pytest.raises(MixerError, match=sentence):
        testing.check_solution(Sound(D, C), TOKENS)


@pytest.mark.parametrize("way", testing.COPIES)
def test_a_program_whose_copy_differs_is_noticed(monkeypatch, way):
    def other(program):
        return program.with_beta(1.01 * program.beta)

    monkeypatch.setitem(testing.COPIES, way, other)
    with pytest.raises(MixerError, match=f"{way} of a program must have the solution of the program"):
        testing.check_copied_programs(Sound(D, C), TOKENS)


def test_too_many_heads_are_noticed(monkeypatch):
    def split(solution):
        factors = solution.factors
        half = cvxlib.Factors(
            *(torch.cat([part] * 2) for part in (factors.u / 2**0.5, factors.v / 2**0.5, factors.block))
        )
        return {"factors": half}

    monkeypatch.setattr(testing, "solve", _solve_with(split))
    with pytest.raises(MixerError, match="must have at most 2 heads, but has 4"):
        testing.check_solution(Sound(D, C), TOKENS)


def test_an_unsound_bound_is_noticed(monkeypatch):
    true = cvxlib.ConvexProgram.certificate

    def raised(program, z):
        certificate = true(program, z)
        return dataclasses.replace(certificate, dual=certificate.primal)

    monkeypatch.setattr(cvxlib.ConvexProgram, "certificate", raised)
    with pytest.raises(MixerError, match="a certificate must enclose the optimum"):
        testing.check_solution(Sound(D, C), TOKENS)


def test_a_wide_audit_is_noticed(monkeypatch):
    monkeypatch.setattr(testing, "certify", lambda program, head, dual_point=None: cvxlib.Certificate(1.0, 0.5))
    with pytest.raises(MixerError, match="the independent audit of the solution must find a small gap"):
        testing.check_solution(Sound(D, C), TOKENS)
