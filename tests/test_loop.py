"""`unlearn`: every kind of input, what stays untouched, what is reported, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import Pairs, blobs, mlp
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import nabla_tau
from nabla_tau import NonFiniteLossError, unlearn
from nabla_tau.evaluation import evaluate
from nabla_tau.methods.nabla_tau import COLUMNS
from nabla_tau.recipes import ASCENT, PAPER, make_plan

SHORT = dataclasses.replace(ASCENT, name="short", batch_size=32, retain_passes=1.0, min_steps=1)


def run(model, parts, **settings):
    names = ("forget", "retain", "held_out")
    return unlearn(model, **({name: parts[name] for name in names} | {"recipe": SHORT} | settings))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_forgets(memorised):
    model, parts = memorised
    result = run(model, parts, recipe="ascent")
    before, after = evaluate(model, parts["forget"]).loss, evaluate(result.model, parts["forget"]).loss
    unseen = evaluate(result.model, parts["unseen"]).loss
    assert result.settings["forget_loss_before"] == pytest.approx(before.mean(), rel=1e-5)
    assert result.settings["forget_loss_after"] == pytest.approx(after.mean(), rel=1e-5)
    assert before.mean() < 0.2
    assert abs(after.mean() - unseen.mean()) < 0.5 * abs(before.mean() - unseen.mean())


@pytest.mark.parametrize("recipe", ["ascent", "paper"])
def test_the_model_given_is_left_as_it_was(memorised, recipe):
    model, parts = memorised
    model = copy.deepcopy(model).train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    result = run(model, parts, recipe=recipe)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.model is not model
    assert model.training
    assert not model[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not torch.equal(weights(result.model), weights(model))
    assert all(p.grad is None for p in model.parameters())


def test_inplace_works_on_the_model_itself(memorised):
    model, parts = memorised
    mine = copy.deepcopy(model)
    assert run(mine, parts, inplace=True).model is mine
    assert torch.equal(weights(mine), weights(run(model, parts).model))


def test_same_seed_same_weights_other_seed_others(memorised):
    model, parts = memorised
    first = weights(run(model, parts, seed=3).model)
    torch.rand(5)
    assert torch.equal(first, weights(run(model, parts, seed=3).model))
    assert not torch.equal(first, weights(run(model, parts, seed=4).model))


class Named(Pairs):
    def __getitem__(self, index):
        return {"input": self.data[0][index], "labels": int(self.data[1][index])}


def test_tensors_datasets_and_mappings_give_the_same_weights(memorised):
    model, parts = memorised
    wanted = weights(run(model, parts).model)
    assert torch.equal(wanted, weights(run(model, {k: TensorDataset(*v) for k, v in parts.items()}).model))
    assert torch.equal(wanted, weights(run(model, {k: Pairs(v) for k, v in parts.items()}).model))
    # nn.Sequential calls its first argument `input`.
    assert torch.equal(wanted, weights(run(model, {k: Named(v) for k, v in parts.items()}).model))
    samples = {k: list(zip(*v, strict=True)) for k, v in parts.items()}
    assert torch.equal(wanted, weights(run(model, samples).model))


def test_loaders_keep_their_batch_size_and_order(memorised):
    model, parts = memorised
    seen: list[torch.Tensor] = []

    def forward(model, batch):
        seen.append(batch[0])
        return model(batch[0]), batch[1]

    loaders = {k: DataLoader(TensorDataset(*v), batch_size=20, shuffle=False) for k, v in parts.items()}
    result = run(model, loaders, forward=forward)
    assert result.settings["retain_batches_per_pass"] == 17
    forget_batches = [x for x in seen if x.shape[0] == 20 and torch.equal(x, parts["forget"][0][:20])]
    assert forget_batches, "an unshuffled loader must give its first 20 samples as its first batch"
    shuffled = {k: DataLoader(TensorDataset(*v), batch_size=20, shuffle=True) for k, v in parts.items()}
    assert torch.equal(weights(run(model, shuffled).model), weights(run(model, shuffled).model))


def test_history_settings_and_log(memorised):
    model, parts = memorised
    logged: list[tuple[int, dict]] = []
    result = run(model, parts, log=lambda values, step: logged.append((step, values)))
    steps = result.settings["steps"]
    assert list(result.history) == list(COLUMNS)
    assert result.history["step"] == list(range(steps)) == [step for step, _ in logged]
    assert {len(values) for values in result.history.values()} == {steps}
    assert logged[-1][1]["tau"] == result.history["tau"][-1]
    rms = sorted(p.square().mean().sqrt().item() for p in model.parameters() if p.ndim > 1)
    assert result.history["learning_rate"][0] == result.settings["learning_rate"] == pytest.approx(rms[0] / 25)
    assert result.settings["learning_rate_from"] == "weights"
    assert result.settings["forget_kind"] == "random subset"
    assert result.settings["row_kernel"] == "cpp"
    assert result.counts == {"forget": 60, "retain": 340, "held_out": 300}
    assert {field.name for field in dataclasses.fields(SHORT)} <= set(result.settings)


def test_published_schedule():
    plan = make_plan(
        PAPER, forget_batches=30, retain_batches=166, forget_count=7500, retain_count=42500, learning_rate=1e-3
    )
    epochs = int(166 / 60 * 6)
    assert plan.steps == epochs * 30
    assert plan.alpha(0) == pytest.approx(0.25)
    assert plan.alpha(29) == pytest.approx(0.25)
    assert plan.alpha(30) == pytest.approx(0.25 * (1 - 1 / epochs))
    assert plan.learning_rate(0) == 1e-3
    assert plan.learning_rate(plan.steps - 1) == pytest.approx(1e-3 * (1 - 0.9 * (epochs - 1) / epochs))
    assert plan.tau_every == 5 * 30


def test_shared_samples_are_warned_about(memorised):
    model, parts = memorised
    retain = tuple(torch.cat((a, b[:7])) for a, b in zip(parts["retain"], parts["forget"], strict=True))
    with pytest.warns(UserWarning, match="7 of 60 forget samples are in the retain set"):
        run(model, parts | {"retain": retain})
    whole = TensorDataset(*(torch.cat((a, b)) for a, b in zip(parts["forget"], parts["retain"], strict=True)))
    with pytest.warns(UserWarning, match="3 of 60 forget samples"):
        run(model, parts | {"forget": Subset(whole, range(60)), "retain": Subset(whole, range(57, 400))})


def test_gate_that_never_opens_is_warned_about(memorised):
    model, parts = memorised
    with pytest.warns(UserWarning, match="the gate never opened.*held-out data was part of training"):
        result = run(model, parts, held_out=parts["retain"], forget=parts["unseen"], recipe="paper")
    assert result.settings["gate_open_fraction"] == 0


def test_gate_that_never_closes_is_warned_about(memorised):
    model, parts = memorised
    timid = dataclasses.replace(PAPER, learning_rate=1e-7)
    with pytest.warns(UserWarning, match="the gate never closed.*learning rate"):
        run(model, parts, recipe=timid)
    timid = dataclasses.replace(ASCENT, learning_rate=1e-7, shrink=1.0, noise=0.0)
    with pytest.warns(UserWarning, match="the gate never closed.*learning rate"):
        run(model, parts, recipe=timid)


def test_held_out_data_that_was_trained_on_is_warned_about_by_the_default_too(memorised):
    model, parts = memorised
    with pytest.warns(UserWarning, match="hardly anything to forget.*held-out data was part of training"):
        run(model, parts, held_out=parts["retain"], recipe="ascent")


def test_nothing_is_printed_or_logged_above_info(memorised, capsys, caplog):
    model, parts = memorised
    with caplog.at_level(logging.WARNING):
        run(model, parts, progress=True)
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


def test_a_refusal_late_in_the_preparation_leaves_an_inplace_model_as_it_was(memorised):
    model, parts = memorised
    mine = copy.deepcopy(model)
    (x, y), (x_retain, y_retain) = parts["held_out"], parts["retain"]
    whole_class = {"forget": (x_retain[y_retain == 1], y_retain[y_retain == 1])}
    rest = {"retain": (x_retain[y_retain != 1], y_retain[y_retain != 1]), "held_out": (x[y == 1], y[y == 1])}
    with pytest.raises(ValueError, match="holds only classes"):
        run(mine, whole_class | rest, inplace=True)
    assert torch.equal(weights(mine), weights(model))


def test_non_finite_in_the_first_step_gives_back_the_model_as_it_came(memorised):
    model, parts = memorised
    calls = []

    def forward(model, batch):
        calls.append(torch.is_grad_enabled())
        return model(batch[0]) * (float("nan") if any(calls) else 1.0), batch[1]

    with pytest.raises(NonFiniteLossError, match="in step 0") as caught:
        run(model, parts, forward=forward)
    assert torch.equal(weights(caught.value.result.model), weights(model))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 8, padding_idx=0, mode="sum")
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(8, 4)

    def forward(self, tokens):
        return self.head(self.bag(tokens))


def test_padding_rows_stay_zero_and_parameters_without_gradient_are_not_decayed():
    torch.manual_seed(0)
    model = Bag()
    tokens, labels = torch.randint(20, (300, 6)), torch.randint(4, (300,))
    parts = {"forget": (tokens[:40], labels[:40]), "retain": (tokens[40:200], labels[40:200])}
    held_out = {"held_out": (tokens[200:], labels[200:])}
    result = run(model, parts | held_out)
    assert result.model.bag.weight[0].abs().max() == 0
    kept = run(model, parts | held_out, recipe=dataclasses.replace(SHORT, shrink=1.0, noise=0.0)).model
    assert torch.equal(kept.unused.weight, model.unused.weight)
    assert not torch.equal(kept.head.weight, model.head.weight)


def test_a_forward_of_ones_own_knows_where_the_targets_are(memorised):
    model, parts = memorised
    wanted = run(model, parts)
    swapped = {name: (y, x) for name, (x, y) in parts.items()}
    result = run(model, swapped, forward=lambda model, batch: (model(batch[1]), batch[0]))
    assert torch.equal(weights(result.model), weights(wanted.model))
    assert result.settings["forget_kind"] == wanted.settings["forget_kind"]


def test_regression_targets_are_not_taken_for_labels(memorised):
    model, parts = memorised
    wrong = {name: (x, 50 * torch.rand(len(x), 4)) for name, (x, _) in parts.items()}
    with pytest.raises(ValueError, match=r"multi-label and must lie in \[0, 1\]"):
        run(model, wrong)


def test_result_as_json_is_strict(memorised):
    model, parts = memorised
    result = dataclasses.replace(run(model, parts), seconds=float("inf"))
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["seconds"] is None


@pytest.mark.parametrize("inplace", [False, True])
def test_non_finite_loss_stops_and_keeps_the_last_good_weights(memorised, inplace):
    model, parts = memorised
    model = copy.deepcopy(model)
    calls = {"steps": 0}

    def forward(model, batch):
        logits = model(batch[0])
        if torch.is_grad_enabled() and batch[0].shape[0] <= 32:
            calls["steps"] += 1
            if calls["steps"] > 12:
                logits = logits * float("nan")
        return logits, batch[1]

    recipe = dataclasses.replace(SHORT, tau_every=0.2)
    with pytest.raises(NonFiniteLossError, match=r"step 6 of 11 .*forget loss nan") as caught:
        run(model, parts, forward=forward, recipe=recipe, inplace=inplace, performance="off")
    good = caught.value.result.model
    assert caught.value.step == 6
    assert (good is model) == inplace
    assert weights(good).isfinite().all()
    assert len(caught.value.result.history["step"]) == 6
    assert np.isfinite(evaluate(good, parts["unseen"]).loss).all()


def test_non_finite_gradient_of_a_finite_loss(memorised):
    model, parts = memorised

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    for recipe in (SHORT, dataclasses.replace(SHORT, gate="batch", balance=None, hold=False)):
        with pytest.raises(NonFiniteLossError, match="a gradient became non-finite in step 0") as caught:
            run(model, parts, forward=lambda m, b: (Poison.apply(m(b[0])), b[1]), recipe=recipe)
        assert weights(caught.value.result.model).isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"forget": (torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))}, ValueError, "the forget set is empty"),
        ({"retain": []}, ValueError, "the retain set is empty"),
        ({"held_out": None}, ValueError, "held_out is None: tau is the loss of data the model was never trained on"),
        ({"held_out": 0.2}, ValueError, "retain_is_unseen=True"),
        ({"held_out": 1.5, "retain_is_unseen": True}, ValueError, r"in \(0, 1\), got 1.5"),
        ({"forget": (torch.zeros(3, 8), torch.zeros(4, dtype=torch.int64))}, ValueError, r"\(3, 8\), \(4,\)"),
        ({"forget": (torch.zeros(3, 8), torch.tensor([0, 4, 0]))}, ValueError, "target 4 in row 1.*4 classes"),
        ({"retain": (torch.zeros(3, 8), torch.tensor([0, -2, 0]))}, ValueError, "target -2 in row 1"),
        ({"forget": 17}, TypeError, "forget must be tensors .* got int"),
        ({"recipe": "magic"}, ValueError, "recipe must be one of default, ascent, gentle, paper .* got 'magic'"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(memorised, change, error, text):
    model, parts = memorised
    mine = copy.deepcopy(model)
    with pytest.raises(error, match=text):
        run(mine, parts, inplace=True, **change)
    assert torch.equal(weights(mine), weights(model))


def test_frozen_model_is_refused(memorised):
    _, parts = memorised
    with pytest.raises(ValueError, match="no trainable parameter"):
        run(mlp().requires_grad_(False), parts)


def test_recipe_refuses_what_makes_no_sense():
    for change in ({"learning_rate": 0.0}, {"batch_size": 0}, {"alpha": 2.0}, {"gate": "x"}, {"schedule": "x"}):
        with pytest.raises(ValueError, match=str(next(iter(change.values())))):
            dataclasses.replace(ASCENT, **change)


def test_held_out_share_of_an_unseen_retain_set(memorised):
    model, parts = memorised
    result = run(model, parts, retain=parts["unseen"], held_out=0.25, retain_is_unseen=True)
    assert result.counts["held_out"] == 75
    assert result.counts["retain"] == 225


def test_multilabel_and_sequences_run_through_the_same_loop():
    torch.manual_seed(0)
    x, _ = blobs(300)
    multilabel = (torch.rand(300, 5) < 0.3).float()
    tokens = torch.randint(4, (300, 6))
    tokens[:, 4:] = -100
    for model, targets in (
        (mlp(classes=5), multilabel),
        (nn.Sequential(nn.Linear(8, 24), nn.Unflatten(1, (6, 4))), tokens),
    ):
        parts = {"forget": (x[:40], targets[:40]), "retain": (x[40:200], targets[40:200])}
        result = run(model, parts | {"held_out": (x[200:], targets[200:])})
        assert result.settings["forget_kind"] == "random subset"
        assert np.isfinite(result.history["loss"]).all()


def test_import_loads_no_optional_package():
    optional = ("rich", "jsonargparse", "matplotlib", "jinja2", "safetensors", "triton", "pandas")
    loaded = f"print([m for m in {optional} if m in sys.modules])"
    code = f"import sys; from nabla_tau import *; {loaded}"
    # torch itself may import some of them: what counts is what nabla_tau adds.
    base = f"import sys, torch; {loaded}"
    ran = (subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True) for c in (code, base))
    with_nabla_tau, with_torch = (process.stdout for process in ran)
    assert with_nabla_tau == with_torch
    assert len(nabla_tau.__all__) <= 10
    assert all(getattr(nabla_tau, name).__name__ == name for name in nabla_tau.__all__)
