"""A run of a method's steps: checkpoints, history, progress and the last good weights around them."""

from __future__ import annotations

import copy
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nabla_tau import fingerprint, outcome
from nabla_tau._library import row_provider
from nabla_tau.checkpoint import Checkpoints
from nabla_tau.distributed import local_tensor, unwrapped
from nabla_tau.evaluation import device_of
from nabla_tau.history import History, Log
from nabla_tau.job import Job
from nabla_tau.methods import NABLA_TAU, steps_of
from nabla_tau.methods.stages import Method
from nabla_tau.progress import progress_bar
from nabla_tau.provenance import hardware
from nabla_tau.recipes import Recipe
from nabla_tau.result import NonFiniteLossError, UnlearnResult
from nabla_tau.run_files import exists, load_parts, load_run, save_run

logger = logging.getLogger("nabla_tau")

FLUSH_EVERY = 50  # steps between two reads of the device, at most


@dataclass
class Attempt:
    """A run before this one that did not do: why, and what it took."""

    reason: str = ""
    steps: int = 0
    seconds: float = 0.0


class Run:
    """State of one run: everything that a checkpoint holds, and nothing that the result does not need."""

    def __init__(self, job: Job, method: Method | Recipe, log: Log | None, attempt: Attempt | None = None) -> None:
        self.job, self.method, self.attempt = job, method, attempt or Attempt()
        self.history = History(self._after_attempt(log) if log is not None and job.ranks.rank == 0 else None)
        self.model, self.ranks = job.model, job.ranks
        self.started = time.perf_counter()  # what a method looks at first is a part of what it takes
        self.steps = steps_of(method, job)
        self.warnings = [*job.data.warnings, *self.steps.warnings]
        self.planned = self.steps.count
        self.step = 0
        self.seconds = 0.0
        self.measured: dict[str, float] = {}
        self.checkpoints: Checkpoints | None = None

    def _after_attempt(self, log: Log) -> Log:
        return lambda values, step: log(values, self.attempt.steps + step)

    def execute(
        self, path: Path | None, checkpoint_every: int | None, progress: bool, *, resume: bool
    ) -> UnlearnResult:
        steps, good = self.steps, self._snapshot()
        resumed = path is not None and resume and exists(path, self.ranks)
        if path is not None and resumed:
            self.load_state_dict(load_run(path, device_of(self.model), self.ranks), path)
            good = self._snapshot()
            self.started -= self.seconds
            logger.info("resumed from %s at step %d of %d", path, self.step, steps.count)
        else:
            self.measured = outcome.measure(self.job, steps.forward, "before") | steps.begin()
            logger.info("before unlearning: %s", self.measured)
        self.checkpoints = None if path is None else Checkpoints(path, self.step if resumed else None)
        every = checkpoint_every or steps.refresh_every
        with progress_bar(f"unlearning ({self.method.name})", steps.count, enabled=progress) as update:
            while self.step < steps.count:
                self._one_step()
                done = self.step == steps.count
                at_checkpoint = self.checkpoints is not None and (self.step % every == 0 or done)
                if at_checkpoint or done or self.step % steps.refresh_every == 0 or self.step % FLUSH_EVERY == 0:
                    self._flush(good)
                    good = self._snapshot()
                    update(self.step, steps.note(self.history))
                if at_checkpoint and self.checkpoints is not None:
                    self.seconds = time.perf_counter() - self.started
                    self.checkpoints.save(self.step, self._write)
        self.measured |= steps.finish()
        self.measured |= outcome.measure(self.job, steps.forward, "after")
        self.warnings += [*steps.diagnose(self.history, self.measured), *outcome.diagnose(self.measured)]
        logger.info("unlearned in %d steps: %s", self.step, self.measured)
        return self._result()

    def _write(self, path: Path) -> None:
        save_run(path, self.state_dict(), self.model, self.steps.optimizer, self.ranks)

    def _one_step(self) -> None:
        if self.step % self.steps.refresh_every == 0:
            self.steps.refresh(self.step)
            self.history.restart_clock()
        self.job.looks.clear()
        metrics, known, samples = self.steps.step(self.step)
        self.history.record(self.step, metrics, known, samples * (1 if self.job.sharded else self.ranks.size))
        self.step += 1

    def _snapshot(self) -> dict[str, Any]:
        return {
            name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in self.model.state_dict().items()
        }

    def _flush(self, good: dict[str, Any]) -> None:
        """Read the recorded steps; where a metric or a weight is no longer finite, go back to `good` and stop."""
        broken = self.history.flush()
        if broken is None:
            local = [local_tensor(p) for p in self.steps.parameters]
            if self.ranks.all(bool(torch.stack(torch._foreach_norm(local)).isfinite().all())):
                return
            broken = self.step - 1
        self.model.load_state_dict(good)
        columns = self.history.columns
        losses = [name for name in ("forget_loss", "retain_loss", "loss", "tau") if name in columns]
        at = {name.replace("_", " "): columns[name][broken] for name in losses}
        cause = "a gradient" if all(map(math.isfinite, at.values())) else "a loss"
        self.history.drop_after(broken)
        message = (
            f"{cause} became non-finite in step {broken} of {self.steps.count} "
            f"({', '.join(f'{name} {value}' for name, value in at.items())}); stopped, and error.result.model has the "
            "last good weights. Look for non-finite inputs, or use a recipe with a lower learning_rate"
        )
        raise NonFiniteLossError(message, broken, self._result())

    def _result(self) -> UnlearnResult:
        data, parameters = self.job.data, self.steps.parameters
        settings = self.steps.settings(self.history) | {
            "task": data.task or "loss function of the caller",
            "forget_kind": data.kind.kind,
            "data": data.places,
            "processes": self.ranks.size,
            "parallel": self.ranks.parallel,
            "optimizer": type(self.steps.optimizer).__name__,
            "trainable_parameters": sum(p.numel() for p in parameters),
            "row_kernel": "loss function of the caller" if data.task is None else row_provider(parameters[0]),
            "device": str(parameters[0].device),
            "dtype": str(parameters[0].dtype),
            "threads": torch.get_num_threads(),
            "seed": self.job.seed,
        }
        return UnlearnResult(
            model=self.model,
            method=NABLA_TAU if isinstance(self.method, Recipe) else self.method.name,
            recipe=self.method.name,
            settings=settings | self.measured | ({"attempt": asdict(self.attempt)} if self.attempt.reason else {}),
            history=self.history.state_dict(),
            warnings=[
                *filter(None, [self.attempt.reason]),
                *self.warnings,
                *(self.checkpoints.warnings if self.checkpoints else []),
            ],
            seconds=self.attempt.seconds + time.perf_counter() - self.started,
            counts=data.counts,
            removed_classes=data.kind.removed,
            fingerprints=data.fingerprints,
            unlearned_fingerprint=fingerprint.of_model(self.model),
            hardware=hardware(parameters[0].device),
        )

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to belong to this run."""
        job = self.job
        own: dict[str, Any] = {"ranks": self.ranks.size} if job.sharded else {}
        own |= {"method": repr(self.method), "seed": job.seed, "steps": self.planned}
        return own | {"performance": job.performance} | job.data.fingerprints

    def state_dict(self) -> dict[str, Any]:
        return {
            "identity": self._identity(),
            "step": self.step,
            "seconds": self.seconds,
            "measured": self.measured,
            "attempt": asdict(self.attempt),
            "model": unwrapped(self.model).state_dict(),
            "steps": self.steps.state_dict(),
            "history": self.history.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        mine, theirs = self._identity(), state["identity"]
        different = [key for key in mine if theirs.get(key) != mine[key]]
        if different:
            said = "; ".join(f"{key}: {theirs.get(key)} there, {mine[key]} here" for key in different)
            raise ValueError(f"checkpoint {path} is of another run ({said})")
        self.step, self.seconds = state["step"], state["seconds"]
        self.job.looks.clear()
        self.steps.seek(self.step)
        if "parts" in state:
            load_parts(path, state, self.model, self.steps.optimizer, self.ranks)
            state["steps"]["optimizer"] = self.steps.optimizer.state_dict()
        else:
            unwrapped(self.model).load_state_dict(state["model"])
        self.steps.load_state_dict(state["steps"])
        self.history.load_state_dict(state["history"])
        self.measured = dict(state["measured"])
        self.attempt = Attempt(**state["attempt"])
        torch.set_rng_state(state["rng"].cpu())
