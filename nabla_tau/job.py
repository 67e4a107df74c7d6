"""What every method is given, a model and its data that have been looked at; and what it becomes, steps of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nabla_tau.batch import Forward
from nabla_tau.classes import ForgetKindReport, measure_target
from nabla_tau.distributed import WHOLE, ProcessGroup, Ranks
from nabla_tau.evaluation import SampleLoss
from nabla_tau.history import History
from nabla_tau.objective import Target
from nabla_tau.preparation import Prepared
from nabla_tau.sources import Source, Stream, derive_seed

FORGET, RETAIN, HELD_OUT, WEIGHTS, GLOBAL, LEARN = range(6)  # what a derived seed is for


@dataclass(frozen=True)
class Job:
    """One call of `unlearn`. model: the one to change. sharded: each rank has samples of its own. looks: what was found
    (`outcome.py`) of data sets, by role, with the model as it is now; who changes the model empties it."""

    model: nn.Module
    data: Prepared
    ranks: Ranks
    sharded: bool
    forward: Forward | None
    loss: SampleLoss | None
    seed: int
    micro_batch_size: int | None
    process_group: ProcessGroup | Literal["auto"] | None
    performance: str
    looks: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def batch_sizes(self, *sizes: int) -> list[int]:
        """Samples that this process reads for a batch of all, each."""
        return [-(-n // self.ranks.size) for n in sizes] if self.sharded else list(sizes)

    def batches_per_pass(self, source: Source, batch_size: int) -> int:
        """Steps that a pass takes: a rank whose samples are used up begins its next one while the others finish."""
        return max(row[0] for row in self.ranks.numbers(source.batches_per_pass(batch_size)))

    def stream(self, source: Source, batch_size: int, role: int) -> Stream:
        return Stream(source, batch_size, self.seed, role, WHOLE if self.sharded else self.ranks.share)

    def target(
        self, forward: Forward | None, step: int, *, kind: ForgetKindReport | None = None, samples: int | None = None
    ) -> Target:
        """tau: the losses of held-out samples, drawn anew at each step where `samples` are fewer than there are."""
        counts = self.data.counts
        return measure_target(
            self.model,
            self.data.held_out,
            kind or self.data.kind,
            batch_size=250,
            forward=forward,
            loss=self.loss,
            samples=samples,
            seed=derive_seed(self.seed, HELD_OUT, step),
            # A probability below 1/n^2 is nothing that n samples can teach.
            absent_limit=2 * math.log(counts["forget"] + counts["retain"]),
            ranks=self.ranks,
            sharded=self.sharded,
        )


class CannotServeError(ValueError):
    """The job is of a kind that a method cannot serve; the message says why."""


class Done(NamedTuple):
    """What one step did: `metrics`, 0-d tensors on the model's device, `known`, numbers of the host, and the samples
    that this process gave to it."""

    metrics: dict[str, Tensor]
    known: dict[str, float]
    samples: int


class Steps(Protocol):
    """A method at work on a job. The loop calls `begin`, or `seek` and `load_state_dict`, then `step` for
    0 .. count - 1, with `refresh` before every `refresh_every`-th, then `finish`. It owns everything else: checkpoints,
    history, progress, the last good weights.

    forward: how the model is called to measure it. optimizer: that of the last step.
    """

    count: int
    refresh_every: int
    warnings: list[str]

    @property
    def parameters(self) -> list[nn.Parameter]: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    @property
    def forward(self) -> Forward | None: ...
    def begin(self) -> dict[str, float]: ...
    def seek(self, step: int) -> None: ...
    def refresh(self, step: int) -> None: ...
    def step(self, step: int) -> Done: ...
    def finish(self) -> dict[str, float]: ...
    def settings(self, history: History) -> dict[str, Any]: ...
    def diagnose(self, history: History, measured: Mapping[str, float]) -> list[str]: ...
    def note(self, history: History) -> str: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
