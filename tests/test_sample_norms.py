"""Per-sample gradient norms and Fisher information are those of torch.func's per-sample gradients, or of a loop's."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import mlp
from layer_models import BY_LAYERS, NOT_BY_LAYERS, Bags, Net, Transformer, build, images, sample, texts, vectors
from torch import nn
from torch.nn import functional as F

from nabla_tau import parts, sample_norms
from nabla_tau.batch import default_forward
from nabla_tau.each_sample import Losses, looped, vectorised
from nabla_tau.functional import sample_losses
from nabla_tau.sample_norms import fisher_diagonal, sample_gradient_norms


def gradients(model, batch, way="loop", loss=None):
    """{name: per-sample gradients [B, ...]}"""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    losses = Losses(model, default_forward, loss)
    count = len(batch[-1])
    found = looped(losses, names, batch, range(count)) if way == "loop" else vectorised(losses, names, batch)
    return dict(zip(names, map(torch.cat, zip(*found, strict=True)), strict=True))


def norms_of(gradients):
    return sum(g.flatten(1).square().sum(1) for g in gradients.values())


def forbid_one_by_one(monkeypatch):
    def stop(*_):
        raise AssertionError("made sample by sample")

    monkeypatch.setattr(sample_norms, "sample_gradients", stop)


@pytest.fixture(params=["as it is", "one sample a chunk", "Grams", "no Grams"])
def way(request, monkeypatch):
    """Every way to the norm of a layer, on small layers that would take one of them."""
    if request.param == "one sample a chunk":
        monkeypatch.setitem(parts.CHUNK_BYTES, "cpu", 1)
    elif request.param == "Grams":
        monkeypatch.setattr(parts, "prefers_grams", lambda *_: True)
    elif request.param == "no Grams":
        monkeypatch.setattr(parts, "prefers_grams", lambda *_: False)


@pytest.mark.parametrize("name", BY_LAYERS)
def test_norms_and_fisher_by_layers(name, way, monkeypatch):
    make, data = BY_LAYERS[name]
    model = build(make)
    forbid_one_by_one(monkeypatch)
    for seed, count in enumerate((5, 3)):
        batch = sample(data, count, seed)
        truth = gradients(model, batch)
        torch.testing.assert_close(sample_gradient_norms(model, batch), norms_of(truth), rtol=1e-10, atol=0)
        fisher = fisher_diagonal(model, [batch])
        assert fisher.keys() == truth.keys()
        # Some gradients are 0 but for rounding, such as that of an attention's key bias.
        rounding = 1e-24 * max(float(g.square().max()) for g in truth.values())
        for key, value in fisher.items():
            torch.testing.assert_close(value, truth[key].square().mean(0), rtol=1e-10, atol=rounding)


@pytest.mark.parametrize("name", [n for n in BY_LAYERS if "bags" not in n])  # vmap does not know EmbeddingBag
def test_torch_func_gives_the_same(name):
    make, data = BY_LAYERS[name]
    model, batch = build(make), sample(data, 5)
    truth = norms_of(gradients(model, batch, way="vmap"))
    torch.testing.assert_close(sample_gradient_norms(model, batch), truth, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", [n for n in NOT_BY_LAYERS if "divide" not in n])
def test_other_models_sample_by_sample(name, caplog):
    make, data, layer = NOT_BY_LAYERS[name]
    model, batch = build(make), sample(data, 5)
    truth = gradients(model, batch)
    with caplog.at_level(logging.INFO, logger="nabla_tau"):
        for _ in range(2):
            torch.testing.assert_close(sample_gradient_norms(model, batch), norms_of(truth), rtol=1e-10, atol=0)
        fisher = fisher_diagonal(model, [batch])
    for key, value in fisher.items():
        torch.testing.assert_close(value, truth[key].square().mean(0), rtol=1e-10, atol=1e-20)
    (record,) = caplog.records
    assert "made one by one" in record.message
    assert layer in record.message or "influence each other" in record.message


def test_fisher_is_the_mean_over_samples_and_not_over_batches():
    model, (x, y) = build(Net), sample(images, 7)
    whole = fisher_diagonal(model, [(x, y)])
    parted = fisher_diagonal(model, iter([(x[:1], y[:1]), (x[1:4], y[1:4]), (x[4:], y[4:])]))
    for name, value in whole.items():
        torch.testing.assert_close(parted[name], value, rtol=1e-10, atol=1e-20)


def test_samples_without_a_loss_have_no_norm_and_do_not_count():
    model, (x, y) = build(lambda: Transformer("not")), sample(texts, 5)
    y[1] = -100
    norms = sample_gradient_norms(model, (x, y))
    assert norms[1] == 0
    assert (norms > 0).sum() == 4
    kept = torch.tensor([0, 2, 3, 4])
    with_it, without = fisher_diagonal(model, [(x, y)]), fisher_diagonal(model, [(x[kept], y[kept])])
    for name, value in without.items():
        torch.testing.assert_close(with_it[name], value, rtol=1e-10, atol=1e-20)
    with pytest.raises(ValueError, match="at least one sample"):
        fisher_diagonal(model, [(x[1:2], y[1:2])])
    with pytest.raises(ValueError, match="at least one sample"):
        fisher_diagonal(model, [])


def test_own_forward_and_loss():
    model, (x, y) = build(Net), sample(images, 5)
    target = torch.randn(5, 5).double()

    def forward(model, batch):
        return model(batch["image"]), batch["wanted"]

    def loss(outputs, targets):
        return (outputs - targets).square().sum(1)

    batch = {"image": x, "wanted": target, "note": "kept"}
    found = sample_gradient_norms(model, batch, forward=forward, loss=loss)
    truth = norms_of(gradients(model, (x, target), loss=loss))
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=0)
    assert not torch.allclose(found, sample_gradient_norms(model, (x, y)))
    with pytest.raises(ValueError, match=r"one loss a sample.*\(5, 5\)"):
        sample_gradient_norms(model, (x, target), loss=lambda a, b: a - b)


def test_frozen_and_unreached_parameters_have_no_part():
    model, batch = build(BY_LAYERS["called twice"][0]), sample(vectors, 5)
    model.layer.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    truth = gradients(model, batch)
    torch.testing.assert_close(sample_gradient_norms(model, batch), norms_of(truth), rtol=1e-10, atol=0)
    fisher = fisher_diagonal(model, [batch])
    assert "layer.weight" not in fisher
    assert not fisher["unused.weight"].any()


def test_bags_end_to_end_with_scales():
    model = build(lambda: Bags("sum"))
    tokens, targets, scales = torch.randint(12, (11,)), torch.randint(5, (4,)), torch.rand(11).double()
    offsets = torch.tensor([0, 3, 3, 9])
    found = sample_gradient_norms(model, (tokens, offsets, scales, targets))
    parameters = list(model.parameters())
    for i, norm in enumerate(found):
        own = sample_losses(model(tokens, offsets, scales), targets)[i]
        truth = sum(g.square().sum() for g in torch.autograd.grad(own, parameters))
        torch.testing.assert_close(norm, truth, rtol=1e-10, atol=0)


def test_nothing_of_the_model_changes():
    model, batch = build(Net), sample(images, 5)
    before = [(m.training, len(m._forward_hooks), len(vars(m))) for m in model.modules()]
    sample_gradient_norms(model, batch)
    with torch.no_grad():  # the caller's mode does not matter
        sample_gradient_norms(model, batch)
        fisher_diagonal(model, [batch])
    assert [(m.training, len(m._forward_hooks), len(vars(m))) for m in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())


def test_dropout_in_train_mode_is_not_taken_for_granted(caplog):
    """The two ways draw other numbers, so the norms cannot be checked: they are made by the way that needs no check."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 5)).double()
    with caplog.at_level(logging.INFO, logger="nabla_tau"):
        assert sample_gradient_norms(model, sample(vectors, 5)).isfinite().all()
    assert "or chance does" in caplog.text
    assert sample_gradient_norms(model.eval(), sample(vectors, 5)).isfinite().all()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype, monkeypatch):
    forbid_one_by_one(monkeypatch)
    for name in ("cnn", "transformer"):
        make, data = BY_LAYERS[name]
        model, (x, y) = build(make).to(dtype), sample(data, 6)
        batch = (x.to(dtype) if x.is_floating_point() else x), y
        norms = sample_gradient_norms(model, batch)
        assert norms.dtype == torch.float32
        exact = norms_of(gradients(build(make).to(dtype).double(), tuple(t.double() if t.is_floating_point() else t for t in batch)))  # fmt: skip # noqa: E501
        torch.testing.assert_close(norms.double(), exact, rtol=1e-4 if dtype == torch.float32 else 0.1, atol=0)
        assert all(value.dtype == torch.float32 for value in fisher_diagonal(model, [batch]).values())


def test_autocast(monkeypatch):
    forbid_one_by_one(monkeypatch)
    for name in ("cnn", "transformer, position embedding"):
        make, data = BY_LAYERS[name]
        model, (x, y) = build(make), sample(data, 6)
        exact = norms_of(gradients(model, (x, y)))
        with torch.autocast("cpu", torch.bfloat16):
            found = sample_gradient_norms(model.float(), ((x.float() if x.is_floating_point() else x), y))
        torch.testing.assert_close(found.double(), exact, rtol=0.1, atol=0)


def test_models_without_per_sample_gradients_are_refused():
    model, batch = build(Net).train(), sample(images, 5)
    with pytest.raises(ValueError, match="layers.1 normalises with the statistics of its batch"):
        sample_gradient_norms(model, batch)
    with pytest.raises(ValueError, match="no trainable parameter"):
        sample_gradient_norms(mlp().requires_grad_(False), sample(vectors, 5))


def test_samples_that_influence_each_other_are_noticed(caplog):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x):
            x = self.first(x)
            return self.head(F.relu(x - x.mean(0)))

    with caplog.at_level(logging.INFO, logger="nabla_tau"):
        sample_gradient_norms(build(Mixing), sample(vectors, 5))
    assert "influence each other" in caplog.text
