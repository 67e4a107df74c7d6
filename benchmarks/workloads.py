"""What is trained, forgotten and trained anew where whole runs are measured: the demo's CNN, the table of
examples/tabular.py, and the setting of the paper."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from bench_demo import EXAMPLES
from torch import nn
from torch.nn import functional as F

from nabla_tau import demo
from nabla_tau.suites import scenarios
from nabla_tau.suites.data import Data, cifar10, diamonds, fashion_mnist
from nabla_tau.suites.resnet import resnet18
from nabla_tau.suites.scenarios import Parts, Scenario

Make = Callable[[], nn.Module]
Train = Callable[[Make, Data, int], nn.Module]
SHARES = tuple(Scenario("random", share) for share in (0.03, 0.15, 0.30))


class Workload(NamedTuple):
    """steps: of a training on so many samples. split: (what is forgotten, seed) -> parts, whose `train` is the same for
    all that may be forgotten."""

    name: str
    make: Make
    train: Train
    steps: Callable[[int], int]
    split: Callable[[Scenario, int], Parts]
    seeds: tuple[int, ...] = (0,)
    forgotten: tuple[Scenario, ...] = SHARES


def images() -> Workload:
    def train(make: Make, data: Data, seed: int) -> nn.Module:
        with mock.patch.object(demo, "small_cnn", make):
            return demo.train_cnn(data, seed=seed)

    return Workload(
        "CNN, Fashion-MNIST",
        demo.small_cnn,
        train,
        lambda count: demo.EPOCHS * math.ceil(count / demo.BATCH),
        lambda what, seed: scenarios.split(fashion_mnist(), what, train=demo.TRAIN, held_out=demo.HELD_OUT, seed=seed),
    )


def table() -> Workload:
    """examples/tabular.py: 5,000 diamonds, 80 epochs."""
    sys.path.insert(0, str(EXAMPLES))
    import tabular
    import training

    data = diamonds()

    def train(make: Make, samples: Data, seed: int) -> nn.Module:
        return training.fit(make, samples, F.cross_entropy, epochs=80, seed=seed)[0]

    def split(what: Scenario, seed: int) -> Parts:
        parts = training.split(data, train=5_000, held_out=1_250, unseen=2_500, fraction=what.amount, seed=seed)
        return Parts(**parts, test=parts["unseen"])

    return Workload(
        "MLP, diamonds", tabular.make_model, train, lambda count: 80 * math.ceil(count / 128), split, (0, 1, 2)
    )


def on_cifar10(device: str, *, epochs: int = 50, every: int = 1) -> Workload:
    """CIFAR-10 as Trippa et al. 2024 (arXiv 2403.14339) have it, but for JPEG: ResNet-18 with the stem for larger
    images, trained from scratch by SGD of .1, .9 and 5e-4 whose rate falls to .001, no augmentation.

    every: with 2 half of the images, and so on, for a run in small."""
    seen, others = (tuple(column[::every].to(device) for column in cifar10(part)) for part in ("train", "test"))
    batch = 256

    def train(make: Make, data: Data, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = make().to(device, memory_format=torch.channels_last).train()
        x, y = data[0].contiguous(memory_format=torch.channels_last), data[1]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=epochs)
        for _ in range(epochs):
            for rows in torch.randperm(len(x), device=device).split(batch):
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    loss = F.cross_entropy(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        return model.eval()

    return Workload(
        "ResNet-18, CIFAR-10 (JPEG)",
        partial(resnet18, small=False),
        train,
        lambda count: epochs * math.ceil(count / batch),
        partial(official_split, seen, others),
        forgotten=(*SHARES, Scenario("classes", 1)),
    )


def official_split(seen: Data, others: Data, what: Scenario, seed: int) -> Parts:
    """Forget and retain of the training images; half of the test images are held out, and the rest is unseen."""
    x, y = seen
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    half = torch.randperm(len(others[0]), generator=generator).to(x.device).chunk(2)
    held_out, test = ((others[0][rows], others[1][rows]) for rows in half)
    x, y = x[order], y[order]
    if what.kind == "classes":
        removed = torch.randperm(int(y.max()) + 1, generator=generator)[: int(what.amount)].to(x.device)
        chosen, alike = (torch.isin(labels, removed) for labels in (y, test[1]))
    elif what.kind == "random":
        chosen = torch.arange(len(x), device=x.device) < round(what.amount * len(x))
        alike = torch.ones_like(test[1], dtype=torch.bool)
    else:
        raise ValueError(f"forgotten can be random images or classes, got {what}")
    return Parts(
        (x, y), (x[chosen], y[chosen]), (x[~chosen], y[~chosen]), held_out, (test[0][alike], test[1][alike]), test
    )
