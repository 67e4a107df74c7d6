"""What every method gets from the loop, and the simple ones against loops written out by hand."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Data, Pairs, blobs, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nabla_tau import unlearn
from nabla_tau.evaluation import evaluate
from nabla_tau.job import FORGET, RETAIN
from nabla_tau.methods import METHODS
from nabla_tau.methods.finetune import Finetune
from nabla_tau.methods.last_layers import CFk, EUk
from nabla_tau.methods.neg_grad import NegGrad, NegGradPlus
from nabla_tau.methods.retrain import Retrain
from nabla_tau.sources import Stream, as_source


def with_norm() -> nn.Module:
    """A model that differs between train and eval mode."""
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, dict[str, Data]]:
    x, y = blobs(520)
    x = x.double()
    parts = {"forget": (x[:50], y[:50]), "retain": (x[50:320], y[50:320]), "held_out": (x[320:], y[320:])}
    torch.manual_seed(0)
    return train(with_norm().double(), (x[:320], y[:320]), epochs=60), parts


def by_hand(
    model: nn.Module,
    parts: dict[str, Data],
    optimizer: torch.optim.Optimizer,
    steps: int,
    sizes: tuple[int, int],
    loss: Callable[..., Tensor],
    rate: Callable[[float], float],
    *,
    training: bool,
) -> nn.Module:
    """A loop of its own. loss: (model, forget batch, retain batch); sizes 0: no such batch."""
    streams = [
        Stream(as_source(parts[name], name), size, 0, role) if size else None
        for name, role, size in (("forget", FORGET, sizes[0]), ("retain", RETAIN, sizes[1]))
    ]
    start = optimizer.param_groups[0]["lr"]
    model.train(training)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = start * rate(step / steps)
        optimizer.zero_grad()
        loss(model, *(stream.next() if stream else None for stream in streams)).backward()
        optimizer.step()
    return model.eval()


def assert_same(found: nn.Module, wanted: nn.Module, tolerance: float = 1e-10) -> None:
    wanted_state = wanted.state_dict()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, wanted_state[name], rtol=tolerance, atol=tolerance, msg=name)


def quietly(model: nn.Module, parts: dict[str, Any], method: Any, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return unlearn(model, **parts, method=method, **settings)


def retain_loss(model: nn.Module, _: Data, retain: Data) -> Tensor:
    return F.cross_entropy(model(retain[0]), retain[1])


def test_finetune_is_the_plain_loop(trained):
    model, parts = trained
    found = quietly(model, parts, Finetune(epochs=2, learning_rate=3e-3, batch_size=64)).model
    own = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(own.parameters(), 3e-3, weight_decay=0.01)
    wanted = by_hand(own, parts, optimizer, 10, (0, 64), retain_loss, lambda done: 1 - 0.9 * done, training=True)
    assert_same(found, wanted)
    assert not torch.equal(found[1].running_mean, model[1].running_mean), "train mode: the norm has learned"


def test_neg_grad_is_the_plain_loop(trained):
    model, parts = trained
    found = quietly(model, parts, NegGrad(epochs=3, learning_rate=0.05, batch_size=20)).model
    own = copy.deepcopy(model)
    optimizer = torch.optim.SGD(own.parameters(), 0.05, momentum=0.9)
    wanted = by_hand(
        own, parts, optimizer, 9, (20, 0), lambda m, f, r: -F.cross_entropy(m(f[0]), f[1]), lambda _: 1, training=False
    )
    assert_same(found, wanted)


def test_neg_grad_plus_is_the_plain_loop(trained):
    model, parts = trained
    method = NegGradPlus(alpha=0.7, decay=0.1, epochs=2, learning_rate=0.05, batch_size=64)
    found = quietly(model, parts, method).model
    own = copy.deepcopy(model)
    before = [p.detach().clone() for p in own.parameters()]

    def loss(m: nn.Module, forget: Data, retain: Data) -> Tensor:
        distance = sum(((p - b) ** 2).sum() for p, b in zip(m.parameters(), before, strict=True))
        kept = F.cross_entropy(m(retain[0]), retain[1]) + 0.1 / 2 * distance
        return 0.7 * kept - 0.3 * F.cross_entropy(m(forget[0]), forget[1])

    optimizer = torch.optim.SGD(own.parameters(), 0.05, momentum=0.9)
    assert_same(found, by_hand(own, parts, optimizer, 10, (50, 64), loss, lambda d: 1 - d, training=False))


def test_retrain_starts_from_nothing_that_was_learned(trained):
    model, parts = trained
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*other.parameters(), other[1].running_mean]:
            tensor.add_(1.0)
    method = Retrain(epochs=10, learning_rate=1e-2, batch_size=64)
    first, second = (quietly(m, parts, method).model for m in (model, other))
    assert_same(first, second, 0.0)
    assert not torch.allclose(quietly(model, parts, method, seed=1).model[0].weight, first[0].weight, atol=1e-2)
    with torch.no_grad():
        x, y = parts["retain"]
        assert F.cross_entropy(first(x), y) < 0.8 * F.cross_entropy(with_norm().double().eval()(x), y)


@pytest.mark.parametrize("method", [CFk(k=1, epochs=1), EUk(k=1, epochs=1, min_steps=1)])
def test_only_the_last_layers_move(trained, method):
    model, parts = trained
    found = quietly(model, parts, method).model
    assert torch.equal(found[0].weight, model[0].weight)
    assert torch.equal(found[1].weight, model[1].weight)
    assert not torch.equal(found[3].weight, model[3].weight)
    # A new layer has nothing left of the old one; a finetuned one has most of it.
    along = F.cosine_similarity(found[3].weight.flatten(), model[3].weight.flatten(), dim=0)
    assert (along > 0.9) == (method.name == "cf-k")


def test_layers_that_there_are_not(trained):
    model, parts = trained
    with pytest.raises(ValueError, match="k must be between 1 and the 3 layers .* got 4"):
        quietly(model, parts, CFk(k=4))


def test_a_parameter_that_nobody_can_initialise(trained):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = with_norm().double(), nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    model = Scaled()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"parameter scale of a Scaled, shape \(4,\), has no reset_parameters"):
        quietly(model, trained[1], "retrain", inplace=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Every method
# ---------------------------------------------------------------------------------------------------------------------

NAMES = sorted(METHODS)
NEED_NUMBERS = {"amnesiac"}  # methods that must know which sample is which


def short(name: str) -> Any:
    """The method, with as few passes as it has settings for."""
    method = METHODS[name]
    fields = {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    few: dict[str, Any] = {"epochs": 1, "batch_size": 32, "steps": 6, "iterations": 6, "min_steps": 1, "selection": 1.5}
    few |= {"layer": "2"} if name == "rmu" else {}
    if name.startswith("scrub"):
        few["epochs"] = 3  # to rewind among
    return dataclasses.replace(method, **{k: v for k, v in few.items() if k in fields})  # type: ignore[type-var]


def setting_for(name: str, trained: tuple[nn.Module, dict[str, Data]]) -> tuple[nn.Module, dict[str, Any]]:
    model, parts = trained
    if name != "unsir":
        return model, parts
    # A class that is forgotten as a whole.
    x, y = (torch.cat(columns) for columns in zip(parts["forget"], parts["retain"], strict=True))
    gone = y == 1
    return model, parts | {"forget": (x[gone], y[gone]), "retain": (x[~gone], y[~gone])}


@pytest.mark.parametrize("name", NAMES)
def test_result_and_model_given(trained, name):
    model, parts = setting_for(name, trained)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    result = quietly(model, parts, short(name))
    assert (result.method, result.recipe) == (name, name)
    assert len(result.history["step"]) == result.settings["steps"]
    assert {"tau_before", "tau_after"} <= result.settings.keys()
    for when, of in (("before", model), ("after", result.model)):
        of_forget = evaluate(of, parts["forget"]).loss.mean()
        assert result.settings[f"forget_loss_{when}"] == pytest.approx(of_forget, rel=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes == [m.training for m in result.model.modules()]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.isfinite(p).all() for p in result.model.parameters())
    assert any(not torch.equal(value, before[key]) for key, value in result.model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_cut_off_and_resumed_is_the_whole_run(trained, name, tmp_path):
    model, parts = setting_for(name, trained)
    method = short(name)
    whole = quietly(model, parts, method)
    if whole.settings["steps"] < 2:
        pytest.skip("there is nothing to cut")
    cuts = {1, whole.settings["steps"] // 2, whole.settings["steps"] - 1}
    for cut in cuts:

        def stop(values: dict[str, float], step: int, cut: int = cut) -> None:
            if step >= cut:
                raise KeyboardInterrupt

        path = tmp_path / f"{cut}.ckpt"
        with pytest.raises(KeyboardInterrupt):
            quietly(model, parts, method, checkpoint=path, checkpoint_every=1, log=stop)
        resumed = quietly(model, parts, method, checkpoint=path, resume=True)
        assert_same(resumed.model, whole.model, 0.0)
        for column, values in whole.history.items():
            if column != "samples_per_second":
                torch.testing.assert_close(resumed.history[column], values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_datasets_and_loaders_serve_as_tensors_do(trained, name):
    model, parts = setting_for(name, trained)
    method = short(name)
    wanted = quietly(model, parts, method, performance="off")
    datasets = {key: Pairs(part) for key, part in parts.items()}
    assert_same(quietly(model, datasets, method, performance="off").model, wanted.model)
    loaders = {key: DataLoader(TensorDataset(*part), batch_size=32, shuffle=True) for key, part in parts.items()}
    if name in NEED_NUMBERS:
        with pytest.raises(ValueError, match=f"{name} does not work with a DataLoader"):
            quietly(model, loaders, method)
    else:
        assert all(torch.isfinite(p).all() for p in quietly(model, loaders, method).model.parameters())


def test_a_pass_does_not_end_with_a_batch_of_one(trained):
    model, parts = trained
    x, y = parts["retain"]
    for count in (65, 129):
        result = quietly(model, parts | {"retain": (x[:count], y[:count])}, Finetune(epochs=1, batch_size=64))
        assert result.settings["steps"] == count // 64


def test_what_is_no_method(trained):
    model, parts = trained
    with pytest.raises(ValueError, match="method must be one of nabla-tau, .*finetune.* got 'magic'"):
        unlearn(model, **parts, method="magic")
    with pytest.raises(TypeError, match="method must be a name or an object of nabla_tau.methods, got 3"):
        unlearn(model, **parts, method=3)
    with pytest.raises(ValueError, match="recipe is of nabla-tau, got recipe 'paper' and method 'finetune'"):
        unlearn(model, **parts, method="finetune", recipe="paper")
    with pytest.raises(ValueError, match="micro_batch_size is for nabla-tau"):
        unlearn(model, **parts, method="finetune", micro_batch_size=3)


def test_a_loss_that_explodes_leaves_the_last_good_weights(trained):
    from nabla_tau import NonFiniteLossError

    model, parts = trained
    with pytest.raises(NonFiniteLossError) as caught:
        quietly(model, parts, NegGrad(epochs=200, learning_rate=1e30))
    assert all(torch.isfinite(p).all() for p in caught.value.result.model.parameters())


def test_weights_that_are_a_part_of_a_larger_tensor(trained):
    """The kernel of fused AdamW walks over memory: it would write between their rows."""
    model = copy.deepcopy(trained[0])
    layer = model[0]
    width = layer.in_features
    whole = torch.full((layer.out_features, 2 * width), 7.0, dtype=torch.float64)
    whole[:, :width] = layer.weight.detach()
    before = whole.clone()
    layer.weight = nn.Parameter(whole[:, :width])
    quietly(model, trained[1], "finetune", inplace=True)
    assert torch.equal(whole[:, width:], before[:, width:])
    assert (whole != before).any(1).all(), "every row has moved"
