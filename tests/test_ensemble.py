"""The vectorised ensemble: its weights are those of models trained one by one; what it cannot do exactly it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import blobs, mlp
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR

from nabla_tau.membership.ensemble import batch_order, train_ensemble
from nabla_tau.seeding import RandomState
from nabla_tau.sources import derive_seed

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
}


def members(models, samples, seed=1):
    return np.random.default_rng(seed).random((models, samples)) < 0.5


def one_by_one(make_model, data, membership, *, epochs, batch_size, optimizer, schedule=None, seed=0):
    """What the ensemble is to equal: each model by itself, each step on its own members in the batch alone."""
    x, y = data
    models = []
    for k, mine in enumerate(torch.from_numpy(membership)):
        state = RandomState(derive_seed(seed, k))
        with state:
            model = make_model()
        step = optimizer(list(model.parameters()))
        rate = schedule(step) if schedule else None
        for epoch in range(epochs):
            for index in batch_order(len(x), seed, epoch).split(batch_size):
                rows = index[mine[index]]
                step.zero_grad()
                if len(rows):
                    F.cross_entropy(model(x[rows]), y[rows]).backward()
                else:
                    for parameter in model.parameters():
                        parameter.grad = torch.zeros_like(parameter)
                step.step()
                if rate:
                    rate.step()
        models.append(model)
    return models


def largest_difference(ensemble, models):
    return max(
        float((a - b).detach().abs().max())
        for k, model in enumerate(models)
        for a, b in zip(ensemble.model(k).parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_are_those_of_the_loop(optimizer):
    x, y = blobs(90)
    data, membership = (x.double(), y), members(5, 90)
    membership[2, :60] = False  # batches without a member of model 2
    options = {"epochs": 6, "batch_size": 7, "optimizer": OPTIMIZERS[optimizer], "seed": 3}
    options["schedule"] = lambda o: LinearLR(o, 1.0, 0.1, total_iters=40)
    ensemble = train_ensemble(lambda: mlp().double(), data, membership, **options)
    loop = one_by_one(lambda: mlp().double(), data, membership, **options)
    assert largest_difference(ensemble, loop) < 1e-10
    start = one_by_one(lambda: mlp().double(), data, membership, **options | {"epochs": 0})
    assert largest_difference(ensemble, start) > 1e-2, "nothing was learned that could differ"


def test_weights_are_those_of_the_loop_within_rounding_in_float32():
    data, membership = blobs(90), members(5, 90)
    options = {"epochs": 6, "batch_size": 16, "optimizer": OPTIMIZERS["sgd"]}
    ensemble = train_ensemble(mlp, data, membership, **options)
    assert largest_difference(ensemble, one_by_one(mlp, data, membership, **options)) < 2e-5


class Convolutional(nn.Module):
    """A layer that keeps a constant, one with frozen weights, tied weights and a normalisation of each sample."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.b.weight = self.a.weight
        self.head = nn.Linear(32, 4)
        self.register_buffer("scale", torch.rand(32))
        for parameter in self.head.parameters():
            parameter.requires_grad_(False)

    def forward(self, x):
        x = self.norm(self.conv(x.unsqueeze(1))).relu().flatten(1) * self.scale
        return self.head(self.b(self.a(x).relu()).relu())


def test_convolutions_buffers_frozen_and_tied_weights():
    x, y = blobs(60)
    data, membership = (x.double(), y), members(3, 60)
    make = lambda: Convolutional().double()  # noqa: E731
    options = {"epochs": 4, "batch_size": 16, "seed": 5}
    ensemble = train_ensemble(make, data, membership, optimizer=OPTIMIZERS["sgd"], **options)
    loop_optimizer = lambda p: OPTIMIZERS["sgd"]([q for q in p if q.requires_grad])  # noqa: E731
    loop = one_by_one(make, data, membership, optimizer=loop_optimizer, **options)
    assert largest_difference(ensemble, loop) < 1e-10
    assert all(torch.equal(ensemble.model(k).scale, model.scale) for k, model in enumerate(loop))
    model = ensemble.model(0)
    assert model.b.weight is model.a.weight


def test_samples_outside_leave_no_trace():
    x, y = blobs(80)
    membership = members(4, 80)
    membership[:, :20] = False
    changed = x.clone()
    changed[:20] = 50 * torch.randn(20, 8)
    first, second = (train_ensemble(mlp, (data, y), membership, epochs=3, batch_size=16) for data in (x, changed))
    assert largest_difference(first, [second.model(k) for k in range(4)]) == 0.0


def test_mappings_multi_label_targets_and_a_forward_of_ones_own():
    x, _ = blobs(60)
    y = (torch.rand(60, 4, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    membership = members(3, 60)
    options = {"epochs": 2, "batch_size": 16}
    plain = train_ensemble(mlp, (x, y), membership, **options)
    mapped = train_ensemble(
        mlp, {"x": x, "wanted": y}, membership, forward=lambda m, b: (m(b["x"]), b["wanted"]), **options
    )
    own = train_ensemble(
        mlp,
        (x, y),
        membership,
        loss=lambda z, t: F.binary_cross_entropy_with_logits(z, t, reduction="none").mean(1),
        **options,
    )
    models = [plain.model(k) for k in range(3)]
    assert largest_difference(mapped, models) == 0.0
    assert largest_difference(own, models) < 1e-5


def test_dropout_is_reproducible_and_each_model_has_its_own():
    make = lambda: nn.Sequential(nn.Dropout(0.5), *mlp())  # noqa: E731
    everyone = np.ones((2, 60), bool)
    state = torch.get_rng_state()
    runs = [train_ensemble(make, blobs(60), everyone, epochs=2, model_seeds=[7, 7]) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert largest_difference(runs[0], [runs[1].model(k) for k in range(2)]) == 0.0
    assert largest_difference(runs[0], [runs[0].model(1), runs[0].model(0)]) > 1e-4


class Attentive(nn.Module):
    """Looks at its input before it decides what to do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return self.layer(x) if self.layer.weight.sum() > 0 else -self.layer(x)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return self.layer(x)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"make_model": lambda: nn.Sequential(nn.BatchNorm1d(8), *mlp())}, ValueError, "0 normalises with the stat"),
        ({"make_model": Attentive}, ValueError, "vmap cannot vectorise this model: train such models one by one"),
        ({"make_model": Counting}, ValueError, "buffers change"),
        ({"optimizer": lambda p: torch.optim.LBFGS(p)}, ValueError, "LBFGS is not known"),
        ({"membership": members(3, 59)}, ValueError, r"\[K, 60\], got \[3, 59\]"),
        ({"membership": np.ones((3, 60))}, TypeError, "bool, got float64"),
        ({"model_seeds": [1]}, ValueError, "1 seeds for 3 models"),
        ({"data": torch.utils.data.Subset(torch.utils.data.TensorDataset(*blobs(60)), range(60))}, TypeError, "Subset"),
    ],
)
def test_what_it_cannot_do_exactly_it_refuses(options, error, text):
    given = {"make_model": mlp, "data": blobs(60), "membership": members(3, 60), "epochs": 1} | options
    with pytest.raises(error, match=text):
        train_ensemble(given.pop("make_model"), given.pop("data"), given.pop("membership"), **given)
