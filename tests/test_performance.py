"""What `performance="auto"` does to a model is invisible but for rounding."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nabla_tau import Unlearner, unlearn
from nabla_tau.performance import Performance, channels_last
from nabla_tau.rewriting import find_pairs, rewritten

B = 6


class Residual(nn.Module):
    """Two branches, each a convolution and its norm, that are added; ResNet's block with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.project, self.project_norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)) + self.project_norm(self.project(x))
        return self.head(self.pool(self.relu(x)).flatten(1))


class Uses(nn.Module):
    """A convolution's output that something beside its norm takes: `how` says what."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.norm, self.head = how, nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        z = self.conv(x)
        y = self.norm(z)
        if self.how == "skip":
            y = y + z
        if self.how == "detached":
            y = y * z.detach().exp()
        if self.how == "norm twice":
            y = self.norm(y)
        if self.how == "layer twice":
            y = y + self.conv(x + 1)
        return self.head(y.mean(2))


def head(width):
    return nn.Flatten(), nn.Linear(width, 3)


def cnn(**conv):
    return nn.Sequential(nn.Conv2d(3, 4, 3, **conv), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), *head(36))


MODELS = {
    "cnn": (lambda: cnn(), (3, 8, 8), (1, 1)),
    "no bias": (lambda: cnn(bias=False), (3, 8, 8), (1, 1)),
    "circular": (lambda: cnn(padding=1, padding_mode="circular", stride=1, dilation=2), (3, 8, 8), (1, 1)),
    "residual": (Residual, (3, 8, 8), (2, 1)),
    "one channel": (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), *head(108)), (1, 8, 8), (1, 0)),
    "table": (lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), (5,), (1, 0)),
    "no affine": (lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, affine=False), *head(8)), (5,), (1, 0)),
    "plain use": (lambda: Uses(""), (2, 9), (1, 0)),
    "skip": (lambda: Uses("skip"), (2, 9), (0, 0)),
    "detached": (lambda: Uses("detached"), (2, 9), (0, 0)),
    "norm twice": (lambda: Uses("norm twice"), (2, 9), (0, 0)),
    "layer twice": (lambda: Uses("layer twice"), (2, 9), (0, 0)),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), (5,), (0, 0)),
    "linear over positions": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(2), *head(8)), (2, 5), (0, 0)),
}  # fmt: skip


def build(name, dtype=torch.float64):
    make, shape, pairs = MODELS[name]
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 3)
                if module.affine:
                    module.weight.normal_()
                    module.bias.normal_()
    return model, (torch.randn(B, *shape, dtype=dtype), torch.randint(3, (B,))), pairs


def gradients(model, forward, batch):
    model.zero_grad()
    logits, targets = forward(model, batch)
    F.cross_entropy(logits, targets).backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_stay(name):
    model, batch, (norms, pools) = build(name)
    wanted = gradients(model, lambda m, b: (m(b[0]), b[1]), batch)
    inputs = batch[0].clone()
    performance = Performance(model)
    performance.look(batch)
    settings = performance.settings()
    assert (settings["folded_norms"], settings["pooled_first"]) == (norms, pools)
    with performance.active():
        found = gradients(model, performance.forward, batch)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert torch.equal(batch[0], inputs)
    assert not any("forward" in vars(module) for module in model.modules())


def test_pooling_before_relu_changes_no_bit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1), *head(36))
    x, y = torch.randn(B, 3, 8, 8).round(decimals=0), torch.randint(3, (B,))
    x[0] = -100.0  # whole windows below zero, and ties
    wanted = gradients(model, lambda m, b: (m(b[0]), b[1]), (x, y))
    pairs = find_pairs(model, lambda: model(x))
    assert len(pairs) == 1
    with rewritten(pairs):
        found = gradients(model, lambda m, b: (m(b[0]), b[1]), (x, y))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_norm_in_train_mode_is_never_folded():
    model, batch, _ = build("cnn")
    model.train()
    performance = Performance(model)
    performance.look(batch)
    assert performance.settings()["folded_norms"] == 0
    model.eval()
    performance.look(batch)
    assert performance.settings()["folded_norms"] == 1
    model.train()
    assert performance.settings()["folded_norms"] == 0
    before = model[1].running_mean.clone()
    performance.forward_alone(model, batch)
    assert not torch.equal(model[1].running_mean, before), "the norm saw the batch"


def test_looking_leaves_no_trace():
    model, batch, _ = build("residual")
    model.train()
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    Performance(model).look(batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_modules_that_somebody_watches_are_left_alone():
    model, batch, _ = build("cnn")
    seen = []
    model[1].register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    performance = Performance(model)
    performance.look(batch)
    assert performance.settings()["folded_norms"] == 0
    performance.forward_alone(model, batch)
    assert not torch.equal(*seen[-1])


def test_modules_are_themselves_again_after_an_error():
    model, batch, _ = build("cnn")
    performance = Performance(model)
    performance.look(batch)
    with pytest.raises(RuntimeError):
        performance.forward_alone(model, (batch[0][:, :1], batch[1]))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("channels", [1, 3])
def test_images_keep_their_values_and_get_their_channels_side_by_side(channels):
    x = torch.randn(2, channels, 4, 5)
    y = channels_last(x)
    assert torch.equal(x, y)
    assert y.stride(1) == 1
    assert nn.Conv2d(channels, 8, 3)(y).stride(1) == 1
    table, labels = torch.randn(3, 4), torch.ones(1, 2, 3, 4, dtype=torch.long)
    assert channels_last(table) is table
    assert channels_last(labels) is labels


@pytest.mark.parametrize("balance", [None, 0.25])
def test_a_step_is_the_same_with_and_without(balance):
    """AdamW fused, which walks over memory: a gradient in another layout than its weight would show."""
    steps = {}
    for mode in ("auto", "off"):
        model, (x, y), _ = build("residual")
        unlearner = Unlearner(model, alpha=0.4, tau=3.0, balance=balance, performance=mode)
        losses = [unlearner.step((x[:2], y[:2]), (x[2:], y[2:])).loss]
        gradients = [p.grad.clone() for p in model.parameters()]
        assert unlearner.performance.settings()["folded_norms"] == (2 if mode == "auto" else 0)
        steps[mode] = [*losses, *gradients, *model.state_dict().values()]
    for auto, off in zip(steps["auto"], steps["off"], strict=True):
        torch.testing.assert_close(auto, off, rtol=1e-8, atol=1e-9)


def test_a_result_says_what_was_chosen():
    torch.manual_seed(0)
    x, y = torch.randn(60, 3, 8, 8), torch.randint(3, (60,))
    parts = {"forget": (x[:10], y[:10]), "retain": (x[10:40], y[10:40]), "held_out": (x[40:], y[40:])}
    model = cnn().eval()
    with pytest.warns(UserWarning, match="hardly anything to forget"):
        auto, off = (unlearn(model, **parts, recipe="paper", performance=mode) for mode in ("auto", "off"))
    assert auto.settings["performance"] == "auto"
    assert (auto.settings["channels_last"], auto.settings["folded_norms"]) == (True, 1)
    assert (off.settings["channels_last"], off.settings["folded_norms"]) == (False, 0)
    for ours, theirs in zip(auto.model.state_dict().values(), off.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("recipe", ["paper", "ascent"])
def test_a_model_that_the_caller_compiled_is_taken_as_it_is(recipe):
    torch.manual_seed(0)
    model, x, y = cnn().eval(), torch.randn(60, 3, 8, 8), torch.randint(3, (60,))
    parts = {"forget": (x[:10], y[:10]), "retain": (x[10:40], y[10:40]), "held_out": (x[40:], y[40:])}
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    plain, found = (unlearn(m, **parts, recipe=recipe) for m in (model, compiled))
    assert found.model is not compiled
    assert found.model._orig_mod is not compiled._orig_mod
    assert all(map(torch.equal, compiled.parameters(), model.parameters())), "a copy was unlearned"
    assert found.settings["folded_norms"] == 0
    for ours, theirs in zip(found.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="performance must be one of auto, off, got 'fast'"):
        Unlearner(cnn(), alpha=0.5, performance="fast")
