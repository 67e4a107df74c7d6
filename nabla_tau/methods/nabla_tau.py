"""nabla-tau itself (Trippa et al. 2024, arXiv 2403.14339) as a run of steps: a recipe's schedule around `Unlearner`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nabla_tau.batch import Forward, sample_count
from nabla_tau.history import History
from nabla_tau.job import FORGET, RETAIN, WEIGHTS, Done, Job
from nabla_tau.outcome import CAUSES
from nabla_tau.perturbation import shrink_and_perturb
from nabla_tau.recipes import Plan, Recipe, forget_batch_size, learning_rate_from_weights, make_plan
from nabla_tau.sources import derive_seed
from nabla_tau.unlearner import StepMetrics, Unlearner, trainable_parameters

COLUMNS = ("step", *StepMetrics._fields, "tau", "alpha", "learning_rate", "samples_per_second")  # of its history


class NablaTauSteps:
    """`Steps` of a recipe on a job."""

    def __init__(self, recipe: Recipe, job: Job) -> None:
        self.recipe, self.job = recipe, job
        data, counts = job.data, job.data.counts
        self.warnings: list[str] = []
        self._kind = data.kind
        if not recipe.match_classes and data.kind.kind != "random subset":
            self._kind = dataclasses.replace(data.kind, kind="random subset")
            self.warnings.append(
                f"the forget set is {data.kind.kind}, but recipe {recipe.name!r} takes tau from all held-out data"
            )
        forget_size = forget_batch_size(recipe, counts["forget"], counts["retain"])
        forget_size, retain_size = job.batch_sizes(forget_size, recipe.batch_size)
        self._forget_batches = job.batches_per_pass(data.forget, forget_size)
        self._retain_batches = job.batches_per_pass(data.retain, retain_size)
        learning_rate = recipe.learning_rate or learning_rate_from_weights(trainable_parameters(job.model))
        self.plan: Plan = make_plan(
            recipe,
            forget_batches=self._forget_batches,
            retain_batches=self._retain_batches,
            forget_count=counts["forget"],
            retain_count=counts["retain"],
            learning_rate=learning_rate,
        )
        self.count, self.refresh_every = self.plan.steps, self.plan.tau_every
        self.unlearner = Unlearner(
            job.model,
            alpha=self.plan.alpha(0),
            gate=recipe.gate,
            power=recipe.power,
            balance=recipe.balance,
            hold=recipe.hold,
            learning_rate=learning_rate,
            forward=job.forward,
            loss=job.loss,
            micro_batch_size=job.micro_batch_size,
            process_group=job.process_group,
            performance=job.performance,
        )
        if job.performance == "auto":
            self.unlearner.performance.look(next(iter(data.retain.sample(2, 2, job.seed))))
        self._forget = job.stream(data.forget, forget_size, FORGET)
        self._retain = job.stream(data.retain, retain_size, RETAIN)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.unlearner.parameters

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.unlearner.optimizer

    @property
    def forward(self) -> Forward:
        return self.unlearner.performance.forward_alone

    @property
    def _perturbs(self) -> bool:
        return self.recipe.shrink != 1 or self.recipe.noise != 0

    def begin(self) -> dict[str, float]:
        """Measure the model as it was given, which refuses held-out data that will not do, and only then change it."""
        measured = {"tau_before": float(self._measure_tau(0))}
        if self._perturbs:
            seed = derive_seed(self.job.seed, WEIGHTS)
            shrink_and_perturb(self.job.model, self.recipe.shrink, self.recipe.noise, seed)
        return measured

    def seek(self, step: int) -> None:
        """The schedule is a function of the step: there is nothing to do."""

    def refresh(self, step: int) -> None:
        if step or self._perturbs:  # else `begin` has measured these very weights
            self._measure_tau(step)

    def step(self, step: int) -> Done:
        plan = self.plan
        if plan.retain_restart is not None and step and step % plan.retain_restart == 0:
            self._retain.restart()
        alpha, learning_rate = plan.alpha(step), plan.learning_rate(step)
        self.unlearner.set_alpha(alpha)
        self.unlearner.set_learning_rate(learning_rate)
        forget, retain = self._forget.next(), self._retain.next()
        metrics = self.unlearner.step(forget, retain)._asdict() | {"tau": self.unlearner.tau.clone()}
        return Done(
            metrics, {"alpha": alpha, "learning_rate": learning_rate}, sample_count(forget) + sample_count(retain)
        )

    def _measure_tau(self, step: int) -> Tensor:
        target = self.job.target(self.forward, step, kind=self._kind, samples=self.recipe.tau_samples)
        self.unlearner.set_tau(target)
        return target.mean

    def finish(self) -> dict[str, float]:
        self.unlearner.optimizer.zero_grad(set_to_none=True)
        return {"tau_after": float(self._measure_tau(self.count))}

    def note(self, history: History) -> str:
        return f"forget loss {history.last('forget_loss'):.3f}, tau {history.last('tau'):.3f}"

    def settings(self, history: History) -> dict[str, Any]:
        plan, unlearner, opened = self.plan, self.unlearner, history.columns.get("gate_open")
        return {
            **dataclasses.asdict(self.recipe),
            "steps": plan.steps,
            "learning_rate": plan.learning_rate0,
            "learning_rate_from": "weights" if self.recipe.learning_rate is None else "recipe",
            "alpha_start": plan.alpha0,
            "forget_samples_per_step": -(-self.job.data.counts["forget"] // self._forget_batches),
            "forget_batches_per_pass": self._forget_batches,
            "retain_batches_per_pass": self._retain_batches,
            "tau_every_steps": plan.tau_every,
            "gate_open_fraction": sum(opened) / len(opened) if opened else None,
            "forwards": unlearner.forwards,
            "step_graph": unlearner.step_graph,
            **unlearner.performance.settings(),
            "micro_batch_size": unlearner.micro_batch_size,
            "ascents_saved": unlearner.ascents_saved,
        }

    def diagnose(self, history: History, measured: Mapping[str, float]) -> list[str]:
        return diagnose(history, measured, self.recipe)

    def state_dict(self) -> dict[str, Any]:
        streams = {"forget": self._forget.state_dict(), "retain": self._retain.state_dict()}
        return {
            **self.unlearner.state_dict(),
            # Where the data is sharded each rank stands elsewhere.
            "streams": self.job.ranks.objects(streams) if self.job.sharded else [streams],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.unlearner.load_state_dict(state)
        streams = state["streams"][self.job.ranks.rank if self.job.sharded else 0]
        self._forget.load_state_dict(streams["forget"])
        self._retain.load_state_dict(streams["retain"])


def diagnose(history: History, measured: Mapping[str, float], recipe: Recipe) -> list[str]:
    """Warnings with their likely cause. measured: mean held-out loss (tau) and mean forget loss, before and after."""
    columns = history.columns
    opened, found = columns.get("gate_open"), list[str]()
    if not opened or max(columns["alpha"]) == 0:
        return found
    never_opened = recipe.gate != "two_sided" and max(opened) == 0
    if never_opened and recipe.shrink == 1:
        found.append(f"the gate never opened. {CAUSES}")
    tau, forget = measured["tau_after"], measured["forget_loss_after"]
    tail = opened[-max(1, len(opened) // 4) :]
    if not never_opened and sum(tail) / len(tail) > 0.5 and forget < 0.7 * tau:
        found.append(
            f"the gate never closed: after unlearning the mean forget loss is {forget:.3g}, still well below that of "
            f"held-out data, {tau:.3g}. Likely causes: too few steps, a learning rate or alpha too small for this "
            "model, or held-out data that is harder than the forget data"
        )
    return found
