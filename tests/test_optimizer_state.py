"""A step that calls the kernel of torch's fused AdamW itself is that of torch.optim, bit for bit, or it is torch's."""

import copy

import pytest
import torch
from conftest import mlp
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nabla_tau.optimizer_state import Stepper, adamw


def two_groups(model, **settings):
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is of] for of in (True, False))
    return adamw([(matrices, 1e-2), (vectors, 3e-3)], betas=(0.9, 0.95), **settings)


def learn(model, optimizer, take_step, steps, *, without=()):
    """`without`: steps of which the last parameter has no gradient. Of some steps another learning rate."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
        if step in without:
            parameter.grad = None
        for group in optimizer.param_groups:
            group["lr"] *= 0.5 if step % 3 == 2 else 1.0
        take_step()


@pytest.fixture
def calls(monkeypatch):
    """How often torch.optim takes a step."""
    taken, step = [], torch.optim.AdamW.step

    def counted(self, *args):
        taken.append(self)
        return step(self, *args)

    counted.hooked = True
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("without", [(), (0,), (4,), range(9)], ids=str)
def test_the_same_weights_and_state_as_torch(dtype, without, calls):
    torch.manual_seed(0)
    model = mlp().to(dtype)
    other = copy.deepcopy(model)
    optimizer, wanted = two_groups(model, weight_decay=0.1), two_groups(other, weight_decay=0.1)
    learn(model, optimizer, Stepper(optimizer), 9, without=without)
    by_torch = len(calls)
    learn(other, wanted, wanted.step, 9, without=without)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == wanted.state[b].keys()
        assert all(torch.equal(optimizer.state[a][name], wanted.state[b][name]) for name in wanted.state[b])
    assert by_torch == {(): 1, (0,): 2, (4,): 2, range(9): 9}[without]


def test_state_that_is_loaded_is_gone_on_from(calls):
    torch.manual_seed(0)
    model = mlp()
    optimizer = two_groups(model)
    take_step = Stepper(optimizer)
    learn(model, optimizer, take_step, 3)
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    learn(model, optimizer, take_step, 3)
    once = copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    learn(model, optimizer, take_step, 3)
    assert all(torch.equal(once[name], value) for name, value in model.state_dict().items())
    assert len(calls) == 2, "the first step, and the first on the state that was loaded"


@pytest.mark.parametrize("everywhere", [True, False])
def test_hooks_are_called(everywhere):
    model = mlp()
    optimizer, seen = two_groups(model), []
    take_step = Stepper(optimizer)
    learn(model, optimizer, take_step, 2)
    register = register_optimizer_step_pre_hook if everywhere else optimizer.register_step_pre_hook
    handle = register(lambda *_: seen.append(1))
    try:
        learn(model, optimizer, take_step, 3)
    finally:
        handle.remove()
    assert len(seen) == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=False),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True, maximize=True),
        lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    ],
    ids=["not fused", "amsgrad", "maximize", "Adam", "SGD"],
)
def test_of_any_other_optimizer_torch_takes_the_step(make):
    torch.manual_seed(0)
    model = mlp()
    other = copy.deepcopy(model)
    optimizer, wanted = (make(list(of.parameters())) for of in (model, other))
    learn(model, optimizer, Stepper(optimizer), 4)
    learn(other, wanted, wanted.step, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
