"""The demo: a small CNN memorises real images, forgets a part of them, and is audited against a retrained model."""

from __future__ import annotations

import dataclasses
import gzip
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nabla_tau.auditing import AuditReport, audit
from nabla_tau.loop import unlearn
from nabla_tau.membership.shadow import Indices, train_shadow_ensemble
from nabla_tau.membership.shadow_attacks import MIN_SHADOWS
from nabla_tau.membership.shadow_store import ShadowScores
from nabla_tau.progress import progress_bar
from nabla_tau.recipes import DEFAULT, PAPER, Recipe

Images: TypeAlias = tuple[Tensor, Tensor]

MEAN, STD = 0.286, 0.353  # of the pixels of Fashion-MNIST's 60,000 training images
TRAIN, HELD_OUT = 6_000, 1_500  # of 10,000 images; the other 2,500 are unseen
EPOCHS, BATCH, LEARNING_RATE = 20, 128, 1e-3
SHADOWS, SHADOW_EPOCHS, SHADOW_BATCH = 16, 20, 256


def fashion_mnist() -> Images:
    """The 10,000 test images of Fashion-MNIST, [10000, 1, 28, 28] standardised, and labels 0-9; part of the package."""
    folder = files("nabla_tau") / "data" / "fashion_mnist"
    images = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    x = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    y = np.frombuffer(labels, np.uint8, offset=8)
    return torch.from_numpy((x.astype(np.float32) / 255 - MEAN) / STD), torch.from_numpy(y.astype(np.int64))


def small_cnn() -> nn.Module:
    """Two convolutions with BatchNorm and two linear layers, 106 thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def shadow_mlp() -> nn.Module:
    """One hidden layer, 51 thousand parameters: so small that many can be trained as one, in seconds."""
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 64), nn.ReLU(), nn.Linear(64, 10))


def train_cnn(data: Images, *, seed: int, name: str = "training", progress: bool = False) -> nn.Module:
    """A CNN trained until it has memorised its data: AdamW, no augmentation, the learning rate falling to 0
    over the last fifth of the steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = small_cnn()
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    steps = EPOCHS * -(-len(x) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 5 * (1 - step / steps)))
    with progress_bar(name, EPOCHS, enabled=progress) as update:
        for epoch in range(EPOCHS):
            total = 0.0
            for index in torch.split(torch.randperm(len(x), generator=generator), BATCH):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[index]), y[index])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                total += loss.item() * len(index)
            update(epoch + 1, f"loss {total / len(x):.4f}")
    return model.eval()


def split(seed: int, fraction: float, classes: int) -> dict[str, Images]:
    """Forget, retain, held-out and unseen images. With `classes` > 0 that many whole classes, drawn by the seed, are
    forgotten; else a random `fraction` of the training images. Raises ValueError for values out of range."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}")
    if not 0 <= classes < 10:
        raise ValueError(f"classes must be 0 to 9 of the 10 classes, got {classes}")
    x, y = fashion_mnist()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    train, held_out, unseen = order[:TRAIN], order[TRAIN : TRAIN + HELD_OUT], order[TRAIN + HELD_OUT :]
    if classes:
        forgotten = torch.isin(y[train], torch.randperm(10, generator=generator)[:classes])
    else:
        forgotten = torch.arange(TRAIN) < round(fraction * TRAIN)
    parts = {"forget": train[forgotten], "retain": train[~forgotten], "held_out": held_out, "unseen": unseen}
    return {name: (x[index], y[index]) for name, index in parts.items()}


def finetune_recipe() -> Recipe:
    """Descent on the retained data alone, otherwise the published recipe: the usual weakest baseline."""
    return dataclasses.replace(PAPER, name="finetune", alpha=0.0)


def train_shadows(
    parts: Mapping[str, Images], folder: Path, *, models: int, seed: int, progress: bool = False
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
        make_model=shadow_mlp,
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
    for name, recipe in (("unlearned", DEFAULT), ("paper", PAPER), ("finetuned", finetune_recipe())):
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
