r"""How heads are trained in the transfer experiment: the numbers of the paper, and the choice of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from cvxlib.ground.checks import positive_float, positive_int, require, wrong_type
from cvxlib.model.mixers import CrossAttention, Mixer, SelfAttention
from cvxlib.program.program import ConvexProgram
from cvxlib.solvers.training import Training, train


@dataclass(frozen=True)
class Protocol:
    r"""AdamW with warm-up and a cosine schedule, as in the paper; every number can be another.

    Args:
        epochs: passes over the training samples.
        beta: weight decay for a loss that is *summed* over samples; see :meth:`weight_decay`.
        learning_rates: candidates for the initial rate.
        warmup_epochs: epochs over which the rate rises linearly from ``warmup_rate``.
        warmup_rate: first learning rate.
        final_fraction: last learning rate, as a fraction of the initial one.
        batch: samples per step.
        attention_batch: samples per step of self-attention.

    Raises:
        TypeError, ValueError: a number of the wrong kind or range, or no learning rate.

    Source: Sahiner et al. 2022, section 5.
    """

    epochs: int = 70
    beta: float = 2e-2
    learning_rates: tuple[float, ...] = (5e-3, 1e-4)
    warmup_epochs: int = 3
    warmup_rate: float = 2e-7
    final_fraction: float = 2e-2
    batch: int = 100
    attention_batch: int = 20

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "attention_batch"):
            positive_int(name, getattr(self, name))
        positive_int("warmup_epochs", self.warmup_epochs, least=0)
        for name in ("beta", "warmup_rate", "final_fraction"):
            positive_float(name, getattr(self, name))
        if not isinstance(self.learning_rates, (list, tuple)):
            raise wrong_type("learning_rates", "a list of numbers greater than 0", self.learning_rates)
        require(len(self.learning_rates) > 0, "learning_rates", "at least one", "none")
        rates = tuple(positive_float("learning_rates", rate) for rate in self.learning_rates)
        object.__setattr__(self, "learning_rates", rates)

    def weight_decay(self, samples: int) -> float:
        r"""The program's beta, :math:`\beta / n`: the paper adds up the loss over the n samples, a program of this package averages it."""
        return self.beta / positive_int("samples", samples)

    def batch_for(self, mixer: Mixer) -> int:
        """Samples per step for a head of this mixer."""
        return self.attention_batch if isinstance(mixer, (SelfAttention, CrossAttention)) else self.batch

    def fit(
        self,
        program: ConvexProgram,
        network: nn.Module,
        learning_rate: float,
        *,
        epochs: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Training:
        """Train a copy of a network on a program's objective by this protocol.

        Args:
            program: supplies loss, data and beta.
            network: a :class:`cvxlib.Head` or a network of :mod:`cvxlib.model.baselines`.
            learning_rate: the initial one.
            epochs: another length of the whole schedule.
            seed: of the order of the samples.
            progress: show a bar; by default only on a terminal.
        """
        return train(
            program,
            head=network,
            epochs=self.epochs if epochs is None else epochs,
            batch=self.batch_for(program.mixer),
            learning_rate=learning_rate,
            warmup_epochs=self.warmup_epochs,
            warmup_rate=self.warmup_rate,
            final_fraction=self.final_fraction,
            seed=seed,
            progress=progress,
        )


def choose_rate(train_accuracy: Mapping[float, float]) -> float:
    """The learning rate with the best training accuracy, the first of equals; test data have no say in it.

    Args:
        train_accuracy: training accuracy by learning rate.
    """
    require(len(train_accuracy) > 0, "train_accuracy", "at least one learning rate", "none")
    return max(train_accuracy, key=train_accuracy.__getitem__)
