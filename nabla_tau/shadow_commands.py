"""`nabla-tau shadow train | score`: shadow models of a task, and what they say of the samples of one model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from nabla_tau.arguments import positive
from nabla_tau.batch import concatenate
from nabla_tau.checkpoint import sha256
from nabla_tau.columns import rows_of
from nabla_tau.evaluation import evaluate
from nabla_tau.loop import DEFAULT, unlearn
from nabla_tau.membership.audit_report import json_able
from nabla_tau.membership.bootstrap import bootstrap_auc
from nabla_tau.membership.scores import rank_safe
from nabla_tau.membership.shadow import Indices, train_shadow_ensemble, train_shadow_models
from nabla_tau.membership.shadow_attacks import Pair, sample_scores
from nabla_tau.membership.shadow_samples import check_samples
from nabla_tau.membership.shadow_store import ShadowScores
from nabla_tau.outputs import check_json, check_outputs, write_json
from nabla_tau.progress import progress_bar
from nabla_tau.recipes import RECIPES
from nabla_tau.sources import TensorSource, as_source
from nabla_tau.task import Task, load_task
from nabla_tau.weights import load_weights

SCORED = ("forget", "unseen")
SCORES_SCHEMA = "nabla_tau.shadow_scores/1"
_NAMES = {
    "lira": "LiRA, online",
    "lira_offline": "LiRA, offline",
    "ulira": "U-LiRA",
    "rmia": "RMIA, online",
    "rmia_offline": "RMIA, offline",
}


def run_shadow(args: Namespace) -> None:
    {"train": train, "score": score}[args.action](args[args.action])


def train(args: Namespace) -> None:
    check_json(args.json)
    check_outputs([args.json], [Path(args.task)])
    if args.unlearn is not None and args.unlearn not in (DEFAULT, *RECIPES):
        raise ValueError(f"--unlearn must be one of {', '.join([DEFAULT, *RECIPES])}, got {args.unlearn!r}")
    positive(args.learning_rate, "--learning_rate")
    training = TaskTraining.of(args.task, args.unlearn)
    task = training.task
    sets = task.require(*SCORED, "retain", *(["held_out"] if args.unlearn else []))
    scored = {name: sets[name] for name in SCORED}
    settings = training.settings()
    common: dict[str, Any] = {
        "sets": scored,
        "models": args.models,
        "unlearn": training.unlearn if args.unlearn else None,
        "probability": args.probability,
        "seed": args.seed,
        "forward": training.forward if task.forward else None,
        "loss": training.loss if task.loss else None,
        "dtype": args.dtype,
        "n_jobs": args.n_jobs,
        "progress": True,
    }
    if args.ensemble:
        found = train_shadow_ensemble(
            args.out,
            make_model=task.model,
            epochs=args.epochs,
            always=sets["retain"],
            train_batch_size=args.batch_size,
            optimizer=functools.partial(torch.optim.AdamW, lr=args.learning_rate),
            settings=settings | {"optimizer": "AdamW", "learning_rate": args.learning_rate},
            **common,
        )
    else:
        if task.train is None:
            raise ValueError("shadow models need train(model, data) in the task, or --ensemble")
        found = train_shadow_models(args.out, train=training.train, settings=settings, **common)
    counts = {name: int(found.membership[:, found.columns(name)].sum(0).min()) for name in SCORED}
    summary = {"folder": str(args.out), "models": found.plan.models, "sets": dict(found.plan.sets)}
    summary |= {"signal": found.signal, "unlearned": found.unlearned is not None, "seconds": found.seconds}
    if args.json is not None:
        write_json(json_able(summary | {"trained_on_by_at_least": counts}, "the summary"), args.json)
    print(f"{found.plan.models} shadow models in {args.out}, trained in {found.seconds:.1f} s of processor time")
    for name in SCORED:
        print(f"{name:<8} {found.plan.sets[name]:>7} samples, each trained on by {counts[name]} models or more")


def score(args: Namespace) -> None:
    check_json(args.json)
    check_outputs([args.json], [args.weights, Path(args.task)])
    shadow = ShadowScores.load(args.shadow)
    task = load_task(args.task)
    sets = task.require(*SCORED)
    check_samples(shadow, sets)
    model = task.new_model()
    load_weights(model, args.weights)
    signals = {}
    with progress_bar("score", len(sets), enabled=True) as update:
        for name, of_set in sets.items():
            signals[name] = evaluate(model, of_set, forward=task.forward, loss=task.loss)
            update(len(signals), f"{name} set")
    found = sample_scores(signals, shadow, offline=True)
    figures = {attack: _figures(pair) for attack, pair in found.items()}
    if args.json is not None:
        content = {
            "schema": SCORES_SCHEMA,
            "task": args.task,
            "weights": {"path": str(args.weights), "sha256": sha256(args.weights)},
            "shadow": {"path": str(args.shadow), "models": shadow.plan.models, "signal": shadow.signal},
            "orientation": "higher: more likely a member",
            "attacks": figures,
            "scores": {attack: dict(zip(SCORED, pair, strict=True)) for attack, pair in found.items()},
        }
        write_json(json_able(content, "the scores"), args.json)
    print(f"forget set against unseen samples, by {shadow.plan.models} shadow models")
    print(f"{'attack':<14}    AUC   95% interval   TPR at 1% FPR   95% interval")
    for attack, of_attack in figures.items():
        auc, tpr = (_text(of_attack, measure) for measure in ("auc", "tpr_at_1_percent_fpr"))
        print(f"{_NAMES[attack]:<14}  {auc}   {tpr:>21}")


def _figures(pair: Pair) -> dict[str, Any]:
    """AUC and TPR at 1 % FPR of one attack, with their intervals; None where the rate cannot be resolved."""
    unscored = int(sum(np.isnan(scores).sum() for scores in pair))
    members, others = (rank_safe(scores) for scores in pair)
    drawn = bootstrap_auc({"model": members}, {"model": others}, fpr=(0.01,))
    tpr = drawn.tpr[0.01]
    resolved = tpr.resolution != "not resolvable"
    return {
        "auc": drawn.value("model"),
        "auc_interval": drawn.interval("model"),
        "tpr_at_1_percent_fpr": tpr.value("model") if resolved else None,
        "tpr_at_1_percent_fpr_interval": tpr.interval("model") if resolved else None,
        "resolution": tpr.resolution,
        "n_members": members.size,
        "n_nonmembers": others.size,
        "n_unscored": unscored,
    }


def _text(figures: dict[str, Any], measure: str) -> str:
    if figures[measure] is None:
        return "not resolvable"
    low, high = figures[f"{measure}_interval"]
    return f"{figures[measure]:.3f}   {low:.3f}-{high:.3f}"


@dataclass(frozen=True)
class TaskTraining:
    """Training and unlearning of a task for shadow models.

    Workers get the name of the task and load it by themselves: a task file is no module that they could import.
    """

    where: str
    content: str
    recipe: str | None

    @classmethod
    def of(cls, where: str, recipe: str | None) -> TaskTraining:
        path = Path(where)
        return cls(str(path.resolve()), sha256(path), recipe) if path.is_file() else cls(where, "", recipe)

    @property
    def task(self) -> Task:
        return _loaded(self.where, self.content)

    def settings(self) -> dict[str, Any]:
        """What two runs must share to be one."""
        content = {"task_sha256": self.content} if self.content else {}
        recipe = {"recipe": self.recipe} if self.recipe else {}
        return {"task": Path(self.where).name} | content | recipe

    def train(self, indices: Indices, seed: int) -> nn.Module:
        """A new model trained on these of the scored samples, and on all of the retain set."""
        task = self.task
        sets = list(task.require(*SCORED, "retain").values())
        scored = sum(as_source(of_set, name).count for name, of_set in zip(SCORED, sets, strict=False))
        retained = np.arange(scored, scored + as_source(sets[-1], "retain").count)
        model = task.new_model()
        assert task.train is not None
        trained = task.train(model, select(sets, np.concatenate((indices, retained))))
        return trained if isinstance(trained, nn.Module) else model

    def unlearn(self, model: nn.Module, indices: Indices, seed: int) -> nn.Module:
        """The model after these samples were unlearned."""
        task = self.task
        sets = task.require(*SCORED, "retain", "held_out")
        return unlearn(
            model,
            forget=select([sets[name] for name in SCORED], indices),
            retain=sets["retain"],
            held_out=sets["held_out"],
            recipe=self.recipe,
            forward=task.forward,
            loss=task.loss,
            seed=seed % 2**31,
        ).model

    def forward(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        assert self.task.forward is not None
        return self.task.forward(model, batch)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        assert self.task.loss is not None
        return self.task.loss(logits, targets)


@functools.lru_cache(maxsize=1)
def _loaded(where: str, content: str) -> Task:
    """Once for all the models that a process trains; `content` tells apart what a file held before it was changed."""
    return load_task(where)


def select(sets: Sequence[Any], indices: Indices) -> Any:
    """The samples at these indices of all sets put one after the other, as the kind of data set that the first is.

    TypeError for a DataLoader, ValueError for tensors that cannot be put together.
    """
    if any(isinstance(of_set, DataLoader) for of_set in sets):
        raise TypeError("samples are chosen by their index: data() must give tensors or Datasets, not DataLoaders")
    sources = [as_source(of_set, "a set of the task") for of_set in sets]
    if not all(isinstance(source, TensorSource) for source in sources):
        return Subset(ConcatDataset(sets), indices.tolist())
    joined = functools.reduce(_joined, (source.tensors for source in sources if isinstance(source, TensorSource)))
    rows = rows_of(joined, torch.from_numpy(indices))
    return TensorDataset(*rows) if isinstance(sets[0], TensorDataset) else rows


def _joined(first: Any, second: Any) -> Any:
    joined = concatenate(first, second)
    if joined is None:
        raise ValueError("the sets of the task differ in their structure, so that no model can be trained on all")
    return joined
