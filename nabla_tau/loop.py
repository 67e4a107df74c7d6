"""`unlearn`: data, schedule, checkpoints and history around `Unlearner.step`."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nabla_tau.batch import Batch, Forward, tensors_of
from nabla_tau.checkpoint import load_checkpoint, save_checkpoint
from nabla_tau.classes import ForgetKindReport, forget_kind, measure_target
from nabla_tau.evaluation import SampleLoss, device_of, evaluation_mode, forward_batches
from nabla_tau.functional import check_labels, infer_task, row_provider
from nabla_tau.history import History, Log, diagnose
from nabla_tau.progress import progress_bar
from nabla_tau.recipes import RECIPES, Plan, Recipe, forget_batch_size, learning_rate_from_weights, make_plan
from nabla_tau.sources import Source, Stream, as_source, count_shared, derive_seed, split_held_out
from nabla_tau.unlearner import Unlearner, trainable_parameters

logger = logging.getLogger("nabla_tau")

FLUSH_EVERY = 50  # steps between two reads of the device, at most
FORGET, RETAIN, HELD_OUT, SHRINK, GLOBAL = range(5)  # what a derived seed is for


@dataclass(frozen=True)
class UnlearnResult:
    """What `unlearn` did. model: the unlearned model (a copy unless inplace). settings: every value that was resolved.
    history: one list a column (`nabla_tau.history.COLUMNS`), one entry a step. warnings: what to look at."""

    model: nn.Module
    recipe: str
    settings: dict[str, Any]
    history: dict[str, list[float]]
    warnings: list[str]
    seconds: float
    counts: dict[str, int]
    removed_classes: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as JSON takes it: the `record` that `audit` puts into its report."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "model"}
        return fields | {"removed_classes": list(self.removed_classes)}


class NonFiniteLossError(RuntimeError):
    """A loss became nan or infinite. `step` is the first such step; `result` holds the last good weights."""

    def __init__(self, message: str, step: int, result: UnlearnResult) -> None:
        super().__init__(message)
        self.step = step
        self.result = result


def unlearn(
    model: nn.Module,
    *,
    forget: Any,
    retain: Any,
    held_out: Any,
    recipe: str | Recipe = "default",
    forward: Forward | None = None,
    loss: SampleLoss | None = None,
    retain_is_unseen: bool = False,
    seed: int = 0,
    inplace: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    log: Log | None = None,
    progress: bool = False,
) -> UnlearnResult:
    """Remove the influence of `forget` from a trained model, keeping what `retain` taught it.

        result = unlearn(model, forget=(x_f, y_f), retain=(x_r, y_r), held_out=(x_v, y_v)); result.model

    forget, retain, held_out: tensors `(inputs, ..., targets)` or a mapping of them with "labels", map-style Datasets,
    or DataLoaders. held_out must never have been trained on: its loss is what the forget loss is brought to. A number
    in (0, 1) takes that share of `retain` instead, and only with retain_is_unseen=True, which states that the model
    was never trained on `retain`. recipe: "default", "paper" (the published settings, arXiv 2403.14339) or a
    `nabla_tau.recipes.Recipe`. forward: (model, batch) -> (logits, targets), where the model is not simply called on
    the inputs. loss: (logits, targets) -> per-sample losses [B], for anything but classification.

    The model runs in eval mode (norm statistics frozen, dropout off). It is copied unless inplace=True; its modes and
    the global random state are as before afterwards. seed fixes the data order and the noise. checkpoint: file
    written atomically every `checkpoint_every` steps (default: as often as tau is measured); resume=True goes on from
    it where it exists, and gives the very weights that an uninterrupted run gives (CPU). log: called as
    log(values, step) for every step, some steps late. progress: a bar on a terminal.

    Raises TypeError and ValueError for data, labels or settings that do not fit, before anything is changed;
    NonFiniteLossError, with the last good weights, when a loss becomes nan or infinite.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)} or a Recipe, got {recipe!r}")
        recipe = RECIPES[recipe]
    found: list[str] = []
    forget_source, retain_source = as_source(forget, "forget"), as_source(retain, "retain")
    if held_out is None:
        raise ValueError(
            "held_out is None: tau is the loss of data the model was never trained on, so it cannot be estimated "
            "without. If the model was never trained on retain, pass held_out=0.2 and retain_is_unseen=True"
        )
    if isinstance(held_out, float):
        if not retain_is_unseen:
            raise ValueError(
                f"held_out={held_out} takes a share of retain, which gives a tau only if the model was never trained "
                "on retain: say so with retain_is_unseen=True, or give held-out data"
            )
        retain_source, held_out_source = split_held_out(retain_source, held_out, seed)
    else:
        held_out_source = as_source(held_out, "held_out")
    shared = count_shared(forget, retain)
    if shared:
        found.append(f"{shared} of {forget_source.count} forget samples are in the retain set too, which teaches them")
    if checkpoint is not None and Path(checkpoint).exists() and not resume:
        raise ValueError(f"checkpoint {checkpoint} exists: pass resume=True to go on from it, or remove it")

    kind = forget_kind(forget_source.targets(), retain_source.targets())
    if loss is None:
        _check_labels(model, (forget_source, retain_source, held_out_source), forward)
    if recipe.match_classes is False:
        if kind.kind != "random subset":
            found.append(f"the forget set is {kind.kind}, but recipe {recipe.name!r} takes tau from all held-out data")
        kind = dataclasses.replace(kind, kind="random subset")
    if not inplace:
        model = copy.deepcopy(model)
    sources = {"forget": forget_source, "retain": retain_source, "held_out": held_out_source}
    run = _Run(model, sources, recipe, kind, forward, loss, seed, found)
    with evaluation_mode(model), torch.random.fork_rng(devices=_cuda_devices(device_of(model))):
        torch.manual_seed(derive_seed(seed, GLOBAL))
        path = None if checkpoint is None else Path(checkpoint)
        return run.execute(path, checkpoint_every, History(log), progress)


def _check_labels(model: nn.Module, sources: tuple[Source, ...], forward: Forward | None) -> None:
    """Look at every label once, before anything is changed: in a step on a GPU nobody does."""
    logits, targets = next(forward_batches(model, sources[0], 2, forward))
    if infer_task(logits, targets) == "classification":
        for source in sources:
            check_labels(source.targets(), logits.shape[1])


def _cuda_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


def shrink_and_perturb(parameters: list[nn.Parameter], shrink: float, noise: float, seed: int) -> None:
    """w <- shrink * w + noise * std(w) * N(0, 1) for every tensor of two or more dimensions (Ash and Adams 2020,
    arXiv 1910.08475): makes room for another solution without leaving the old one. Same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.ndim > 1 and parameter.numel() > 1:
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
                parameter.copy_(shrink * parameter + noise * parameter.std() * draw)


class _Run:
    """State of one run: everything that a checkpoint holds, and nothing that the result does not need."""

    def __init__(
        self,
        model: nn.Module,
        sources: dict[str, Source],
        recipe: Recipe,
        kind: ForgetKindReport,
        forward: Forward | None,
        loss: SampleLoss | None,
        seed: int,
        found: list[str],
    ) -> None:
        self.model, self.sources, self.recipe, self.kind = model, sources, recipe, kind
        self.forward, self.loss, self.seed, self.warnings = forward, loss, seed, found
        forget, retain = sources["forget"], sources["retain"]
        size, forget_size = recipe.batch_size, forget_batch_size(recipe, forget.count, retain.count)
        trainable = trainable_parameters(model)
        learning_rate = recipe.learning_rate or learning_rate_from_weights(trainable)
        self.plan: Plan = make_plan(
            recipe,
            forget_batches=forget.batches_per_pass(forget_size),
            retain_batches=retain.batches_per_pass(size),
            forget_count=forget.count,
            retain_count=retain.count,
            learning_rate=learning_rate,
        )
        self.unlearner = Unlearner(
            model,
            alpha=self.plan.alpha(0),
            gate=recipe.gate,
            power=recipe.power,
            balance=recipe.balance,
            hold=recipe.hold,
            learning_rate=learning_rate,
            forward=forward,
            loss=loss,
        )
        self.forget_stream = Stream(forget, forget_size, seed, FORGET)
        self.retain_stream = Stream(retain, size, seed, RETAIN)
        self.step = 0
        self.seconds = 0.0
        self.tau_history: list[float] = []

    def execute(
        self, path: Path | None, checkpoint_every: int | None, history: History, progress: bool
    ) -> UnlearnResult:
        self.history = history
        started = time.perf_counter()
        if path is not None and path.exists():
            self.load_state_dict(load_checkpoint(path, self.unlearner.device), path)
            started -= self.seconds
            logger.info("resumed from %s at step %d of %d", path, self.step, self.plan.steps)
        elif self.recipe.shrink != 1 or self.recipe.noise != 0:
            seed = derive_seed(self.seed, SHRINK)
            shrink_and_perturb(self.unlearner.parameters, self.recipe.shrink, self.recipe.noise, seed)
        every = checkpoint_every or self.plan.tau_every
        good = self._snapshot()
        with progress_bar(f"unlearning ({self.recipe.name})", self.plan.steps, enabled=progress) as update:
            while self.step < self.plan.steps:
                self._one_step()
                at_measure = self.step % self.plan.tau_every == 0
                at_checkpoint = path is not None and (self.step % every == 0 or self.step == self.plan.steps)
                if at_measure or at_checkpoint or self.step % FLUSH_EVERY == 0 or self.step == self.plan.steps:
                    self._flush(good, started)
                    good = self._snapshot()
                    note = f"forget loss {history.last('forget_loss'):.3f}, tau {history.last('tau'):.3f}"
                    update(self.step, note)
                if at_checkpoint and path is not None:
                    self.seconds = time.perf_counter() - started
                    save_checkpoint(path, self.state_dict())
        self._measure_tau()
        if not math.isfinite(self.tau_history[-1]):
            self.warnings.append(f"the mean held-out loss after the last step is {self.tau_history[-1]}")
        self.warnings += diagnose(history, self.recipe.gate)
        for message in self.warnings:
            warnings.warn(message, stacklevel=3)
        return self._result(time.perf_counter() - started)

    def _one_step(self) -> None:
        plan, step = self.plan, self.step
        if step % plan.tau_every == 0:
            self._measure_tau()
            self.history.restart_clock()
        if plan.retain_restart is not None and step and step % plan.retain_restart == 0:
            self.retain_stream.restart()
        alpha, learning_rate = plan.alpha(step), plan.learning_rate(step)
        self.unlearner.set_alpha(alpha)
        self.unlearner.set_learning_rate(learning_rate)
        forget, retain = self.forget_stream.next(), self.retain_stream.next()
        metrics = self.unlearner.step(forget, retain)
        self.history.record(
            step,
            metrics,
            self.unlearner.tau.clone(),
            alpha=alpha,
            learning_rate=learning_rate,
            samples=_size(forget) + _size(retain),
        )
        self.step += 1

    def _measure_tau(self) -> None:
        target = measure_target(
            self.model,
            self.sources["held_out"],
            self.kind,
            batch_size=250,
            forward=self.forward,
            loss=self.loss,
            samples=self.recipe.tau_samples,
            seed=derive_seed(self.seed, HELD_OUT, self.step),
            # A probability below 1/n^2 is nothing that n samples can teach.
            absent_limit=2 * math.log(self.sources["forget"].count + self.sources["retain"].count),
        )
        self.unlearner.set_tau(target)
        self.tau_history.append(float(target.mean))

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def _flush(self, good: dict[str, Tensor], started: float) -> None:
        """Read the recorded steps; where a loss or a weight is no longer finite, go back to `good` and stop."""
        broken = self.history.flush()
        if broken is None:
            norms = torch.stack(torch._foreach_norm([*self.unlearner.parameters]))
            if bool(norms.isfinite().all()):
                return
            broken = self.step - 1
        self.model.load_state_dict(good)
        at = {name: self.history.columns[name][broken] for name in ("forget_loss", "retain_loss", "tau")}
        cause = "a gradient" if all(map(math.isfinite, at.values())) else "a loss"
        self.history.drop_after(broken)
        message = (
            f"{cause} became non-finite in step {broken} of {self.plan.steps} (forget loss {at['forget_loss']}, retain "
            f"loss {at['retain_loss']}, tau {at['tau']}); stopped, and error.result.model has the last good weights. "
            "Look for non-finite inputs, or use a recipe with a lower learning_rate"
        )
        raise NonFiniteLossError(message, broken, self._result(time.perf_counter() - started))

    def _result(self, seconds: float) -> UnlearnResult:
        settings: dict[str, Any] = {
            field.name: getattr(self.recipe, field.name) for field in dataclasses.fields(Recipe)
        }
        parameter = self.unlearner.parameters[0]
        settings |= {
            "steps": self.plan.steps,
            "learning_rate": self.plan.learning_rate0,
            "learning_rate_from": "weights" if self.recipe.learning_rate is None else "recipe",
            "alpha_start": self.plan.alpha0,
            "forget_kind": self.kind.kind,
            "forget_batch_size": self.forget_stream.batch_size,
            "forget_batches_per_pass": self.sources["forget"].batches_per_pass(self.forget_stream.batch_size),
            "retain_batches_per_pass": self.sources["retain"].batches_per_pass(self.recipe.batch_size),
            "tau_every_steps": self.plan.tau_every,
            "tau_first": self.tau_history[0] if self.tau_history else None,
            "tau_last": self.tau_history[-1] if self.tau_history else None,
            "gate_open_fraction": _mean(self.history.columns["gate_open"]),
            "forwards": self.unlearner.forwards,
            "optimizer": type(self.unlearner.optimizer).__name__,
            "trainable_parameters": sum(p.numel() for p in self.unlearner.parameters),
            "row_kernel": row_provider(parameter),
            "device": str(parameter.device),
            "dtype": str(parameter.dtype),
            "threads": torch.get_num_threads(),
            "seed": self.seed,
        }
        return UnlearnResult(
            model=self.model,
            recipe=self.recipe.name,
            settings=settings,
            history=self.history.state_dict(),
            warnings=list(self.warnings),
            seconds=seconds,
            counts={name: source.count for name, source in self.sources.items()},
            removed_classes=self.kind.removed,
        )

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to belong to this run."""
        counts = {name: source.count for name, source in self.sources.items()}
        return {"recipe": repr(self.recipe), "seed": self.seed, "steps": self.plan.steps, "counts": counts}

    def state_dict(self) -> dict[str, Any]:
        return {
            "identity": self._identity(),
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "unlearner": self.unlearner.state_dict(),
            "forget_stream": self.forget_stream.state_dict(),
            "retain_stream": self.retain_stream.state_dict(),
            "history": self.history.state_dict(),
            "tau_history": self.tau_history,
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        mine, theirs = self._identity(), state["identity"]
        different = [
            f"{key}: {theirs.get(key)} there, {mine[key]} here" for key in mine if theirs.get(key) != mine[key]
        ]
        if different:
            raise ValueError(f"checkpoint {path} is of another run ({'; '.join(different)})")
        self.model.load_state_dict(state["model"])
        self.unlearner.load_state_dict(state["unlearner"])
        self.forget_stream.load_state_dict(state["forget_stream"])
        self.retain_stream.load_state_dict(state["retain_stream"])
        self.history.load_state_dict(state["history"])
        self.tau_history = list(state["tau_history"])
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["rng"].cpu())


def _size(batch: Batch) -> int:
    found = tensors_of(batch)
    return len(found[0]) if found and found[0].ndim else 1


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
