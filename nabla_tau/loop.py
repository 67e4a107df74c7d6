"""`unlearn`: data, schedule, checkpoints and history around `Unlearner.step`."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nabla_tau._library import row_provider
from nabla_tau.batch import Forward, sample_count
from nabla_tau.checkpoint import Checkpoints
from nabla_tau.classes import measure_target
from nabla_tau.distributed import WHOLE, ProcessGroup, can_be_copied, local_tensor, ranks_of, unwrapped
from nabla_tau.evaluation import SampleLoss, device_of, evaluation_mode, mean_loss
from nabla_tau.history import History, Log, diagnose
from nabla_tau.perturbation import shrink_and_perturb
from nabla_tau.preparation import Prepared, prepare
from nabla_tau.progress import progress_bar
from nabla_tau.recipes import RECIPES, Plan, Recipe, forget_batch_size, learning_rate_from_weights, make_plan
from nabla_tau.result import NonFiniteLossError, UnlearnResult
from nabla_tau.run_files import check_writable, exists, load_parts, load_run, save_run
from nabla_tau.sources import Stream, derive_seed
from nabla_tau.unlearner import Unlearner, trainable_parameters

logger = logging.getLogger("nabla_tau")

FLUSH_EVERY = 50  # steps between two reads of the device, at most
LOOK_AT = 500  # forget samples that their mean loss before and after is taken over
FORGET, RETAIN, HELD_OUT, SHRINK, GLOBAL = range(5)  # what a derived seed is for


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
    micro_batch_size: int | None = None,
    process_group: ProcessGroup | Literal["auto"] | None = "auto",
    data_is_sharded: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    log: Log | None = None,
    progress: bool = False,
    performance: Literal["auto", "off"] = "auto",
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
    the global random state are as before afterwards. seed fixes the data order and the noise. micro_batch_size: samples
    that go through the model at once, on each process; it changes the memory that a step takes, not the step.
    checkpoint: file written atomically every `checkpoint_every` steps (default: as often as tau is measured);
    resume=True goes on from it where it exists, and gives the very weights that an uninterrupted run gives (on the CPU;
    a data set whose own random state, or that of persistent workers, goes on from pass to pass cannot be resumed). A
    checkpoint that cannot be written (a full disk) does not end the run: the last good one stays, the "nabla_tau"
    logger warns at once, the next one is tried, and the result's warnings say how many were lost. log: called as
    log(values, step) for every step, some steps late. progress: a bar on a terminal. performance: "auto" runs the model
    in a faster form, the same but for rounding (`nabla_tau.performance`), "off" as it is.

    Several processes (torchrun): every rank calls this with the same arguments and the whole data, and works on its
    share of every batch, so that their number changes the speed and nothing else (but for the numbers that random
    transforms of a Dataset draw). The model is in DistributedDataParallel, or fully_shard was applied to it (which
    cannot be copied: inplace=True), or it is a plain model, the same on all ranks of `process_group` (see `Unlearner`).
    data_is_sharded=True: each rank gives samples of its own instead (or DataLoaders with a DistributedSampler); the
    recipe's batch sizes are those of all ranks together. tau, gate, history and result are those of all ranks. Bars,
    warnings and `log` come from rank 0, which also writes the checkpoint; of a sharded model it is a folder, which all
    ranks write with torch.distributed.checkpoint. Any number of ranks may resume it, unless the data is sharded.

    Raises TypeError and ValueError for data, labels, settings or a checkpoint that do not fit or are damaged, and
    OSError for a checkpoint that cannot be read or where none can be written, before anything is changed;
    NonFiniteLossError, with the last good weights, when a loss becomes nan or infinite.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)} or a Recipe, got {recipe!r}")
        recipe = RECIPES[recipe]
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1 step, got {checkpoint_every}")
    path = None if checkpoint is None else Path(checkpoint)
    ranks = ranks_of(model, process_group)
    if path is not None and not resume and not ranks.all(not path.exists()):
        raise ValueError(f"checkpoint {path} exists: pass resume=True to go on from it, or remove it")
    if not inplace and not can_be_copied(model):
        raise ValueError(
            "a model to which fully_shard was applied, or in DistributedDataParallel on a group of some processes, "
            "cannot be copied: pass inplace=True"
        )
    if path is not None:
        check_writable(path, ranks)
    with torch.enable_grad(), torch.random.fork_rng(devices=_cuda_devices(device_of(model))):
        torch.manual_seed(derive_seed(seed, GLOBAL))
        data = prepare(
            model,
            forget=forget,
            retain=retain,
            held_out=held_out,
            forward=forward,
            loss=loss,
            retain_is_unseen=retain_is_unseen,
            seed=seed,
            ranks=ranks,
            sharded=data_is_sharded,
        )
        if not inplace:
            model = copy.deepcopy(model)
        with evaluation_mode(model):
            own = {"micro_batch_size": micro_batch_size, "process_group": process_group, "performance": performance}
            history = History(log if ranks.rank == 0 else None)
            run = _Run(model, data, recipe, forward, loss, seed, history, data_is_sharded, own)
            result = run.execute(path, checkpoint_every, progress and ranks.rank == 0)
    for message in result.warnings if ranks.rank == 0 else ():
        warnings.warn(message, stacklevel=2)
    return result


def _cuda_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


class _Run:
    """State of one run: everything that a checkpoint holds, and nothing that the result does not need."""

    def __init__(
        self,
        model: nn.Module,
        data: Prepared,
        recipe: Recipe,
        forward: Forward | None,
        loss: SampleLoss | None,
        seed: int,
        history: History,
        sharded: bool,
        own: dict[str, Any],
    ) -> None:
        self.model, self.data, self.recipe = model, data, recipe
        self.loss, self.seed, self.history = loss, seed, history
        self.warnings = list(data.warnings)
        self.target_kind = data.kind
        if not recipe.match_classes:
            self.target_kind = dataclasses.replace(data.kind, kind="random subset")
            if data.kind.kind != "random subset":
                text = (
                    f"the forget set is {data.kind.kind}, but recipe {recipe.name!r} takes tau from all held-out data"
                )
                self.warnings.append(text)
        counts, size = data.counts, recipe.batch_size
        forget_size = forget_batch_size(recipe, counts["forget"], counts["retain"])
        learning_rate = recipe.learning_rate or learning_rate_from_weights(trainable_parameters(model))
        self.ranks, self.sharded = ranks_of(model, own["process_group"]), sharded
        share = WHOLE if sharded else self.ranks.share
        if sharded:  # what a rank's own samples give to a batch of all
            forget_size, size = (-(-n // self.ranks.size) for n in (forget_size, size))
        passes = data.forget.batches_per_pass(forget_size), data.retain.batches_per_pass(size)
        # A rank whose samples are used up begins its next pass while the others finish theirs.
        self.forget_batches, self.retain_batches = map(max, zip(*self.ranks.numbers(*passes), strict=True))
        self.plan: Plan = make_plan(
            recipe,
            forget_batches=self.forget_batches,
            retain_batches=self.retain_batches,
            forget_count=counts["forget"],
            retain_count=counts["retain"],
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
            **own,
        )
        if self.unlearner.performance.mode == "auto":
            self.unlearner.performance.look(next(iter(data.retain.sample(2, 2, seed))))
        self.forward = self.unlearner.performance.forward_alone
        self.forget_stream = Stream(data.forget, forget_size, seed, FORGET, share)
        self.retain_stream = Stream(data.retain, size, seed, RETAIN, share)
        self.step = 0
        self.seconds = 0.0
        self.measured: dict[str, float] = {}
        self.checkpoints: Checkpoints | None = None

    def execute(self, path: Path | None, checkpoint_every: int | None, progress: bool) -> UnlearnResult:
        started = time.perf_counter()
        good = self._snapshot()
        resumed = path is not None and exists(path, self.ranks)
        if path is not None and resumed:
            self.load_state_dict(load_run(path, self.unlearner.device, self.ranks), path)
            good = self._snapshot()
            started -= self.seconds
            logger.info("resumed from %s at step %d of %d", path, self.step, self.plan.steps)
        else:
            self._begin()
        self.checkpoints = None if path is None else Checkpoints(path, self.step if resumed else None)
        every = checkpoint_every or self.plan.tau_every
        with progress_bar(f"unlearning ({self.recipe.name})", self.plan.steps, enabled=progress) as update:
            while self.step < self.plan.steps:
                self._one_step()
                done = self.step == self.plan.steps
                at_checkpoint = self.checkpoints is not None and (self.step % every == 0 or done)
                if at_checkpoint or done or self.step % self.plan.tau_every == 0 or self.step % FLUSH_EVERY == 0:
                    self._flush(good, started)
                    good = self._snapshot()
                    note = f"forget loss {self.history.last('forget_loss'):.3f}, tau {self.history.last('tau'):.3f}"
                    update(self.step, note)
                if at_checkpoint and self.checkpoints is not None:
                    self.seconds = time.perf_counter() - started
                    self.checkpoints.save(self.step, self._write)
        self.unlearner.optimizer.zero_grad(set_to_none=True)
        self.measured |= {"tau_after": float(self._measure_tau()), "forget_loss_after": self._forget_loss()}
        self.warnings += diagnose(self.history, self.measured, self.recipe)
        logger.info("unlearned in %d steps: %s", self.step, self.measured)
        return self._result(time.perf_counter() - started)

    def _write(self, path: Path) -> None:
        save_run(path, self.state_dict(), self.model, self.unlearner.optimizer, self.ranks)

    def _begin(self) -> None:
        """Measure the model as it was given, which refuses held-out data that will not do, and only then change it."""
        self.measured = {"tau_before": float(self._measure_tau()), "forget_loss_before": self._forget_loss()}
        logger.info("before unlearning: %s", self.measured)
        if self._perturbs:
            seed = derive_seed(self.seed, SHRINK)
            shrink_and_perturb(self.model, self.recipe.shrink, self.recipe.noise, seed)

    @property
    def _perturbs(self) -> bool:
        return self.recipe.shrink != 1 or self.recipe.noise != 0

    def _forget_loss(self) -> float:
        seed, samples = derive_seed(self.seed, FORGET), LOOK_AT
        if self.sharded:
            samples = -(-LOOK_AT // self.ranks.size)
        return mean_loss(
            self.model,
            lambda share: self.data.forget.sample(samples, 250, seed, share),
            forward=self.forward,
            loss=self.loss,
            ranks=self.ranks,
            sharded=self.sharded,
        )

    def _one_step(self) -> None:
        plan, step = self.plan, self.step
        if step % plan.tau_every == 0:
            if step or self._perturbs:  # else `_begin` has measured these very weights
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
            samples=(sample_count(forget) + sample_count(retain)) * (1 if self.sharded else self.ranks.size),
        )
        self.step += 1

    def _measure_tau(self) -> Tensor:
        counts = self.data.counts
        target = measure_target(
            self.model,
            self.data.held_out,
            self.target_kind,
            batch_size=250,
            forward=self.forward,
            loss=self.loss,
            samples=self.recipe.tau_samples,
            seed=derive_seed(self.seed, HELD_OUT, self.step),
            # A probability below 1/n^2 is nothing that n samples can teach.
            absent_limit=2 * math.log(counts["forget"] + counts["retain"]),
            ranks=self.ranks,
            sharded=self.sharded,
        )
        self.unlearner.set_tau(target)
        return target.mean

    def _snapshot(self) -> dict[str, Any]:
        return {
            name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in self.model.state_dict().items()
        }

    def _flush(self, good: dict[str, Any], started: float) -> None:
        """Read the recorded steps; where a loss or a weight is no longer finite, go back to `good` and stop."""
        broken = self.history.flush()
        if broken is None:
            local = [local_tensor(p) for p in self.unlearner.parameters]
            if self.ranks.all(bool(torch.stack(torch._foreach_norm(local)).isfinite().all())):
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
        data, plan, unlearner = self.data, self.plan, self.unlearner
        settings = dataclasses.asdict(self.recipe)
        parameter = unlearner.parameters[0]
        settings |= {
            "steps": plan.steps,
            "learning_rate": plan.learning_rate0,
            "learning_rate_from": "weights" if self.recipe.learning_rate is None else "recipe",
            "alpha_start": plan.alpha0,
            "task": data.task or "loss function of the caller",
            "forget_kind": data.kind.kind,
            "forget_samples_per_step": -(-data.counts["forget"] // self.forget_batches),
            "forget_batches_per_pass": self.forget_batches,
            "retain_batches_per_pass": self.retain_batches,
            "tau_every_steps": plan.tau_every,
            "gate_open_fraction": _mean(self.history.columns["gate_open"]),
            "forwards": unlearner.forwards,
            **unlearner.performance.settings(),
            "micro_batch_size": unlearner.micro_batch_size,
            "ascents_saved": unlearner.ascents_saved,
            "processes": self.ranks.size,
            "parallel": self.ranks.parallel,
            "optimizer": type(unlearner.optimizer).__name__,
            "trainable_parameters": sum(p.numel() for p in unlearner.parameters),
            "row_kernel": "loss function of the caller" if data.task is None else row_provider(parameter),
            "device": str(parameter.device),
            "dtype": str(parameter.dtype),
            "threads": torch.get_num_threads(),
            "seed": self.seed,
        } | self.measured
        return UnlearnResult(
            model=self.model,
            recipe=self.recipe.name,
            settings=settings,
            history=self.history.state_dict(),
            warnings=[*self.warnings, *(self.checkpoints.warnings if self.checkpoints else [])],
            seconds=seconds,
            counts=data.counts,
            removed_classes=data.kind.removed,
            fingerprints=data.fingerprints,
        )

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to belong to this run."""
        own: dict[str, Any] = {"ranks": self.ranks.size} if self.sharded else {}
        own |= {"recipe": repr(self.recipe), "seed": self.seed, "steps": self.plan.steps}
        return own | {"performance": self.unlearner.performance.mode} | self.data.fingerprints

    def state_dict(self) -> dict[str, Any]:
        streams = {"forget": self.forget_stream.state_dict(), "retain": self.retain_stream.state_dict()}
        return {
            "identity": self._identity(),
            "step": self.step,
            "seconds": self.seconds,
            "measured": self.measured,
            "model": unwrapped(self.model).state_dict(),
            "unlearner": self.unlearner.state_dict(),
            # Where the data is sharded each rank stands elsewhere.
            "streams": self.ranks.objects(streams) if self.sharded else [streams],
            "history": self.history.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        mine, theirs = self._identity(), state["identity"]
        different = [key for key in mine if theirs.get(key) != mine[key]]
        if different:
            said = "; ".join(f"{key}: {theirs.get(key)} there, {mine[key]} here" for key in different)
            raise ValueError(f"checkpoint {path} is of another run ({said})")
        if "parts" in state:
            load_parts(path, state, self.model, self.unlearner.optimizer, self.ranks)
            state["unlearner"]["optimizer"] = self.unlearner.optimizer.state_dict()
        else:
            unwrapped(self.model).load_state_dict(state["model"])
        self.unlearner.load_state_dict(state["unlearner"])
        streams = state["streams"][self.ranks.rank if self.sharded else 0]
        self.forget_stream.load_state_dict(streams["forget"])
        self.retain_stream.load_state_dict(streams["retain"])
        self.history.load_state_dict(state["history"])
        self.measured = dict(state["measured"])
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["rng"].cpu())


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
