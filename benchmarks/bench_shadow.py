"""shadow: many small models trained as one vectorised ensemble, against a plain loop over the models."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from record import Record, records_of, timings
from torch import nn
from torch.nn import functional as F

from nabla_tau.membership.ensemble import train_ensemble


def mlp(features: int, width: int, classes: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, classes))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 10),
    )


# name, model, features, classes, models, samples, batch: samples of a step, of which a model takes its half
CASES = [
    ("MLP 20-64-5", mlp(20, 64, 5), 20, 5, 32, 2048, 64),
    ("MLP 20-64-5", mlp(20, 64, 5), 20, 5, 128, 2048, 64),
    ("MLP 22-256-5", mlp(22, 256, 5), 22, 5, 32, 2048, 128),
    ("MLP 784-64-10", mlp(784, 64, 10), 784, 10, 32, 2048, 256),
    ("CNN 28x28", cnn, 784, 10, 16, 1024, 128),
]
QUICK_CASES = [("MLP 20-64-5", mlp(20, 64, 5), 20, 5, 8, 256, 64)]


def loop(make: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor, member: np.ndarray, batch: int) -> None:
    """As many steps as the ensemble takes, each on the model's own samples only: half of the arithmetic."""
    for mine in member:
        model = make().to(x.device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        rows = torch.from_numpy(np.flatnonzero(mine)).to(x.device)
        for index in rows[torch.randperm(len(rows))].split(batch // 2):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


def run(device: str, threads: int, quick: bool) -> list[Record]:
    records = []
    for name, make, features, classes, models, samples, batch in QUICK_CASES if quick else CASES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(samples, features, generator=generator).to(device)
        y = torch.randint(classes, (samples,), generator=generator).to(device)
        member = np.random.default_rng(0).random((models, samples)).argsort(0) < models // 2
        providers = {
            "loop": functools.partial(loop, make, x, y, member, batch),
            "ensemble": functools.partial(train_ensemble, make, (x, y), member, epochs=1, batch_size=batch),
        }
        found = timings(providers, seconds=0.5 if quick else 12, device=device)
        records += records_of(
            found,
            baseline="loop",
            bench="shadow",
            case=f"{models} x {name}, one epoch of {samples}",
            device=device,
            dtype="float32",
            threads=threads,
        )
    return records
