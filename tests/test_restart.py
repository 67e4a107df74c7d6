"""Fresh weights as the default, and what `unlearn` does where they will not do."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from conftest import blobs, mlp, train
from torch import nn
from torch.nn import functional as F

from nabla_tau import outcome, unlearn
from nabla_tau.evaluation import evaluate
from nabla_tau.initialisation import initialise
from nabla_tau.job import FORGET, HELD_OUT, RETAIN, WEIGHTS
from nabla_tau.membership import roc
from nabla_tau.methods.restart import Restart, Weights
from nabla_tau.recipes import GENTLE
from nabla_tau.sources import Stream, as_source, derive_seed

SETS = ("forget", "retain", "held_out")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.fixture
def known(memorised):
    """A model that its retained samples teach again."""
    model, parts = memorised
    return model, {name: parts[name] for name in SETS}


@pytest.fixture(scope="module")
def pretrained():
    """A model that knows more than its retained samples, of random labels, can teach."""
    x, y = blobs(900)
    model = train(mlp(), (x[:600], y[:600]), epochs=40)
    noise = torch.randint(4, (240,), generator=torch.Generator().manual_seed(0))
    return model, {"forget": (x[:40], y[:40]), "retain": (x[40:280], noise), "held_out": (x[600:], y[600:])}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_is_one_cycle_of_adamw_on_fresh_weights(known):
    model, parts = known
    model, method = copy.deepcopy(model).double(), Restart(min_steps=40, cycles=1, hopeless=-1e9)
    parts = {name: (x.double(), y) for name, (x, y) in parts.items()}
    result = unlearn(model, **parts, method=method, seed=3)

    generator = torch.Generator().manual_seed(derive_seed(3, WEIGHTS, 0))
    initialise([model], generator)
    scales = [p.detach().square().mean().sqrt().item() for p in model.parameters()]
    matrices = sorted(scale for scale, p in zip(scales, model.parameters(), strict=True) if p.ndim > 1)
    rates = [0.1875 * (s if p.ndim > 1 else matrices[0]) for s, p in zip(scales, model.parameters(), strict=True)]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(model.parameters(), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    size = min(64, len(parts["retain"][0]) // 8)
    stream = Stream(as_source(parts["retain"], "retain"), size, 3, RETAIN)
    for step in range(40):
        if step == 10:  # its first quarter is a stage of its own, and each stage begins a pass
            stream.load_state_dict({"passes": stream.passes + 1, "position": 0})
        factor = (step + 1) / 7 if step < 6 else (40 - step) / 34
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        x, y = stream.next()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert result.settings["steps"] == 40
    for found, wanted in zip(result.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-10)


def test_nothing_of_the_original_and_of_the_forget_set_is_left(known):
    model, parts = known
    torch.manual_seed(9)
    worse = train(mlp(), parts["held_out"], epochs=5)
    better = train(mlp(), parts["held_out"], epochs=40)  # as no retained samples make a model
    x, y = parts["forget"]
    others = parts | {"forget": (x.flip(1)[:30], (3 - y)[:30])}
    first = unlearn(model, **parts)
    assert first.method == "restart"
    assert same(first.model, unlearn(worse, **others).model)
    assert same(first.model, unlearn(better, **others).model), "not even by how long it is trained"
    assert not same(first.model, unlearn(model, **parts, seed=1).model)


def test_the_default_is_fresh_weights_that_are_as_useful(known):
    model, parts = known
    before = copy.deepcopy(model)
    result = unlearn(model, **parts)
    assert result.method == "restart"
    assert "attempt" not in result.settings
    assert same(model, before)
    for name, of in (("before", model), ("after", result.model)):
        signals = {which: evaluate(of, parts[which]) for which in ("forget", "held_out")}
        assert result.settings[f"held_out_accuracy_{name}"] == pytest.approx(signals["held_out"].accuracy)
        assert result.settings[f"forget_loss_{name}"] == pytest.approx(signals["forget"].loss.mean(), rel=1e-5)
        losses = np.concatenate([signals[which].loss for which in ("forget", "held_out")])
        labels = np.repeat([True, False], [len(signals["forget"]), len(signals["held_out"])])
        assert result.settings[f"attack_auc_{name}"] == pytest.approx(float(roc(-losses, labels).auc), abs=1e-9)
    assert result.settings["attack_auc_after"] < result.settings["attack_auc_before"]


def test_no_look_at_the_same_weights_twice(known, monkeypatch):
    model, parts = known
    looks, look = [], outcome._looked

    def noted(job, source, role, forward):
        looks.append((role, [p.clone() for p in job.model.parameters()]))
        return look(job, source, role, forward)

    monkeypatch.setattr(outcome, "_looked", noted)
    result = unlearn(model, **parts)
    # The original, fresh weights, a quarter and the end; and the forget set before and after.
    assert [role for role, _ in looks] == [HELD_OUT, HELD_OUT, FORGET, HELD_OUT, HELD_OUT, FORGET]
    of_held_out = [weights for role, weights in looks if role == HELD_OUT]
    for i, j in itertools.combinations(range(4), 2):
        assert not all(map(torch.equal, of_held_out[i], of_held_out[j]))
    assert all(map(torch.equal, of_held_out[-1], result.model.parameters()))


STILL_LEARNING = Restart(min_steps=8, passes=0.1, relative_rate=0.05, cycles=3, hopeless=-1e9)


def test_more_cycles_only_where_the_first_ended_too_soon(known):
    model, parts = known
    enough = unlearn(model, **parts, method=Restart(cycles=3))
    assert enough.settings["steps"] == 150
    short = unlearn(model, **parts, method=STILL_LEARNING)
    assert short.settings["steps"] == 24
    rates = short.history["learning_rate"]
    assert [rate / 2 for rate in rates[:8]] == pytest.approx(rates[8:16]), "each begins anew, at half the peak"
    assert [rate / 4 for rate in rates[:8]] == pytest.approx(rates[16:])
    late = dataclasses.replace(STILL_LEARNING, still_learning=1.1)
    assert unlearn(model, **parts, method=late).settings["steps"] == 8


def test_no_more_cycles_where_the_retained_samples_are_known(known):
    model, parts = known
    one = unlearn(model, **parts, method=dataclasses.replace(STILL_LEARNING, cycles=1))
    reached = evaluate(one.model, parts["retain"]).accuracy
    assert reached != evaluate(one.model, parts["held_out"]).accuracy
    for fitted, steps in ((reached, 8), (reached + 1e-6, 24)):
        method = dataclasses.replace(STILL_LEARNING, fitted=fitted)
        assert unlearn(model, **parts, method=method).settings["steps"] == steps


@pytest.mark.parametrize("step", [1, 5, 11])
def test_it_knows_after_an_interruption_whether_it_was_still_learning(known, tmp_path, step):
    model, parts = known
    whole = unlearn(model, **parts, method=STILL_LEARNING)

    def stop(values, at):
        if at >= step:
            raise KeyboardInterrupt

    settings = {"method": STILL_LEARNING, "checkpoint": tmp_path / "run", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        unlearn(model, **parts, **settings, log=stop)
    resumed = unlearn(model, **parts, **settings, resume=True)
    assert resumed.settings["steps"] == 24
    assert same(resumed.model, whole.model)


def test_where_fresh_weights_will_not_do_the_original_is_unlearned_gently(pretrained, tmp_path):
    model, parts = pretrained
    seen: list[int] = []
    result = unlearn(model, **parts, log=lambda values, step: seen.append(step))
    assert (result.method, result.recipe) == ("nabla-tau", "gentle")
    attempt = result.settings["attempt"]
    assert "fresh weights would not do" in result.warnings[0]
    assert attempt["reason"] == result.warnings[0]
    assert attempt["steps"] < Restart().min_steps, "ended after a quarter"
    assert seen == list(range(attempt["steps"] + result.settings["steps"]))
    assert result.seconds > attempt["seconds"] > 0
    assert same(result.model, unlearn(model, **parts, recipe=GENTLE).model)

    inplace = copy.deepcopy(model)
    assert unlearn(inplace, **parts, inplace=True).model is inplace
    assert same(inplace, result.model)


def test_a_finetuned_model_begins_again_with_what_it_was_finetuned_from(known, tmp_path):
    model, parts = known
    torch.manual_seed(4)
    base = train(mlp(), parts["held_out"], epochs=3)
    result = unlearn(model, **parts, initial=base)
    assert result.method == "restart"
    assert result.settings["held_out_accuracy_untrained"] == pytest.approx(evaluate(base, parts["held_out"]).accuracy)
    assert same(result.model, unlearn(model, **parts, initial=base.state_dict()).model)
    assert not same(result.model, unlearn(model, **parts).model)
    assert unlearn(model, **parts, initial=base).settings["initial"] == result.settings["initial"] is not None
    with pytest.raises(ValueError, match="initial has the very weights of the model"):
        unlearn(model, **parts, initial=model)

    path = tmp_path / "run"
    unlearn(model, **parts, initial=base, checkpoint=path)
    with pytest.raises(ValueError, match="of another run"):
        unlearn(model, **parts, initial=mlp(), checkpoint=path, resume=True)
    with pytest.raises(ValueError, match=r"0.bias has shape \(9,\), not \(32,\)"):
        unlearn(model, **parts, initial=mlp(width=9))
    with pytest.raises(ValueError, match="without method and recipe"):
        unlearn(model, **parts, initial=base, recipe="paper")


def test_its_rate_is_how_far_each_tensor_was_taken(known):
    model, parts = known
    model = copy.deepcopy(model).double()
    parts = {name: (x.double(), y) for name, (x, y) in parts.items()}
    base = copy.deepcopy(model)
    with torch.no_grad():
        base[0].weight += 0.03
        base[2].bias -= 0.01
    result = unlearn(model, **parts, method=Restart(initial=Weights(base.state_dict()), distance=1e-3))
    rates = result.history["learning_rate"]
    assert len(rates) == 150, "one cycle"
    assert max(rates) == pytest.approx(1e-3 * 0.03 / math.sqrt(150)), "of the first tensor"
    for (name, after), before in zip(result.model.named_parameters(), base.parameters(), strict=True):
        distance = {"0.weight": 0.03, "2.bias": 0.01}.get(name, 0)
        furthest = sum(rates) * distance / 0.03  # AdamW moves a weight by about the rate at most
        moved = float((after - before).detach().abs().max())
        assert 0.1 * furthest <= moved <= 1.5 * furthest, name


def test_a_finetuned_model_that_came_out_worse_is_kept_and_said(pretrained):
    model, parts = pretrained
    torch.manual_seed(4)
    result = unlearn(model, **parts, initial=mlp())
    assert result.method == "restart"
    assert "held-out accuracy" in result.warnings[0]


@pytest.mark.parametrize("steps", [5, 20, 60, 150])
def test_it_goes_on_from_a_checkpoint_in_either_run(pretrained, tmp_path, steps):
    model, parts = pretrained
    whole = unlearn(model, **parts)
    first = whole.settings["attempt"]["steps"]
    assert 20 < first < 60

    def stop(values, step):
        if step >= steps:
            raise KeyboardInterrupt

    path = tmp_path / "run"
    settings = {"checkpoint": path, "checkpoint_every": 3}
    with pytest.raises(KeyboardInterrupt):
        unlearn(model, **parts, **settings, log=stop)
    resumed = unlearn(model, **parts, **settings, resume=True)
    assert same(resumed.model, whole.model)
    assert resumed.settings["attempt"]["reason"] == whole.settings["attempt"]["reason"]
    assert resumed.history["forget_loss"] == whole.history["forget_loss"]


def test_a_finished_run_that_ended_early_is_finished(known, tmp_path):
    model, parts = known
    done = unlearn(model, **parts, checkpoint=tmp_path / "run")
    assert done.settings["steps"] == 150, "the second cycle was not wanted"
    again = unlearn(model, **parts, checkpoint=tmp_path / "run", resume=True)
    assert again.settings["steps"] == 150
    assert same(again.model, done.model)


class OwnWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return x @ self.matrix.T


class PartlyFrozen(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 4))
        self[0].bias.requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "settings", "why"),
    [
        (OwnWeights(), {}, "matrix of a OwnWeights.* reset_parameters"),
        (PartlyFrozen(), {}, "a Linear is frozen in part"),
        (mlp(), {"micro_batch_size": 16}, "micro_batch_size"),
    ],
)
def test_what_cannot_be_made_anew_is_said(model, settings, why):
    x, y = blobs(300)
    parts = {"forget": (x[:30], y[:30]), "retain": (x[30:200], y[30:200]), "held_out": (x[200:], y[200:])}
    with pytest.warns(UserWarning, match=f"fresh weights were not tried: .*{why}"):
        result = unlearn(model, **parts, **settings)
    assert result.recipe == "gentle"
    if not settings:
        with pytest.raises(ValueError, match=why):
            unlearn(model, **parts, method="restart")


def test_frozen_layers_stay_and_attention_is_made_anew(known):
    model, parts = known
    model = copy.deepcopy(model)
    model[0].requires_grad_(False)
    result = unlearn(model, **parts, method=Restart(min_steps=10, cycles=1))
    assert torch.equal(result.model[0].weight, model[0].weight)
    assert not torch.equal(result.model[-1].weight, model[-1].weight)

    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, affine=False), nn.ReLU(), nn.Linear(16, 4))
    model[1].running_mean.fill_(1e6)
    result = unlearn(model, **parts, method=Restart(min_steps=10, cycles=1, hopeless=-1e9))
    assert result.model[1].running_mean.abs().max() < 100, "statistics without weights are made anew too"

    attention = nn.TransformerEncoderLayer(8, 2, 16)
    before = attention.self_attn.in_proj_weight.clone()
    initialise([attention], torch.Generator().manual_seed(0))
    assert not torch.equal(attention.self_attn.in_proj_weight, before)


def test_a_run_that_breaks_down_is_one_that_will_not_do(known, monkeypatch):
    model, parts = known
    monkeypatch.setitem(unlearn.__globals__, "Restart", partial(Restart, relative_rate=1e30))
    result = unlearn(model, **parts)
    assert result.recipe == "gentle"
    assert "fresh weights failed: a" in result.warnings[0]


def test_embeddings_take_larger_batches():
    x = torch.randint(500, (3000, 6), generator=torch.Generator().manual_seed(0))
    y = x[:, 0] % 4
    model = nn.Sequential(nn.EmbeddingBag(500, 16), nn.Linear(16, 4))
    parts = {"forget": (x[:100], y[:100]), "retain": (x[100:2700], y[100:2700]), "held_out": (x[2700:], y[2700:])}
    result = unlearn(model, **parts, method=Restart(cycles=1, hopeless=-1e9))
    assert result.settings["steps"] == max(38, 4 * -(-2600 // 256))


MEASURED = {
    "tau_before": 1.0,
    "forget_loss_before": 0.1,
    "held_out_accuracy_before": 0.9,
    "held_out_accuracy_after": 0.9,
    "held_out_accuracy_error": 0.01,
    "attack_auc_before": 0.7,
    "attack_auc_after": 0.5,
    "attack_auc_error": 0.01,
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"held_out_accuracy_after": 0.8901}, None),
        ({"held_out_accuracy_after": 0.889}, "held-out accuracy is 0.889, and was 0.900"),
        ({"attack_auc_after": 0.519}, None),
        ({"attack_auc_after": 0.521}, "still stands out: .* AUC of 0.521 .* it was 0.700"),
        ({"attack_auc_after": 0.3}, None),
        ({"forget_loss_before": 0.91}, "hardly anything to forget"),
    ],
)
def test_what_was_not_reached_is_said(changed, said):
    found = outcome.diagnose(MEASURED | changed)
    if said is None:
        assert found == []
    else:
        (message,) = found
        assert re.search(said, message)


def test_a_loss_that_rose_is_said_and_one_that_fell_is_not():
    losses = {name.replace("accuracy", "loss"): value for name, value in MEASURED.items()}
    assert outcome.diagnose(losses | {"held_out_loss_after": 0.5}) == []
    assert "held-out loss is 0.930" in outcome.diagnose(losses | {"held_out_loss_after": 0.93})[0]


@pytest.mark.parametrize(
    ("name", "before", "untrained", "after", "share"),
    [
        ("accuracy", 0.9, 0.1, 0.5, 0.5),
        ("accuracy", 0.1, 0.1, 0.0, 1.0),  # nothing to come back to
        ("loss", 1.5, 10.5, 7.5, 1 / 3),
        ("loss", 4.4, 5.8, 6.7, 1.0),  # a model that mainly memorises
    ],
)
def test_the_share_of_the_way_back(name, before, untrained, after, share):
    measured = {f"held_out_{name}_before": before, f"held_out_{name}_untrained": untrained}
    assert outcome.regained(measured | {f"held_out_{name}_after": after}) == pytest.approx(share)


def test_removed_classes_do_not_count_as_useful(known):
    model, parts = known
    cut = {name: parts[name][1] == 0 for name in SETS}
    everything = [torch.cat([parts[name][i] for name in ("forget", "retain")]) for i in (0, 1)]
    of_class = everything[1] == 0
    sets = {
        "forget": tuple(column[of_class] for column in everything),
        "retain": tuple(column[~of_class] for column in everything),
        "held_out": parts["held_out"],
    }
    result = unlearn(model, **sets)
    assert result.removed_classes == (0,)
    others = tuple(column[~cut["held_out"]] for column in parts["held_out"])
    assert result.settings["held_out_accuracy_after"] == pytest.approx(evaluate(result.model, others).accuracy)
    assert "attack_auc_after" not in result.settings
