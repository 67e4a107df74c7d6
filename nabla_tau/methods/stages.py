"""A method as a list of stages, each a few settings and functions; and the steps that they become.

A stage says which samples a step draws, what mean of theirs it minimises, with which optimizer, and what else happens
to weights and gradients. Everything else is the loop's: data order, checkpoints, history, several processes. `stages`
of a method is called once on the original weights, also by a run that is resumed: what it looks at (teacher outputs,
Fisher information) must be a function of model, data and seed. What happens in between belongs in a stage's functions,
and what they keep in its `state`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nabla_tau.accumulation import stand_in, take_gradients
from nabla_tau.batch import Batch, Forward, sample_count, to_device, without_trace
from nabla_tau.cuda_graph import CudaRecorder
from nabla_tau.evaluation import counting_losses
from nabla_tau.fused import mean_gradient, serves_mean
from nabla_tau.history import History
from nabla_tau.job import FORGET, LEARN, RETAIN, CannotServeError, Done, Job
from nabla_tau.methods.setup import Setup
from nabla_tau.optimizer_state import Stepper, load_state, own_options, set_learning_rate
from nabla_tau.preparation import Prepared
from nabla_tau.sources import Source, Stream
from nabla_tau.step_graph import CAPTURED, StepGraphs

TERMS = ("forget_term", "retain_term", "learn_term")  # the last where a stage has something to learn
ROLES = {"forget": FORGET, "retain": RETAIN, "learn": LEARN}


class Drawn:
    """A batch on the model's device."""

    def __init__(self, batch: Batch, stream: Stream | None = None) -> None:
        self.batch, self._stream = batch, stream

    @property
    def numbers(self) -> Tensor | None:
        """Which samples of the data set it holds, [n] on the CPU, until the next batch is drawn; None where only a
        DataLoader knows."""
        return None if self._stream is None else self._stream.numbers()


NOTHING = Drawn(())


class Term(NamedTuple):
    """weight * sum_i w_i v_i / sum_i w_i over the samples of all processes.

    name: of `TERMS`, its column in the history. values: (model, batch) -> v [n] with gradient and w [n] >= 0 without
    (a bool tensor where samples only count or not); None for the samples' losses, of those that have one.
    """

    name: str
    batch: Batch
    values: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]] | None = None
    weight: float = 1.0


Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class Stage:
    """steps: how many. terms: (step of the stage, forget batch, retain batch) -> what it minimises; NOTHING
    where `forget` or `retain`, the samples a step, is 0. learn: a third data set and the samples a step, of which
    `terms` gets a third batch. draws: step -> which of "forget", "retain" and "learn" it takes a batch of, NOTHING of
    the others; None for all. repeats: whether `terms` is the same for every step and hangs on the batches alone, not on
    their numbers, and nothing else is done to gradients and weights: on a GPU such steps are captured (`step_graph`).
    optimizer: of the parameters, with its learning rate; None to go on with that of the stage before. rate: step ->
    factor on that. training: train mode instead of eval mode. parameters: those that move, None for all.

    begin: before the first step. gradient: between backward and update, on .grad. combine: instead of adding the
    gradients of the terms up, gets one list a term and gives the list to step along. after: after an update. stop:
    after the last step of the stage; True ends the run there. state: tensors that these functions keep from one step to
    another.
    """

    steps: int
    terms: Callable[..., Sequence[Term]] | None = None
    optimizer: Optimizer | None = None
    forget: int = 0
    retain: int = 0
    learn: tuple[Source, int] | None = None
    draws: Callable[[int], Container[str]] | None = None
    repeats: bool = False
    rate: Callable[[int], float] = lambda step: 1.0
    training: bool = False
    parameters: list[nn.Parameter] | None = None
    begin: Callable[[], None] | None = None
    gradient: Callable[[int], None] | None = None
    combine: Callable[[list[list[Tensor | None]]], list[Tensor | None]] | None = None
    after: Callable[[int], None] | None = None
    stop: Callable[[], bool] | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    def goes_on(self, before: Stage) -> bool:
        """Whether it repeats the steps of the stage before, but for rate and number."""
        mine, theirs = ((s.repeats, s.terms, s.learn, s.forget > 0, s.retain > 0) for s in (self, before))
        return self.repeats and mine == theirs

    def sets(self, data: Prepared) -> dict[str, tuple[Source, int]]:
        """What it draws from, and how many samples a step."""
        found = {"forget": (data.forget, self.forget), "retain": (data.retain, self.retain)}
        return found if self.learn is None else found | {"learn": self.learn}


class Method(Protocol):
    """A frozen dataclass of settings: `unlearn(method=...)` takes one, or its name."""

    @property
    def name(self) -> str: ...
    def stages(self, setup: Setup) -> list[Stage]: ...


class StagedSteps:
    """`Steps` of a method on a job."""

    def __init__(self, method: Method, job: Job) -> None:
        if job.micro_batch_size is not None:
            raise CannotServeError(f"micro_batch_size is for nabla-tau: give {method.name} a smaller batch size")
        self.method, self.job = method, job
        self.setup = Setup(job)
        self.warnings: list[str] = self.setup.warnings
        self._entered = -1  # the stage whose optimizer this is
        self._streams: dict[str, Stream] = {}
        self._graphs: list[StepGraphs] = []  # one an optimizer
        self._use(torch.optim.SGD(self.setup.parameters, lr=0))  # of no steps
        with without_trace(job.model):
            self.stages = method.stages(self.setup)
        # The first step of each stage, and then the number of all.
        *self._starts, self.count = itertools.accumulate((stage.steps for stage in self.stages), initial=0)
        self._planned = self.count
        self.refresh_every = max(1, -(-self.count // 20))
        self._terms = TERMS if any(stage.learn for stage in self.stages) else TERMS[:2]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.setup.parameters

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    @property
    def forward(self) -> Forward | None:
        return self.setup.forward_alone

    @property
    def _step_graph(self) -> str:
        if self.setup.refused is None and not any(stage.repeats for stage in self.stages):
            return f"eager: the steps of {self.method.name} are not all alike"
        said = [graphs.said for graphs in self._graphs]
        return CAPTURED if CAPTURED in said else said[-1]

    def begin(self) -> dict[str, float]:
        return {"tau_before": float(self.job.target(self.forward, 0).mean)}

    def seek(self, step: int) -> None:
        """Take up the stage of the last step that was done; the next one begins with the next step."""
        index = max(i for i, start in enumerate(self._starts) if start < max(step, 1))
        for entered in range(index + 1):  # a stage may go on with the optimizer of one before, and with its streams
            self._enter(entered, begin=False)

    def _enter(self, index: int, *, begin: bool) -> None:
        before, stage = self.stages[max(self._entered, 0)], self.stages[index]
        self._entered = index
        assert not (stage.repeats and (stage.gradient or stage.combine or stage.draws))
        self.job.model.train(stage.training)
        self._looked = False  # at what can be rewritten in this mode
        if not stage.goes_on(before):  # what was recorded has its terms built in, and the data sets they are of
            self._graphs[-1].drop()
        if begin and stage.begin is not None:
            self.job.looks.clear()
            with torch.no_grad():
                stage.begin()
        if stage.optimizer is not None:
            self._use(stage.optimizer(stage.parameters or self.parameters))
        sets = stage.sets(self.job.data)
        self._sizes = {name: size for name, (_, size) in sets.items()}
        for name, (source, size) in sets.items():
            if size:
                (own,) = self.job.batch_sizes(size)
                went = self._streams.get(name)
                self._streams[name] = stream = self.job.stream(source, own, ROLES[name])
                if went is not None and begin:  # the passes go on through the stages
                    stream.load_state_dict({"passes": went.passes + 1, "position": 0})

    def _use(self, optimizer: torch.optim.Optimizer) -> None:
        for graphs in self._graphs:
            graphs.drop()
        self._optimizer, self._own_options = optimizer, own_options(optimizer)
        self._take_step = Stepper(optimizer)
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        recorder = partial(CudaRecorder, self.setup.device)
        refused = self.setup.refused
        self._graphs.append(StepGraphs(self._repeated, self.job.model, optimizer, refused=refused, recorder=recorder))

    def _advance(self, step: int) -> None:
        """Enter the stages that begin with or before this step."""
        while self._entered + 1 < len(self.stages) and self._starts[self._entered + 1] <= step:
            self._enter(self._entered + 1, begin=True)

    def refresh(self, step: int) -> None:
        """Nothing is measured on the way."""

    def step(self, step: int) -> Done:
        self._advance(step)
        stage, optimizer = self.stages[self._entered], self._optimizer
        own = step - self._starts[self._entered]
        wanted = None if stage.draws is None else stage.draws(own)
        every = [
            self._draw(name) if size and (wanted is None or name in wanted) else NOTHING
            for name, size in self._sizes.items()
        ]
        batches = [given.batch for given in every if given is not NOTHING]
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            set_learning_rate(group, rate * stage.rate(own))
        if not self._looked:
            self.setup.performance.look(batches[0])
            self._looked = sample_count(batches[0]) > 0
        values = self._graphs[-1](*batches) if stage.repeats else self._update(own, every)
        parts = dict(zip(self._names, values, strict=True))
        if stage.after is not None:
            with torch.no_grad():
                stage.after(own)
        if stage.stop is not None and own + 1 == stage.steps and stage.stop():
            self.count = step + 1
        metrics = {"loss": values[0] if len(values) == 1 else torch.stack(list(values)).sum(), **parts}
        known = {name: float("nan") for name in self._terms if name not in parts}
        known |= {"learning_rate": self._rates[0] * stage.rate(own), "stage": float(self._entered)}
        return Done(metrics, known, sum(map(sample_count, batches)))

    def _draw(self, name: str) -> Drawn:
        stream = self._streams[name]
        return Drawn(to_device(stream.next(), self.setup.device), stream)

    def _repeated(self, *batches: Batch) -> list[Tensor]:
        """A step of a stage that `repeats`: on a GPU a function of tensors, which may be captured and not be called
        again."""
        given = iter(batches)
        return self._update(0, [Drawn(next(given)) if size else NOTHING for size in self._sizes.values()])

    def _update(self, own: int, every: Sequence[Drawn]) -> list[Tensor]:
        """Gradient and update; the values of the terms, of which `_names` has the names."""
        stage, model = self.stages[self._entered], self.job.model
        assert stage.terms is not None
        for parameter in self.parameters:
            parameter.grad = None
        batches = [given.batch for given in every if given is not NOTHING]
        apart: list[list[Tensor | None]] = []
        parts: dict[str, Tensor] = {}
        terms = stage.terms(own, *every)
        for position, term in enumerate(terms, 1):
            last = stage.combine is not None or position == len(terms)
            value = self._backward(term, batches, last=last)
            parts[term.name] = parts[term.name] + value if term.name in parts else value
            if stage.combine is not None:
                apart.append(take_gradients(model, self.parameters, self.job.ranks))
        if stage.combine is None:
            self.job.ranks.finish(self.parameters)
        else:
            for parameter, gradient in zip(self.parameters, stage.combine(apart), strict=True):
                parameter.grad = gradient
        if stage.gradient is not None:
            stage.gradient(own)
        self._take_step()
        self._names = tuple(parts)
        return list(parts.values())

    def _backward(self, term: Term, batches: Sequence[Batch], *, last: bool) -> Tensor:
        """The gradient of a term added to .grad; its value over all processes, 0-d."""
        ranks, model = self.job.ranks, self.job.model
        own = sample_count(term.batch) > 0
        # Where the others have samples of this term, they wait for a forward and a backward of this one too.
        piece = term.batch if own else stand_in(*batches)
        trace = contextlib.nullcontext() if own else without_trace(model)
        with trace, ranks.gradients_stay(model, not last), self.setup.performance.active():
            if not own:  # what `values` knows of single samples is of the rank's own: of a stand-in any output will do
                found = self._of_no_weight(piece)
            elif term.values is not None:
                found = term.values(model, piece)
            else:
                logits, targets = self.setup.forward(model, piece)
                if self.job.loss is None and serves_mean(logits, targets):
                    of_all = None if ranks.size == 1 else self._total
                    value, gradient = mean_gradient(logits, targets, term.weight * ranks.averaging, of_all)
                    torch.autograd.backward(logits, gradient)
                    return self._total(value / ranks.averaging)
                found = counting_losses(self.job.loss, logits, targets)
            values, weights = found[0], found[1].detach().to(found[0])
            total = self._total(weights.sum()).clamp(min=torch.finfo(values.dtype).tiny)
            torch.autograd.backward(values, weights.clamp(min=0) * (term.weight * ranks.averaging / total))
        weighted = torch.where(weights > 0, values.detach() * weights, 0.0)
        return self._total(term.weight * weighted.sum() / total)

    def _total(self, value: Tensor) -> Tensor:
        """Sum over the ranks, which may have found it in different dtypes: one without samples knows none."""
        ranks = self.job.ranks
        return value if ranks.size == 1 else ranks.total(value.double())

    def _of_no_weight(self, piece: Batch) -> tuple[Tensor, Tensor]:
        logits = self.setup.forward(self.job.model, piece)[0]
        return logits.flatten(1).sum(1), logits.new_zeros(len(logits))

    def finish(self) -> dict[str, float]:
        if self.count == self._planned:
            self._advance(self.count)
        self.job.model.eval()
        for parameter in self.parameters:
            parameter.grad = None
        return {"tau_after": float(self.job.target(self.forward, 0).mean)}

    def settings(self, history: History) -> dict[str, Any]:
        return {
            **{f.name: getattr(self.method, f.name) for f in dataclasses.fields(self.method) if f.repr},  # type: ignore[arg-type]
            "steps": self.count,
            "stages": len(self.stages),
            "step_graph": self._step_graph,
            **self.setup.settings(),
        }

    def diagnose(self, history: History, measured: Mapping[str, float]) -> list[str]:
        return []

    def note(self, history: History) -> str:
        return f"loss {history.last('loss'):.3f}"

    def state_dict(self) -> dict[str, Any]:
        streams = {name: stream.state_dict() for name, stream in self._streams.items()}
        return {
            "optimizer": self._optimizer.state_dict(),
            "streams": self.job.ranks.objects(streams) if self.job.sharded else [streams],
            "count": self.count,
            "kept": [{name: tensor.clone() for name, tensor in stage.state.items()} for stage in self.stages],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]
        load_state(self._optimizer, self._own_options, state["optimizer"])
        for name, at in state["streams"][self.job.ranks.rank if self.job.sharded else 0].items():
            self._streams[name].load_state_dict(at)
        for stage, kept in zip(self.stages, state["kept"], strict=True):
            stage.state.clear()
            stage.state |= kept
