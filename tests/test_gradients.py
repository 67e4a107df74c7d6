"""Dual gradients are those of two backwards, whichever way they are taken, and leave nothing behind."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from conftest import mlp
from layer_models import BY_LAYERS, NOT_BY_LAYERS, Bags, Net, Recurrent, Transformer, build, images, sample, vectors
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from nabla_tau import capture
from nabla_tau.functional import sample_losses
from nabla_tau.gradients import ONE, DualGradients


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def losses_of(model, batch):
    *inputs, targets = batch
    return sample_losses(model(*inputs), targets)


def wanted(model, batch, weights, n, parameters=None):
    """By two forwards and two backwards of each part's losses alone."""
    found = []
    for part in (slice(0, n), slice(n, None)):
        losses = losses_of(model, batch)[part]
        if losses.numel() and weights[part].any():
            found.append(torch.autograd.grad(losses @ weights[part], parameters or trainable(model), allow_unused=True))
        else:
            found.append([None] * len(parameters or trainable(model)))
    return found


def dual_step(dual, batch, weights, n):
    with dual.watch():
        losses = losses_of(dual.model, batch)
    return dual.backward(losses, weights, n)


def assert_same(found, truth, rtol=1e-10):
    for ours, theirs in zip(found, truth, strict=True):
        scale = max((float(g.abs().max()) for g in theirs if g is not None), default=0)
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("name", BY_LAYERS)
def test_one_backward_gives_both(name, n):
    make, data = BY_LAYERS[name]
    model = build(make)
    dual = DualGradients(model, trainable(model))
    for seed, count in enumerate((5, 5, 9)):  # the first batch is also compared, the others are not
        batch, weights = sample(data, count, seed), torch.randn(count).double()
        assert_same(dual_step(dual, batch, weights, n), wanted(model, batch, weights, n))
        assert dual.how == ONE


@pytest.mark.parametrize("name", NOT_BY_LAYERS)
def test_where_layers_do_not_tell_there_are_two_and_a_reason(name, caplog):
    make, data, layer = NOT_BY_LAYERS[name]
    model = build(make)
    dual = DualGradients(model, trainable(model))
    with caplog.at_level(logging.INFO, logger="nabla_tau"):
        for seed in range(3):
            batch, weights = sample(data, 6, seed), torch.randn(6).double()
            assert_same(dual_step(dual, batch, weights, 2), wanted(model, batch, weights, 2))
    assert dual.how.startswith(f"two backwards: {layer}")
    assert [record.message for record in caplog.records] == [f"dual gradients take {dual.how}"]


def test_autograd_computes_no_weight_gradient_beside():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 5 * 6, 7), nn.Linear(7, 5)).double()
    batch, weights = sample(images, 6), torch.ones(6).double()
    dual = DualGradients(model, trainable(model))
    dual_step(dual, batch, weights, 2)
    with dual.watch():
        losses = losses_of(model, batch)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        dual.backward(losses, weights, 2)
    names = [event.name() for event in recorded.profiler.kineto_results.events()]
    # Two linear layers: two input gradients and two parts of two weights'. The convolution comes first.
    assert names.count("aten::mm") == 2 + 4
    assert names.count("aten::convolution_backward") == 2


@pytest.mark.parametrize("n", [0, 5])
def test_a_part_without_samples_has_no_gradient(n):
    model, batch = build(Net), sample(images, 5)
    dual, weights = DualGradients(model, trainable(model)), torch.randn(5).double()
    for count in (2, n, n):
        found = dual_step(dual, batch, weights, count)
    assert_same(found, wanted(model, batch, weights, n))
    assert found[n == 5] == [None] * len(trainable(model))


@pytest.mark.parametrize("dead", [0, 1])
def test_a_part_of_zero_weights_costs_nothing(dead, monkeypatch):
    model, batch = build(Net), sample(images, 5)
    dual, weights = DualGradients(model, trainable(model)), torch.ones(5).double()
    dual_step(dual, batch, weights, 2)
    weights[slice(2) if dead == 0 else slice(2, None)] = 0
    backwards = []
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, f=torch.autograd.grad, **k: backwards.append(1) or f(*a, **k)
    )
    found = dual_step(dual, batch, weights, 2)
    assert found[dead] == [None] * len(trainable(model))
    assert len(backwards) == 1
    monkeypatch.undo()
    assert_same(found, wanted(model, batch, weights, 2))
    assert dual_step(dual, batch, 0 * weights, 2) == ([None] * len(found[0]),) * 2


def test_frozen_unlisted_and_unreached_parameters():
    model = build(BY_LAYERS["called twice"][0])
    model.layer.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    listed = [model.unused.weight, model.norm.bias, model.other.weight, model.layer.bias]
    batch, weights = sample(vectors, 5), torch.randn(5).double()
    dual = DualGradients(model, listed)
    for _ in range(2):
        found = dual_step(dual, batch, weights, 2)
        assert_same(found, wanted(model, batch, weights, 2, listed))
    assert dual.how == ONE
    assert found[0][0] is None
    assert found[1][0] is None


def test_deep_parameters_alone():
    """No listed layer sees an input without gradient: the first of them is where the backward ends."""
    model = build(Net)
    listed = list(model.layers[-1].parameters())
    batch, weights = sample(images, 5), torch.randn(5).double()
    dual = DualGradients(model, listed)
    for _ in range(2):
        assert_same(dual_step(dual, batch, weights, 2), wanted(model, batch, weights, 2, listed))
    assert dual.how == ONE


@pytest.mark.parametrize("last", [False, True])
def test_bags_that_lie_end_to_end(last):
    model = build(lambda: Bags("sum"))
    model.bag.include_last_offset = last
    tokens, targets = torch.randint(12, (11,)), torch.randint(5, (4,))
    offsets = torch.tensor([0, 3, 3, 9] + [11] * last)  # the second is empty
    batch, weights = (tokens, offsets, torch.rand(11).double(), targets), torch.randn(4).double()
    dual = DualGradients(model, trainable(model))
    for n in (2, 1):
        assert_same(dual_step(dual, batch, weights, n), wanted(model, batch, weights, n))
    assert dual.how == ONE


class Broken(RuntimeError):
    pass


def state_of(model):
    return [
        (m._forward_hooks.copy(), m._forward_pre_hooks.copy(), m._backward_hooks.copy(), m.training, list(vars(m)))
        for m in model.modules()
    ] + [(p.requires_grad, p.grad, p._backward_hooks) for p in model.parameters()]


@pytest.mark.parametrize("where", ["nowhere", "forward", "backward"])
def test_nothing_is_left_on_the_model(where):
    model, batch = build(Net), sample(images, 5)
    model.layers[0].weight.requires_grad_(False)
    kept = model.layers[3].register_forward_hook(lambda *_: None)
    before = state_of(model)
    dual = DualGradients(model, trainable(model))

    def run():
        with dual.watch():
            losses = losses_of(model, batch)
            assert len(model.layers[3]._forward_hooks) == 2
            if where == "forward":
                raise Broken
        if where == "backward":
            losses.register_hook(lambda _: (_ for _ in ()).throw(Broken()))
        return dual.backward(losses, torch.ones(5).double(), 2)

    if where == "nowhere":
        run()
    else:
        with pytest.raises(Broken):
            run()
    assert state_of(model) == before
    kept.remove()
    with pytest.raises(RuntimeError, match="one forward"):
        dual.backward(torch.ones(5), torch.ones(5), 2)


def test_a_forward_that_is_not_used_is_freed():
    model = build(BY_LAYERS["mlp"][0])
    dual = DualGradients(model, trainable(model))
    gc.disable()
    try:
        x = torch.randn(5, 6).double()
        gone = weakref.ref(x)
        with dual.watch():
            losses = losses_of(model, (x, torch.zeros(5, dtype=torch.int64)))
        dual.backward(losses, torch.ones(5).double(), 2)
        del x, losses
        assert gone() is None
    finally:
        gc.enable()


def test_a_hook_of_the_users_that_replaces_the_output_is_seen_through():
    model, batch = build(BY_LAYERS["mlp"][0]), sample(vectors, 5)
    model[0].register_forward_hook(lambda module, args, output: 3 * output)
    dual, weights = DualGradients(model, trainable(model)), torch.randn(5).double()
    for _ in range(2):
        assert_same(dual_step(dual, batch, weights, 2), wanted(model, batch, weights, 2))
    assert dual.how == ONE


class Patched(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", ["subclass", "instance", "parametrised", "batch statistics", "checkpoint", "in place"])
def test_a_layer_that_is_not_what_it_seems(kind):
    model, batch = build(BY_LAYERS["mlp"][0]), sample(vectors, 5)
    losses = losses_of
    if kind == "subclass":
        model[0] = Patched(6, 7).double()
    elif kind == "instance":
        plain = model[0].forward
        model[0].forward = lambda x: plain(2 * x)
    elif kind == "parametrised":
        nn.utils.parametrizations.weight_norm(model[0])
    elif kind == "batch statistics":
        model[1] = nn.BatchNorm1d(7, affine=False).double().train()
    elif kind == "checkpoint":
        first = model[0:3]

        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = first, model[3]

            def forward(self, x):
                return self.last(torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False))

        model_of = Checkpointed()
    elif kind == "in place":  # the product is a view, and autograd makes its node anew

        class InPlace(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, x):
                hidden = self.model[0](x.unsqueeze(1)).tanh_()
                return self.model[3](self.model[2](hidden)).squeeze(1)

        model_of = InPlace()
    model = model_of if kind in ("checkpoint", "in place") else model
    dual, weights = DualGradients(model, trainable(model)), torch.randn(5).double()
    for _ in range(2):
        found = dual_step(dual, batch, weights, 2)
        if kind == "batch statistics":  # the parts are those of the mixed batch
            truth = [
                torch.autograd.grad(losses(model, batch)[part] @ weights[part], trainable(model))
                for part in (slice(2), slice(2, None))
            ]
        else:
            truth = wanted(model, batch, weights, 2)
        assert_same(found, truth)
    assert dual.how.startswith("two backwards: ")
    # Seen beforehand, but for batch statistics, which no layer with parameters shows.
    assert ("its gradient by rows" in dual.how) == (kind == "batch statistics")


class Doubled(nn.Module):
    """The shift counts twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.shift = nn.Linear(6, 5), nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return torch.add(self.layer(x), self.shift, alpha=2)


@pytest.mark.parametrize("make", [Doubled, lambda: nn.Sequential(Bags("max"))])
def test_what_is_known_to_be_no_sum_over_rows_is_not_tried(make):
    model = build(make)
    data = BY_LAYERS["bags, sum"][1] if isinstance(model, nn.Sequential) else vectors
    dual, batch, weights = DualGradients(model, trainable(model)), sample(data, 5), torch.randn(5).double()
    assert_same(dual_step(dual, batch, weights, 2), wanted(model, batch, weights, 2))
    assert dual.how.startswith("two backwards: ")
    assert "its gradient by rows" not in dual.how


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "transformer, position embedding"])
def test_only_the_first_layers_outputs_keep_their_gradients(name):
    """Autograd holds the gradient of every tensor that it is asked for until the backward is over."""
    make, data = BY_LAYERS[name]
    model, batch = build(make), sample(data, 5)
    with capture.recording(model, trainable(model)) as tape:
        losses = losses_of(model, batch)
    survey = tape.survey(losses, trainable(model))
    assert len(survey.roots) == 1
    assert survey.ends == []
    assert len(survey.calls) >= 3


def test_what_requires_a_gradient_and_the_modes_may_change():
    model, batch = build(Net), sample(images, 5)
    parameters, weights = trainable(model), torch.randn(5).double()
    dual = DualGradients(model, parameters)
    dual_step(dual, batch, weights, 2)
    model.layers[0].weight.requires_grad_(False)
    found = dual_step(dual, batch, weights, 2)
    assert dual.how == ONE
    assert found[0][0] is None
    assert_same([part[1:] for part in found], wanted(model, batch, weights, 2))
    model.train()
    model.layers[1].eval()
    dual_step(dual, batch, weights, 2)
    assert dual.how == ONE
    model.layers[1].train()
    dual_step(dual, batch, weights, 2)
    assert dual.how.startswith("two backwards: layers.1 (BatchNorm2d)")
    model.eval()
    dual_step(dual, batch, weights, 2)
    assert dual.how == ONE


def test_a_parameter_used_elsewhere_in_a_later_batch_is_noticed():
    """The first batch is compared, and every batch's graph is searched."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head, self.also = nn.Linear(6, 6), nn.Linear(6, 5), False

        def forward(self, x):
            x = self.layer(x)
            return self.head(F.linear(x, self.layer.weight) if self.also else x)

    model, weights = build(Sometimes), torch.randn(5).double()
    dual, batch = DualGradients(model, trainable(model)), sample(vectors, 5)
    dual_step(dual, batch, weights, 2)
    assert dual.how == ONE
    model.also = True
    assert_same(dual_step(dual, batch, weights, 2), wanted(model, batch, weights, 2))
    assert dual.how.startswith("two backwards: layer (Linear): weight is used outside")


def test_an_input_modified_in_place_is_an_error():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)).double()
    batch, weights = sample(vectors, 5), torch.ones(5).double()
    dual = DualGradients(model, trainable(model))
    dual_step(dual, batch, weights, 2)
    with dual.watch():
        losses = losses_of(model, batch)
    batch[0].zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        dual.backward(losses, weights, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    model = build(Net).to(dtype)
    x, y = sample(images, 8)
    dual, weights = DualGradients(model, trainable(model)), torch.randn(8)
    exact, exact_batch = build(Net).to(dtype).double(), (x.to(dtype).double(), y)
    for _ in range(2):
        found = dual_step(dual, (x.to(dtype), y), weights, 3)
    assert dual.how == ONE
    truth, plain = (wanted(m, b, w, 3) for m, b, w in
                    ((exact, exact_batch, weights.double()), (model, (x.to(dtype), y), weights)))  # fmt: skip
    for ours, theirs, true in zip(found, plain, truth, strict=True):
        for a, b, c in zip(ours, theirs, true, strict=True):
            assert a.dtype == dtype
            slack = 4 * torch.finfo(dtype).eps * c.norm()
            assert (a.double() - c).norm() <= 1.5 * (b.double() - c).norm() + slack


def test_autocast():
    for make, data in (BY_LAYERS["cnn"], BY_LAYERS["transformer"], BY_LAYERS["transformer, position parameters"]):
        model, (x, y) = build(make).float(), sample(data, 8)
        batch, weights = (x.float() if x.is_floating_point() else x, y), torch.randn(8)
        dual = DualGradients(model, trainable(model))
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                with dual.watch():
                    losses = losses_of(model, batch)
                found = dual.backward(losses, weights, 3)
        assert dual.how == ONE
        with torch.autocast("cpu", torch.bfloat16):
            truth = wanted(model, batch, weights, 3)
        for ours, theirs in zip(found, truth, strict=True):
            scale = torch.stack([b.norm() for b in theirs if b is not None]).norm()
            for a, b in zip(ours, theirs, strict=True):
                assert a.dtype == b.dtype == torch.float32
                assert (a - b).norm() <= 0.03 * b.norm() + 1e-2 * scale


def test_weights_and_sizes_that_do_not_fit():
    model = mlp()
    dual = DualGradients(model, trainable(model))
    batch = torch.randn(5, 8), torch.zeros(5, dtype=torch.int64)

    def losses():
        with dual.watch():
            return losses_of(model, batch)

    with pytest.raises(RuntimeError, match="one forward"):
        dual.backward(torch.ones(5), torch.ones(5), 1)
    with pytest.raises(ValueError, match=r"\(5,\) and \(4,\)"):
        dual.backward(losses(), torch.ones(4), 1)
    with pytest.raises(ValueError, match="between 0 and 5.*got 6"):
        dual.backward(losses(), torch.ones(5), 6)
    with pytest.raises(TypeError, match="detach"):
        dual.backward(losses(), torch.ones(5, requires_grad=True), 1)
    for parameters, message in (
        ([], "empty"),
        ([nn.Parameter(torch.ones(3))], r"\(3,\), is not one of the model's"),
        ([model[0].weight] * 2, "2 entries, some of them the same"),
    ):
        with pytest.raises(ValueError, match=message):
            DualGradients(model, parameters)
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="does not require a gradient"):
        DualGradients(model, [model[0].weight])


def test_a_wrapper_or_a_compiled_model_takes_two_backwards():
    for model in (torch.compile(mlp(), backend="eager"), torch.compile(Recurrent(), backend="eager")):
        x = torch.randn(4, 8) if "lstm" not in dict(model.named_children()).get("_orig_mod", model)._modules else None
        batch = (torch.randn(4, 7, 3) if x is None else x), torch.zeros(4, dtype=torch.int64)
        dual = DualGradients(model, trainable(model))
        found = dual_step(dual, batch, torch.ones(4), 2)
        assert dual.how.startswith("two backwards: the model (OptimizedModule) is compiled")
        assert_same(found, wanted(model, batch, torch.ones(4), 2), rtol=1e-4)


@pytest.mark.parametrize("positions", ["parameter", "module"])
def test_a_transformer_of_one_sample_and_then_more(positions):
    """Of one sample there is nothing to take apart, and nothing is decided by it. Six have as many tokens each, so that
    the rows of the position embedding could be taken for samples."""
    model = build(lambda: Transformer(positions=positions))
    dual = DualGradients(model, trainable(model))
    for count in (1, 5, 1, 6):
        batch, weights = sample(BY_LAYERS["transformer"][1], count), torch.randn(count).double()
        assert_same(dual_step(dual, batch, weights, 1), wanted(model, batch, weights, 1))
    assert dual.how == ONE
