"""The demo: a small CNN memorises real images, forgets a part of them, and is audited against a retrained model."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from nabla_tau.arguments import check_seed
from nabla_tau.auditing import AuditReport, audit
from nabla_tau.loop import unlearn
from nabla_tau.membership.shadow import Indices, train_shadow_ensemble
from nabla_tau.membership.shadow_attacks import MIN_SHADOWS
from nabla_tau.membership.shadow_store import ShadowScores
from nabla_tau.recipes import PAPER, Recipe
from nabla_tau.suites import scenarios, train
from nabla_tau.suites.data import Data, fashion_mnist
from nabla_tau.suites.models import mlp, small_cnn
from nabla_tau.suites.scenarios import Scenario

TRAIN, HELD_OUT = 6_000, 1_500  # of 10,000 images; the other 2,500 are unseen
EPOCHS, BATCH, LEARNING_RATE = 20, 128, 1e-3
SHADOWS, SHADOW_EPOCHS, SHADOW_BATCH = 16, 20, 256


def train_cnn(data: Data, *, seed: int, name: str = "training", progress: bool = False) -> nn.Module:
    """A CNN trained until it has memorised its data."""
    settings = {"epochs": EPOCHS, "batch_size": BATCH}
    return train(small_cnn, data, **settings, learning_rate=LEARNING_RATE, seed=seed, name=name, progress=progress)


def split(seed: int, fraction: float, classes: int) -> dict[str, Data]:
    """Forget, retain, held-out and unseen images. With `classes` > 0 that many whole classes, drawn by the seed, are
    forgotten; else a random `fraction` of the training images. Raises ValueError for values out of range."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}")
    if not 0 <= classes < 10:
        raise ValueError(f"classes must be 0 to 9 of the 10 classes, got {classes}")
    scenario = Scenario("classes", classes) if classes else Scenario("random", fraction)
    parts = scenarios.split(fashion_mnist(), scenario, train=TRAIN, held_out=HELD_OUT, seed=seed)
    return {"forget": parts.forget, "retain": parts.retain, "held_out": parts.held_out, "unseen": parts.test}


def finetune_recipe() -> Recipe:
    """Descent on the retained data alone, otherwise the published recipe: the usual weakest baseline."""
    return dataclasses.replace(PAPER, name="finetune", alpha=0.0)


def train_shadows(
    parts: Mapping[str, Data], folder: Path, *, models: int, seed: int, progress: bool = False
) -> ShadowScores:
    """Shadow models of the demo: each trained on all retained images and half of the others, which it then unlearns.

    They are smaller than the CNN that is attacked, of which sixteen would take ten minutes. What is hard for them is
    hard for it, and that is what the attacks need; models of its own kind would find more.
    """
    scored = {name: parts[name] for name in ("forget", "unseen")}
    x, y = (torch.cat(columns) for columns in zip(*scored.values(), strict=True))

    def forgotten(model: nn.Module, indices: Indices, own_seed: int) -> nn.Module:
        index = torch.from_numpy(indices)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return unlearn(
                model,
                forget=(x[index], y[index]),
                retain=parts["retain"],
                held_out=parts["held_out"],
                seed=own_seed,
                inplace=True,
            ).model

    return train_shadow_ensemble(
        folder,
        sets=scored,
        always=parts["retain"],
        models=models,
        make_model=functools.partial(mlp, 784, 64, 10),
        epochs=SHADOW_EPOCHS,
        train_batch_size=SHADOW_BATCH,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True),
        unlearn=forgotten,
        seed=seed,
        settings={"model": "MLP 784-64-10", "optimizer": f"AdamW {LEARNING_RATE:g}"},
        threads=torch.get_num_threads(),
        progress=progress,
    )


def run_demo(
    *, fraction: float = 0.15, classes: int = 0, seed: int = 0, shadows: int = SHADOWS, progress: bool = False
) -> AuditReport:
    """Train, retrain, unlearn with the default and the published recipe, finetune, and audit all of them, with attacks
    by so many shadow models (0: without them)."""
    if shadows != 0 and shadows < MIN_SHADOWS:
        raise ValueError(f"shadow models must be 0 or at least {MIN_SHADOWS}, got {shadows}")
    check_seed(seed)
    parts = split(seed, fraction, classes)
    seconds: dict[str, float] = {}

    def timed(name: str, make: Callable[[], nn.Module]) -> nn.Module:
        started = time.perf_counter()
        model = make()
        seconds[name] = time.perf_counter() - started
        return model

    (x_forget, y_forget), (x_retain, y_retain) = parts["forget"], parts["retain"]
    everything = torch.cat((x_forget, x_retain)), torch.cat((y_forget, y_retain))
    original = timed("original", lambda: train_cnn(everything, seed=seed, name="training", progress=progress))
    retrained = timed(
        "retrained", lambda: train_cnn(parts["retain"], seed=seed + 1, name="retraining", progress=progress)
    )
    results = {}
    for name, recipe in (("unlearned", None), ("paper", PAPER), ("finetuned", finetune_recipe())):
        with warnings.catch_warnings():
            # What a recipe fails to do is what the audit shows.
            warnings.simplefilter("ignore", UserWarning)
            results[name] = unlearn(
                original,
                forget=parts["forget"],
                retain=parts["retain"],
                held_out=parts["held_out"],
                recipe=recipe,
                seed=seed,
                progress=progress,
            )
    seconds |= {name: result.seconds for name, result in results.items()}
    with tempfile.TemporaryDirectory() as folder:
        shadow = None
        if shadows:
            shadow = train_shadows(parts, Path(folder), models=shadows, seed=seed, progress=progress)
        return audit(
            results["unlearned"].model,
            forget=parts["forget"],
            unseen=parts["unseen"],
            retain=parts["retain"],
            retrained=retrained,
            original=original,
            compare={name: results[name].model for name in ("paper", "finetuned")},
            shadow=shadow,
            record=results["unlearned"].to_dict(),
            seconds=seconds,
            progress=progress,
        )
