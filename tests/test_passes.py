"""How often a run calls the model: every call beyond these numbers is a forward that somebody pays for."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter

import pytest
import torch
from conftest import Pairs
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nabla_tau import audit, unlearn
from nabla_tau.recipes import ASCENT, PAPER


@pytest.fixture
def counted(memorised):
    """The model, its data, and what it was called on: Counter of (training step or not, samples)."""
    model, parts = memorised
    calls: Counter[tuple[bool, int]] = Counter()
    hook = model.register_forward_pre_hook(lambda _, args: calls.update([(torch.is_grad_enabled(), len(args[0]))]))
    yield model, parts, calls
    hook.remove()


def run(counted, **settings):
    model, parts, calls = counted
    data = {name: parts[name] for name in ("forget", "retain", "held_out")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = unlearn(model, **(data | settings))
    measured = Counter({size: count for (gradient, size), count in calls.items() if not gradient})
    return result, measured, sum(count for (gradient, _), count in calls.items() if gradient)


# 60 forget and 300 held-out samples, which are measured in batches of 250 at most.
LOOK = Counter({2: 1})  # at the logits, on two samples
TAU = Counter({250: 1, 50: 1})
OUTCOME = Counter({60: 2}) + Counter({250: 2, 50: 2})  # both sets before and after
HOW_TO_FORWARD = Counter({60: 1, 256: 1, 316: 1})  # the first batches apart and as one


def times(count: int, passes: Counter[int]) -> Counter[int]:
    return Counter({size: count * number for size, number in passes.items()})


def test_default_recipe(counted):
    result, measured, training = run(counted, recipe="ascent", performance="off")
    steps = result.settings["steps"]
    assert steps == 200
    assert training == 2 * steps  # forget and retain gradients are kept apart
    # tau before, ten times on the way and after; the shrunk weights of step 0 are not those that were given.
    assert measured == LOOK + OUTCOME + times(12, TAU)


def test_held_steps_have_no_ascent(counted):
    result, _, training = run(counted, recipe="ascent")
    assert result.settings["ascents_saved"] > 50
    assert training == 2 * result.settings["steps"] - result.settings["ascents_saved"]


def test_published_recipe(counted):
    result, measured, training = run(counted, recipe="paper")
    steps = result.settings["steps"]
    assert steps == 6
    assert training == steps
    # tau before, which serves step 0 too, at step 5, and after.
    assert measured == LOOK + OUTCOME + times(3, TAU) + HOW_TO_FORWARD


@pytest.mark.parametrize("recipe", [ASCENT, PAPER, dataclasses.replace(ASCENT, shrink=1.0, noise=0.0)])
def test_tau_of_step_0_is_that_of_the_weights_as_they_are_then(memorised, recipe):
    model, parts = memorised
    data = {name: parts[name] for name in ("forget", "retain", "held_out")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = unlearn(model, **data, recipe=recipe)
    perturbed = (recipe.shrink, recipe.noise) != (1, 0)
    assert (result.history["tau"][0] != pytest.approx(result.settings["tau_before"])) == perturbed


@pytest.mark.parametrize("kind", ["tensors", "dataset", "loader"])
@pytest.mark.parametrize("targets", ["those of the batch", "made by it"])
def test_a_forward_of_ones_own_costs_a_pass_only_where_it_makes_the_targets(counted, kind, targets):
    model, parts, calls = counted
    if kind != "tensors":
        parts = {name: Pairs(part) for name, part in parts.items()}
    if kind == "loader":
        parts = {name: DataLoader(part, batch_size=64) for name, part in parts.items()}
    wanted, without, _ = run((model, parts, calls), recipe="paper")
    calls.clear()

    def forward(model, batch) -> tuple[Tensor, Tensor]:
        x, y = batch
        return model(x), y if targets == "those of the batch" else y.clone()

    result, measured, _ = run((model, parts, calls), recipe="paper", forward=forward)
    assert result.fingerprints == wanted.fingerprints
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), wanted.model.parameters(), strict=True))
    extra = Counter({60: 1, 64: 2}) if kind == "loader" else times(3, LOOK)  # the first batch of each
    if targets == "made by it":  # 60 forget, 340 retain and 300 held-out samples
        whole = {60: 1, 64: 9, 340 - 5 * 64: 1, 300 - 4 * 64: 1} if kind == "loader" else {60: 1, 256: 2, 84: 1, 44: 1}
        extra += Counter(whole)
    assert measured == without + extra


class WholeBatches(Dataset):
    """Gives batches, so that only reading it says how many samples it has."""

    def __init__(self, data):
        self.batches, self.reads = list(zip(data[0].split(50), data[1].split(50), strict=True)), 0

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        self.reads += 1
        return self.batches[index]


def test_an_audit_calls_each_model_once_a_batch_and_counts_a_set_once(counted):
    model, parts, calls = counted
    unseen = WholeBatches(parts["unseen"])
    audit(
        model,
        forget=parts["forget"],
        unseen=DataLoader(unseen, batch_size=None),
        retain=parts["retain"],
        original=model,
        compare={"other": model},
        bootstrap=100,
    )
    models = 3
    assert calls == times(models, Counter({(False, 60): 1, (False, 50): 6, (False, 256): 1, (False, 84): 1}))
    assert unseen.reads == len(unseen) * (1 + models)
