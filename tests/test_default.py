"""recipe="ascent" is what its documentation says: a plain loop, written here from the formulas alone, gives the same
weights; and each promise that the loop could break without that being noticed has a test of its own."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from conftest import blobs, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from nabla_tau import Unlearner, unlearn
from nabla_tau.evaluation import evaluate
from nabla_tau.job import FORGET, HELD_OUT, RETAIN, WEIGHTS
from nabla_tau.methods.nabla_tau import COLUMNS
from nabla_tau.recipes import ASCENT, Recipe, learning_rate_from_weights
from nabla_tau.result import NonFiniteLossError
from nabla_tau.sources import Stream, as_source, derive_seed

Data = tuple[Tensor, Tensor]

# Models that know nothing, and runs of one step, are warned about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the gate never"),
    pytest.mark.filterwarnings("ignore:there was hardly anything to forget"),
]

# ---------------------------------------------------------------------------------------------------------------------
# The plain loop
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """What the plain loop saw, one entry a step; `left_out`: steps whose forget part had a gradient and was held."""

    columns: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    left_out: int = 0
    taken: int = 0
    scaled_down: int = 0
    measured: dict[str, float] = field(default_factory=dict)


def held_out_table(model: nn.Module, held_out: Data, recipe: Recipe, seed: int, step: int) -> tuple[float, np.ndarray]:
    """Mean of the held-out losses, and the losses at the ranks (k + 1/2) / 512: linear between their mid-ranks."""
    source, draw = as_source(held_out, "held_out"), derive_seed(seed, HELD_OUT, step)
    with torch.no_grad():
        parts = [F.cross_entropy(model(x), y, reduction="none") for x, y in source.sample(recipe.tau_samples, 64, draw)]
    losses = np.sort(torch.cat(parts).numpy())
    assert len(losses) == recipe.tau_samples
    ranks = (np.arange(len(losses)) + 0.5) / len(losses)
    return float(losses.mean()), np.interp((np.arange(512) + 0.5) / 512, ranks, losses)


def plain_default_loop(model: nn.Module, parts: dict[str, Data], recipe: Recipe, seed: int) -> Trace:
    """The docstrings of `Recipe` and `Unlearner` as code, for a random forget set and a recipe like "default"."""
    trace = Trace()
    forget_count, retain_count = len(parts["forget"][1]), len(parts["retain"][1])
    share = forget_count / (forget_count + retain_count)
    forget_size = max(8, round(recipe.forget_ratio * share * recipe.batch_size))
    steps = max(recipe.min_steps, math.ceil(recipe.retain_passes * math.ceil(retain_count / recipe.batch_size)))
    tau_every = round(recipe.tau_every * steps)
    forget = Stream(as_source(parts["forget"], "forget"), forget_size, seed, FORGET)
    retain = Stream(as_source(parts["retain"], "retain"), recipe.batch_size, seed, RETAIN)

    parameters = list(model.parameters())
    learning_rate = recipe.learning_rate or learning_rate_from_weights(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    model.eval()

    def measure(when: str, step: int) -> None:
        trace.measured[f"tau_{when}"], _ = held_out_table(model, parts["held_out"], recipe, seed, step)
        with torch.no_grad():
            trace.measured[f"forget_loss_{when}"] = float(
                F.cross_entropy(model(parts["forget"][0]), parts["forget"][1])
            )

    measure("before", 0)  # the model as it was given
    generator = torch.Generator().manual_seed(derive_seed(seed, WEIGHTS))
    with torch.no_grad():
        for w in parameters:
            if w.ndim > 1:
                noise = torch.randn(w.shape, generator=generator, dtype=torch.float64)
                w.copy_(recipe.shrink * w + recipe.noise * w.std() * noise)
    running_rank = math.nan
    for step in range(steps):
        if step % tau_every == 0:
            tau, table = held_out_table(model, parts["held_out"], recipe, seed, step)
        done = step / steps
        alpha = recipe.alpha * (1 - done + done * recipe.alpha_end)
        rate = learning_rate * (1 - done + done * recipe.learning_rate_end)
        (x_f, y_f), (x_r, y_r) = forget.next(), retain.next()

        losses = F.cross_entropy(model(x_f), y_f, reduction="none")
        now = losses.detach().numpy()
        wanted = np.empty_like(now)
        for place, i in enumerate(np.argsort(now)):
            wanted[i] = table[int((place + 0.5) / len(now) * 512)]
        below = [(np.sum(table < value) + np.sum(table <= value)) / (2 * 512) for value in now]
        rank = float(np.mean(below))
        fresh = min(len(now) / 64, 0.5)
        running_rank = rank if math.isnan(running_rank) else (1 - fresh) * running_rank + fresh * rank
        held = recipe.hold and running_rank >= 0.5

        gate = (torch.as_tensor(wanted) - losses).relu() ** recipe.power
        retain_loss = F.cross_entropy(model(x_r), y_r)
        forget_gradient = list(torch.autograd.grad(alpha * gate.mean(), parameters))
        retain_gradient = torch.autograd.grad((1 - alpha) * retain_loss, parameters)
        some = any(float(g.abs().max()) > 0 for g in forget_gradient)
        trace.left_out += held and some
        trace.taken += not held and some
        if held:
            forget_gradient = [torch.zeros_like(g) for g in forget_gradient]
        norms = [math.sqrt(sum(float((g * g).sum()) for g in part)) for part in (forget_gradient, retain_gradient)]
        scale = min(1.0, recipe.balance * norms[1] / norms[0]) if norms[0] else 1.0
        trace.scaled_down += scale < 1
        for w, g_f, g_r in zip(parameters, forget_gradient, retain_gradient, strict=True):
            w.grad = g_r + scale * g_f
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()

        forget_term, retain_loss = 0.0 if held else float(gate.detach().mean()), float(retain_loss.detach())
        row = {
            "step": step,
            "loss": alpha * forget_term + (1 - alpha) * retain_loss,
            "forget_loss": float(now.mean()),
            "retain_loss": retain_loss,
            "gate_open": 0.0 if held else float((wanted > now).mean()),
            "forget_scale": scale,
            "tau": tau,
            "alpha": alpha,
            "learning_rate": rate,
        }
        for name, value in row.items():
            trace.columns[name].append(value)
    measure("after", steps)
    return trace


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(8 * 2 * 2, 3),
    ).double()


@pytest.fixture(scope="module")
def memorising_cnn() -> tuple[nn.Module, dict[str, Data]]:
    """A CNN with BatchNorm and Dropout that memorised some of forget and retain set, left in train mode."""
    torch.manual_seed(11)
    model = small_cnn()
    x, y = torch.randn(560, 1, 6, 6, dtype=torch.float64), torch.randint(3, (560,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.no_grad():
        model.train()(x)  # running statistics other than (0, 1)
    model.eval()
    for _ in range(16):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:240]), y[:240]).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    parts = {"forget": (x[:40], y[:40]), "retain": (x[40:240], y[40:240]), "held_out": (x[240:], y[240:])}
    return model.train(), parts


SMALL = replace(ASCENT, min_steps=40, batch_size=32, tau_samples=250)
VARIANTS = {
    "default": SMALL,
    "every other number": replace(
        SMALL,
        power=2,
        alpha=0.6,
        alpha_end=0.4,
        balance=0.5,
        learning_rate=1e-2,
        learning_rate_end=0.2,
        min_steps=1,
        retain_passes=4.5,
        tau_every=0.2,
        forget_ratio=2.0,
        shrink=0.9,
        noise=0.05,
        batch_size=24,
    ),
    "never held": replace(SMALL, hold=False),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_default_recipe_is_the_plain_loop(memorising_cnn, variant):
    model, parts = memorising_cnn
    recipe, seed = VARIANTS[variant], 3
    expected = copy.deepcopy(model)
    trace = plain_default_loop(expected, parts, recipe, seed)
    result = unlearn(model, **parts, recipe=recipe, seed=seed)

    assert result.settings["forget_kind"] == "random subset"
    for name, value in trace.measured.items():
        assert result.settings[name] == pytest.approx(value, rel=1e-9), name
    for name in COLUMNS:
        if name != "samples_per_second":
            assert result.history[name] == pytest.approx(trace.columns[name], rel=1e-9, abs=1e-12), name
    moved = 0.0
    for (name, ours), theirs, before in zip(
        result.model.state_dict().items(), expected.state_dict().values(), model.state_dict().values(), strict=True
    ):
        if ours.is_floating_point():
            assert (ours - theirs).norm() <= 1e-9 * theirs.norm(), name
            moved = max(moved, ((theirs - before).norm() / before.norm()).item())
    assert moved > 0.05, "the run must change the weights by far more than the tolerance"
    assert trace.taken >= 3, "the ascent must have done something"
    assert trace.scaled_down >= 1, "the balance must have done something"
    if recipe.hold:
        assert trace.left_out >= 3, "the hold must have left out something"


def test_the_plain_loop_starts_at_the_documented_learning_rate(memorising_cnn):
    """1/25 of the (lower) median root mean square of the weight matrices as they come, before the shrink."""
    model, parts = memorising_cnn
    scales = sorted(float((w.detach() ** 2).mean().sqrt()) for w in model.parameters() if w.ndim > 1)
    assert len(scales) == 3
    expected = scales[1] / 25
    result = unlearn(model, **parts, recipe=SMALL)
    assert learning_rate_from_weights(model.parameters()) == pytest.approx(expected, rel=1e-6)
    assert result.settings["learning_rate"] == pytest.approx(expected, rel=1e-6)
    assert result.settings["learning_rate_from"] == "weights"


def test_shrink_leaves_the_padding_row_of_an_embedding():
    """No gradient would ever move it back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 4, padding_idx=0), nn.Flatten(), nn.Linear(24, 3))
    x, y = torch.randint(20, (300, 6)), torch.randint(3, (300,))
    parts = {"forget": (x[:40], y[:40]), "retain": (x[40:200], y[40:200]), "held_out": (x[200:], y[200:])}
    result = unlearn(model, **parts, recipe=replace(ASCENT, min_steps=10))
    before, after = model[0].weight, result.model[0].weight
    assert bool((after[0] == 0).all())
    assert bool((after[1:] != before[1:]).all())


def test_train_mode_model_gives_the_weights_of_the_same_model_in_eval_mode(memorising_cnn):
    model, parts = memorising_cnn
    in_eval = copy.deepcopy(model).eval()
    results = [unlearn(m, **parts, recipe=SMALL, seed=1) for m in (model, in_eval)]
    states = [result.model.state_dict() for result in results]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        if "running" in name or "tracked" in name:
            assert torch.equal(value, model.state_dict()[name]), f"{name} must stay frozen"
    assert all(module.training for module in results[0].model.modules())
    assert not any(module.training for module in results[1].model.modules())


# ---------------------------------------------------------------------------------------------------------------------
# Schedule
# ---------------------------------------------------------------------------------------------------------------------


def vector_parts(forget: int = 40, retain: int = 200, held_out: int = 160) -> dict[str, Data]:
    x, y = blobs(forget + retain + held_out)
    return {
        "forget": (x[:forget], y[:forget]),
        "retain": (x[forget : forget + retain], y[forget : forget + retain]),
        "held_out": (x[forget + retain :], y[forget + retain :]),
    }


def test_learning_rate_and_alpha_at_the_first_the_middle_and_the_last_step():
    recipe = replace(ASCENT, learning_rate=0.01, min_steps=40)
    history = unlearn(mlp(), **vector_parts(), recipe=recipe).history
    assert len(history["step"]) == 40
    assert [history["learning_rate"][k] for k in (0, 20, 39)] == pytest.approx([0.01, 0.005, 0.01 / 40])
    assert history["alpha"] == pytest.approx([0.5] * 40)
    recipe = replace(recipe, learning_rate_end=0.2, alpha=0.4, alpha_end=0.5)
    history = unlearn(mlp(), **vector_parts(), recipe=recipe).history
    assert [history["learning_rate"][k] for k in (0, 20, 39)] == pytest.approx(
        [0.01, 0.006, 0.01 * (1 - 0.8 * 39 / 40)]
    )
    assert [history["alpha"][k] for k in (0, 20, 39)] == pytest.approx([0.4, 0.3, 0.4 * (1 - 0.5 * 39 / 40)])


@pytest.mark.parametrize(
    ("min_steps", "steps"),
    [(1, 18), (18, 18), (30, 30)],  # 2.5 passes of ceil(200 / 32) = 7 batches
)
def test_number_of_steps(min_steps, steps):
    result = unlearn(mlp(), **vector_parts(), recipe=replace(ASCENT, batch_size=32, min_steps=min_steps))
    assert result.settings["steps"] == len(result.history["step"]) == steps
    assert result.history["step"] == list(range(steps))


@pytest.mark.parametrize(
    ("ratio", "forget", "size"),
    [
        (3.0, 40, 16),  # 3 * 40 / 240 * 32
        (1.5, 40, 8),
        (0.1, 40, 8),  # at least 8
        (3.0, 190, 32),  # at most the retain batch
        (3.0, 6, 6),  # at most what there is
        (None, 40, 32),
    ],
)
def test_forget_samples_a_step(ratio, forget, size):
    recipe = replace(ASCENT, batch_size=32, min_steps=4, retain_passes=0.1, forget_ratio=ratio)
    seen: list[int] = []

    def forward(model, batch):
        if torch.is_grad_enabled() and bool((batch[0][:, -1] == 1).all()):
            seen.append(len(batch[1]))
        return model(batch[0]), batch[1]

    parts = vector_parts(forget)
    parts = {
        name: (torch.cat((x, torch.full((len(x), 1), float(name == "forget"))), 1), y) for name, (x, y) in parts.items()
    }
    result = unlearn(mlp(features=9), **parts, recipe=recipe, forward=forward, performance="off")
    assert len(seen) == result.settings["steps"] == 4
    assert seen[0] == size


def test_tau_is_measured_on_so_many_samples_drawn_anew_by_the_seed():
    recipe = replace(ASCENT, min_steps=20, tau_samples=100, learning_rate=1e-3)
    x, y = blobs(900)
    number = torch.arange(900.0).unsqueeze(1) / 900
    x = torch.cat((x, number), 1)
    parts = {"forget": (x[:40], y[:40]), "retain": (x[40:240], y[40:240]), "held_out": (x[240:], y[240:])}

    def draws(seed: int) -> list[set[float]]:
        found: list[set[float]] = []
        state = {"new": True}

        def forward(model, batch):
            names = set(batch[0][:, -1].tolist())
            if torch.is_grad_enabled():
                state["new"] = True
            elif min(names) >= 240 / 900:
                if state["new"]:
                    found.append(set())
                    state["new"] = False
                found[-1] |= names
            return model(batch[0]), batch[1]

        unlearn(mlp(features=9), **parts, recipe=recipe, forward=forward, seed=seed, performance="off")
        # The first holds every look before the first step, at the labels too; the last those after the last step.
        return found[1:-1]

    first, again, other = draws(4), draws(4), draws(5)
    assert [len(draw) for draw in first] == [100] * 9  # every second step
    assert len(set(map(frozenset, first))) == 9, "drawn anew each time"
    assert first == again, "by the seed"
    assert all(a != b for a, b in zip(first, other, strict=True)), "another seed, other samples"


# ---------------------------------------------------------------------------------------------------------------------
# Hold, rank and power in one's own loop: losses are the inputs themselves
# ---------------------------------------------------------------------------------------------------------------------


class Factor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def on_losses(**settings) -> Unlearner:
    """An Unlearner whose per-sample losses are its inputs and stay so: plain SGD with learning rate 0."""
    model = Factor()
    settings = {"alpha": 0.5, "gate": "quantile", "power": 1} | settings
    return Unlearner(
        model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), loss=lambda losses, _: losses, **settings
    )


def batch_of(losses: list[float]) -> Data:
    return torch.tensor(losses, dtype=torch.float64), torch.zeros(len(losses), dtype=torch.long)


UNIFORM = torch.linspace(0, 1, 1001, dtype=torch.float64)  # held-out losses: a loss is its own rank
LOW, HIGH, RETAINED = batch_of([0.1] * 16), batch_of([0.9] * 16), batch_of([0.2] * 16)


@pytest.mark.parametrize("balance", [None, 0.25])
def test_the_ascent_is_held_while_the_running_rank_is_half_or_more(balance):
    """16 samples a step: the running mean takes a quarter of each new one."""
    unlearner = on_losses(tau=UNIFORM, hold=True, balance=balance)
    free = on_losses(tau=UNIFORM, hold=False, balance=balance)
    rank, held = math.nan, []
    for batch, value in [(LOW, 0.1)] * 3 + [(HIGH, 0.9)] * 5 + [(LOW, 0.1)] * 4 + [(HIGH, 0.9)] * 2:
        rank = value if math.isnan(rank) else 0.75 * rank + 0.25 * value
        metrics, unheld = unlearner.step(batch, RETAINED), free.step(batch, RETAINED)
        held.append(rank >= 0.5)
        opened = float(unheld.gate_open)
        assert opened > 0
        assert float(metrics.gate_open) == (0 if rank >= 0.5 else opened), f"running rank {rank}"
        assert float(unheld.loss) > 0.1 == pytest.approx(0.5 * 0.2)
        assert float(metrics.loss) == pytest.approx(0.1 if rank >= 0.5 else float(unheld.loss))
    assert held == [False] * 5 + [True] * 4 + [False] * 4 + [True]


def test_a_held_unlearner_goes_on_from_its_state():
    unlearner = on_losses(tau=UNIFORM, hold=True)
    for _ in range(6):
        unlearner.step(HIGH, RETAINED)
    restored = on_losses(tau=UNIFORM, hold=True)
    restored.load_state_dict(copy.deepcopy(unlearner.state_dict()))
    # The running rank is 0.9: it takes two low batches to bring it down. Without the past, none.
    for expected in (True, True, False):
        for each in (unlearner, restored):
            assert (float(each.step(LOW, RETAINED).gate_open) == 0) is expected


@pytest.mark.parametrize(("gate", "tau"), [("batch", 1.5), ("sample", 1.5), ("quantile", torch.full((9,), 1.5))])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("balance", [None, 10.0])
def test_power_of_the_gate(gate, tau, power, balance):
    unlearner = on_losses(gate=gate, tau=tau, power=power, alpha=0.25, balance=balance)
    metrics = unlearner.step(batch_of([0.5, 0.5]), batch_of([2.0, 4.0]))
    assert float(metrics.loss) == pytest.approx(0.25 * 1.0**power + 0.75 * 3)
    metrics = unlearner.step(batch_of([1.0, 1.0]), batch_of([2.0, 4.0]))
    assert float(metrics.loss) == pytest.approx(0.25 * 0.5**power + 0.75 * 3)
    # d gate / d factor = -p (tau - l)^(p - 1) l
    gradient = float(unlearner.parameters[0].grad)
    assert gradient == pytest.approx(0.25 * -power * 0.5 ** (power - 1) * 1.0 + 0.75 * 3)


# ---------------------------------------------------------------------------------------------------------------------
# Whole classes: a model whose logits are constant says what every label costs
# ---------------------------------------------------------------------------------------------------------------------

ONE_STEP = replace(ASCENT, learning_rate=1e-3, shrink=1.0, noise=0.0, min_steps=1, retain_passes=0.01)


def constant_model(probabilities: list[float]) -> nn.Linear:
    model = nn.Linear(3, len(probabilities)).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor(probabilities, dtype=torch.float64).log())
    return model


def labelled(*counts: int) -> Data:
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    generator = torch.Generator().manual_seed(len(labels))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return torch.randn(len(labels), 3, dtype=torch.float64, generator=generator), labels


@pytest.mark.parametrize(
    ("probabilities", "asked"),
    [
        ([0.3, 0.05, 0.25, 0.4], (-math.log(0.3), -math.log(0.05))),
        # 100 + 200 training samples: nothing below 1 / 300^2 counts
        ([0.3, 1e-9, 0.3, 0.4 - 1e-9], (-math.log(0.3), 2 * math.log(300))),
        ([1e-9, 1e-12, 0.6, 0.4 - 1e-9], (2 * math.log(300), 2 * math.log(300))),
    ],
)
@pytest.mark.parametrize("kept", [0, 20])
def test_tau_of_several_removed_classes(probabilities, asked, kept):
    """Each removed label is asked about alike, cut off at 2 log n; the rest of the forget set counts by its classes."""
    parts = {"forget": labelled(50 - kept // 2, 50 - kept // 2, kept), "retain": labelled(0, 0, 100, 100)}
    result = unlearn(constant_model(probabilities), **parts, held_out=labelled(0, 0, 60, 60), recipe=ONE_STEP)
    assert result.removed_classes == (0, 1)
    assert result.settings["forget_kind"] == "whole classes"
    share = kept / 100
    expected = (1 - share) * sum(asked) / 2 - share * math.log(probabilities[2])
    assert result.history["tau"] == pytest.approx([expected], rel=1e-9)


@pytest.mark.parametrize("probability", [0.05, 1e-9])
def test_tau_of_one_removed_class(probability):
    parts = {"forget": labelled(60), "retain": labelled(0, 120, 120), "held_out": labelled(40, 40, 40)}
    model = constant_model([probability, 0.5, 0.5 - probability])
    result = unlearn(model, **parts, recipe=ONE_STEP)
    assert result.removed_classes == (0,)
    expected = min(-math.log(probability), 2 * math.log(300))
    assert result.history["tau"] == pytest.approx([expected], rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals, and what is left after a failure
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["forget", "retain", "held_out"])
@pytest.mark.parametrize("label", [4, -1])
def test_labels_out_of_range_are_refused_before_anything_changes(part, label):
    parts = vector_parts()
    parts[part][1][-1] = label
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError, match=f"label out of range: target {label} in row"):
        unlearn(model, **parts, inplace=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(forwards) == 1, "one look at the model, to know its classes"


def test_after_a_failure_the_weights_are_those_of_the_last_look():
    recipe = replace(ASCENT, min_steps=40)
    model = mlp()
    calls = {"training": 0}
    snapshots: dict[int, dict[str, Tensor]] = {}

    def forward(model, batch):
        calls["training"] += torch.is_grad_enabled()
        broken = calls["training"] > 2 * 30  # two forwards a step
        return model(batch[0]) * (math.nan if broken else 1.0), batch[1]

    def log(values, step):
        snapshots[step] = copy.deepcopy(model.state_dict())

    with pytest.raises(NonFiniteLossError) as caught:
        unlearn(model, **vector_parts(), recipe=recipe, forward=forward, log=log, inplace=True, performance="off")
    assert caught.value.step == 30
    every = caught.value.result.settings["tau_every_steps"]
    assert every == 4
    # Steps are read at least as often as tau is measured: step 27 was the last one before 30 to be.
    weights = caught.value.result.model.state_dict()
    assert all(torch.equal(value, snapshots[27][name]) for name, value in weights.items())
    assert not all(torch.equal(value, snapshots[3][name]) for name, value in weights.items())
    assert caught.value.result.history["step"] == list(range(30))


# ---------------------------------------------------------------------------------------------------------------------
# Resume and clock
# ---------------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Raised from the log callback to cut a run off."""


class Clock:
    """Time that passes by one second a training forward and ten a forward without gradient, and not otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def forward(self, model: nn.Module, batch: Data) -> tuple[Tensor, Tensor]:
        self.now += 1 if torch.is_grad_enabled() else 10
        return model(batch[0]), batch[1]


def test_samples_per_second_and_seconds(monkeypatch):
    recipe = replace(ASCENT, min_steps=20, batch_size=50)  # 25 forget and 50 retain samples a step, two forwards
    clock = Clock(monkeypatch)
    started = clock.now
    result = unlearn(mlp(), **vector_parts(), recipe=recipe, forward=clock.forward, performance="off")
    # Two seconds a step; a forget pass is 25 + 15 samples, so two steps are 40 + 100 samples; tau is left out.
    assert result.history["samples_per_second"] == pytest.approx([140 / 4] * 20)
    # Twenty steps, ten times tau and once more after the last step; and no more than has passed.
    assert 20 * 2 + 11 * 10 <= result.seconds <= clock.now - started


@pytest.mark.parametrize("cut", [5, 11, 14, 23, 30, 39])
def test_resumed_run_is_the_whole_run(memorised, tmp_path, monkeypatch, cut):
    model, parts = memorised
    parts = {name: parts[name] for name in ("forget", "retain", "held_out")}
    settings = {
        "recipe": replace(ASCENT, min_steps=40, batch_size=32, tau_samples=150),
        "seed": 2,
        "forward": Clock(monkeypatch).forward,
        "performance": "off",
        "checkpoint_every": 3,
    }
    whole = unlearn(model, **parts, **settings)

    def stop(values, step):
        if step >= cut:
            raise Stop

    path = tmp_path / "cut.ckpt"
    with pytest.raises(Stop):
        unlearn(model, **parts, **settings, checkpoint=path, log=stop)
    assert path.exists()
    logged: list[int] = []
    resumed = unlearn(
        model, **parts, **settings, checkpoint=path, resume=True, log=lambda values, step: logged.append(step)
    )
    assert 0 < logged[0] <= cut, "it must go on from the checkpoint, not from the start"
    assert logged == list(range(logged[0], 40))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for name in COLUMNS:
        if name != "samples_per_second":
            assert resumed.history[name] == whole.history[name], name
    assert len(resumed.history["samples_per_second"]) == 40
    assert resumed.settings == whole.settings
    assert (resumed.warnings, resumed.counts, resumed.recipe) == (whole.warnings, whole.counts, whole.recipe)
    # What was done after the checkpoint and lost is not counted.
    assert resumed.seconds == pytest.approx(whole.seconds)


def test_a_finished_run_is_read_back(tmp_path):
    settings = vector_parts() | {"recipe": replace(ASCENT, min_steps=12), "checkpoint": tmp_path / "done.ckpt"}
    torch.manual_seed(0)
    model = mlp()
    first = unlearn(model, **settings)
    second = unlearn(model, **settings, resume=True)
    assert second.history == first.history
    assert all(torch.equal(v, second.model.state_dict()[name]) for name, v in first.model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [0, 3, 10])
def test_accuracy_is_the_share_of_correct_samples(right):
    labels = torch.arange(10) % 4
    wrong = (labels + 1) % 4
    logits = F.one_hot(torch.where(torch.arange(10) < right, labels, wrong), 4).double()
    model = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(4))
    assert evaluate(model, (logits, labels), batch_size=3).accuracy == pytest.approx(right / 10)
    # Multi-label: every label must be right.
    targets = F.one_hot(labels, 4).double()
    assert evaluate(model, (2 * logits - 1, targets), batch_size=3).accuracy == pytest.approx(right / 10)
    # Sequences of two tokens: every token must be.
    pairs = (logits.view(5, 2, 4), labels.view(5, 2))
    assert evaluate(model, pairs, batch_size=3).accuracy == pytest.approx((right // 2) / 5)
