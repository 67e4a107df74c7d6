"""Attacks by other models in an audit: they find memory that is there and none that is not."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nabla_tau.auditing import AuditReport, audit, audit_signals
from nabla_tau.evaluation import Signals, evaluate
from nabla_tau.membership.ensemble import train_ensemble
from nabla_tau.membership.shadow import train_shadow_ensemble
from nabla_tau.membership.shadow_attacks import sample_scores
from nabla_tau.membership.shadow_store import ShadowPlan, ShadowScores

FORGET, UNSEEN, RETAIN = 150, 300, 60
TRAINING = {"epochs": 60, "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2)}


def parts():
    """Half of the labels are noise: a model can learn these by heart only."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(FORGET + UNSEEN + RETAIN, 8, generator=generator)
    y = x[:, :4].argmax(1)
    noisy = torch.rand(len(y), generator=generator) < 0.5
    y[noisy] = torch.randint(4, (int(noisy.sum()),), generator=generator)
    cut = {"forget": slice(0, FORGET), "unseen": slice(FORGET, FORGET + UNSEEN), "retain": slice(-RETAIN, None)}
    return {name: (x[where], y[where]) for name, where in cut.items()}


def make():
    return mlp(width=128)


def halved(model: nn.Module, indices, seed) -> nn.Module:
    """An unlearning that leaves a trace: all confidence halved."""
    with torch.no_grad():
        model[-1].weight *= 0.5
        model[-1].bias *= 0.5
    return model


@pytest.fixture(scope="module")
def shadow(tmp_path_factory) -> ShadowScores:
    data = parts()
    return train_shadow_ensemble(
        tmp_path_factory.mktemp("shadow"),
        sets={name: data[name] for name in ("forget", "unseen")},
        always=data["retain"],
        models=24,
        make_model=make,
        unlearn=halved,
        **TRAINING,
    )


@pytest.fixture(scope="module")
def models() -> dict[str, list[nn.Module]]:
    """Eight models that were trained on the forget set and eight that were not; none on the unseen set."""
    data = parts()
    everything = tuple(torch.cat([of_set[i] for of_set in data.values()]) for i in (0, 1))
    member = np.zeros((16, FORGET + UNSEEN + RETAIN), bool)
    member[:, -RETAIN:] = True
    member[:8, :FORGET] = True
    ensemble = train_ensemble(make, everything, member, seed=99, **TRAINING)
    return {"original": [ensemble.model(k) for k in range(8)], "retrained": [ensemble.model(k) for k in range(8, 16)]}


def audited(models, **options) -> AuditReport:
    given = {"model": models["original"][1], "original": models["original"][0], "retrained": models["retrained"][0]}
    given |= parts() | {"bootstrap": 300} | options
    return audit(given.pop("model"), **given)


def test_what_was_memorised_is_found_and_what_was_never_seen_is_not(models, shadow):
    report = audited(models, shadow=shadow)
    unlearned, retrained = report.models["unlearned"], report.models["retrained"]
    assert report.verdict == "remembered"
    for attack in ("lira", "rmia"):
        assert unlearned.number(f"auc_{attack}") > 0.75
        assert unlearned.intervals[f"auc_{attack}"][0] > 0.7
        assert unlearned.number(f"tpr_at_1_percent_fpr_{attack}") > 0.1
        assert unlearned.intervals[f"tpr_at_1_percent_fpr_{attack}"][0] > 0.03
        assert abs(retrained.number(f"auc_{attack}") - 0.5) < 0.12
        assert retrained.number(f"tpr_at_1_percent_fpr_{attack}") < 0.05
    assert unlearned.auc_lira > unlearned.auc_loss + 0.02, "the attack must be stronger than one threshold for all"
    assert unlearned.tpr_at_1_percent_fpr_lira > unlearned.tpr_at_1_percent_fpr
    low, high = unlearned.gap_intervals["tpr_at_1_percent_fpr_lira"]
    assert 0 < low < unlearned.gap["tpr_at_1_percent_fpr_lira"] < high


def test_intervals_of_models_that_never_saw_the_samples_hold_one_half(models, shadow):
    """Intervals are of samples, so over models of one forget set they are not independent; that most hold is enough."""
    data = parts()
    signals = [{name: evaluate(m, data[name]) for name in ("forget", "unseen")} for m in models["retrained"]]
    report = audit_signals(
        {"unlearned": signals[0]} | {f"r{i}": of_model for i, of_model in enumerate(signals)},
        retrained=[f"r{i}" for i in range(8)],
        shadow=shadow,
        bootstrap=300,
    )
    runs = [m for m in report.models.values() if m.role == "retrained run"]
    for attack in ("lira", "ulira", "rmia"):
        assert sum(m.intervals[f"auc_{attack}"][0] <= 0.5 <= m.intervals[f"auc_{attack}"][1] for m in runs) >= 6
    assert report.verdict != "remembered"


def test_the_trace_of_unlearning_is_found_by_the_shadow_models_that_unlearned(models, shadow):
    data = parts()
    signals = [
        {name: evaluate(halved(m, 0, 0) if half else m, data[name]) for name in ("forget", "unseen")}
        for m, half in ((make_copy(models["original"][2]), True), (models["retrained"][2], False))
    ]
    found = [sample_scores(of_model, shadow) for of_model in signals]
    auc = [[separation(*scores[attack]) for attack in ("ulira", "lira")] for scores in found]
    assert auc[0][0] > 0.75
    assert auc[0][0] > auc[0][1] + 0.01, "models that halved their confidence are what a halved one is to be told by"
    assert abs(auc[1][0] - 0.5) < 0.12


def make_copy(model):
    copy = make()
    copy.load_state_dict(model.state_dict())
    return copy


def separation(members, others):
    """AUC, by counting."""
    return float(np.mean((members[:, None] > others) + 0.5 * (members[:, None] == others)))


def test_lira_is_the_likelihood_ratio_of_each_sample_by_itself(models, shadow):
    """By hand, in the order of the columns: a mistake in sets, masks or packing would show."""
    data = parts()
    signals = {name: evaluate(models["original"][3], data[name]) for name in ("forget", "unseen")}
    target = np.concatenate([signals[name].margin for name in ("forget", "unseen")])
    member, scored = shadow.membership, shadow.scores.astype(np.float64)
    inside, outside = (np.where(side, scored, np.nan) for side in (member, ~member))
    by_hand = np.nanmean(inside, 0) - np.nanmean(outside, 0)
    found = sample_scores(signals, shadow, offline=True)
    online, offline = (np.concatenate(found[attack]) for attack in ("lira", "lira_offline"))
    # Between the two means the ratio grows with the margin, and beyond the mean of the outsiders the tail does.
    assert np.corrcoef(offline, (target - np.nanmean(outside, 0)) / np.nanstd(outside, 0))[0, 1] > 0.8
    clear = (by_hand > 2) & (np.abs(target - (np.nanmean(inside, 0) + np.nanmean(outside, 0)) / 2) > by_hand / 3)
    assert clear.sum() > 20
    nearer_to_inside = np.abs(target - np.nanmean(inside, 0)) < np.abs(target - np.nanmean(outside, 0))
    assert np.mean((online > 0)[clear] == nearer_to_inside[clear]) > 0.9
    p = 1 / (1 + np.exp(-target))
    usual = (np.nanmean(1 / (1 + np.exp(-inside)), 0) + np.nanmean(1 / (1 + np.exp(-outside)), 0)) / 2
    np.testing.assert_allclose(np.concatenate(found["rmia"]), p / usual, rtol=1e-4)


def test_three_retrained_models_serve_where_there_are_no_shadow_models(models):
    report = audited(models, retrained=models["retrained"][:4])
    about = report.statistics["by_models"]
    assert (about["by"], about["models"], about["attacks"]) == ("retrained models", 4, ["lira", "rmia"])
    unlearned = report.models["unlearned"]
    assert unlearned.auc_rmia > 0.75
    assert unlearned.auc_lira > 0.6  # four models leave the tails open
    assert unlearned.auc_ulira is None
    assert any("rest on 4 retrained models" in finding.text for finding in report.findings)
    # Each is judged by the other three: by itself too it would be the most usual of all, and the same for all samples.
    alone = audited(models, model=models["retrained"][0], retrained=models["retrained"][1:4])
    names = [name for name, m in report.models.items() if m.role == "retrained run"]
    assert report.models[names[0]].auc_lira == pytest.approx(alone.models["unlearned"].auc_lira)
    assert audited(models, retrained=models["retrained"][:2]).statistics["by_models"] == {}


def test_the_report_survives_the_disk_and_shows_the_attacks(models, shadow, tmp_path):
    report = audited(models, shadow=shadow)
    assert AuditReport.load(report.save(tmp_path / "r.json")).to_dict() == report.to_dict()
    table = report.table()
    assert any("U-LiRA" in line and "MIA ent." in line for line in table.splitlines())
    assert "24 shadow models" in table
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    html = report.save(tmp_path / "r.html").read_text()
    for text in ("LiRA: ROC", "RMIA", "24 shadow models", "at least 12 with it and 12 without", "AUC, U-LiRA"):
        assert text in html
    without = audited(models)
    assert "LiRA" not in without.table()
    assert "LiRA: ROC" not in without.save(tmp_path / "w.html").read_text()


def test_a_report_of_an_earlier_version_is_still_read(models, tmp_path):
    report = audited(models)
    content = report.to_dict()
    del content["statistics"]["by_models"]
    for model in content["models"].values():
        for name in [name for name in model if name.endswith(("_lira", "_ulira", "_rmia"))]:
            del model[name]
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = AuditReport.load(tmp_path / "old.json")
    assert old.to_dict()["models"] == report.to_dict()["models"]
    old.table()
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    old.save(tmp_path / "old.html")


def test_shadow_models_of_other_samples_are_refused(models, shadow):
    data = parts()
    other = data["forget"][0].clone()
    other[0] += 1
    with pytest.raises(ValueError, match="another forget set"):
        audited(models, shadow=shadow, forget=(other, data["forget"][1]))
    with pytest.raises(ValueError, match="another unseen set: of 300 samples, while this one has 299"):
        audited(models, shadow=shadow, unseen=tuple(part[1:] for part in data["unseen"]))
    few = dataclasses.replace(shadow, plan=dataclasses.replace(shadow.plan, models=3))
    with pytest.raises(ValueError, match="need at least 4 of them, got 3"):
        audited(models, shadow=few)


def test_a_loader_over_the_same_tensors_is_the_same_set(models, shadow):
    data = parts()
    loader = DataLoader(TensorDataset(*data["forget"]), batch_size=64, shuffle=True)
    ours, theirs = audited(models, shadow=shadow), audited(models, shadow=shadow, forget=loader)
    assert ours.models == theirs.models


def fake(plan_sets, signal="margin", models=8):
    """Shadow scores that were never trained: margins drawn at random, four above the others for members."""
    rng = np.random.default_rng(0)
    samples = sum(plan_sets.values())
    member = rng.random((models, samples)).argsort(0) < models // 2
    scores = (rng.normal(size=(models, samples)) + 4 * member).astype(np.float32)
    plan = ShadowPlan(models, plan_sets, dict.fromkeys(plan_sets, ""), 0.5, 0, "float32", False)
    return ShadowScores(scores, None, np.packbits(member, axis=1), plan, signal, 1.0)


def fake_signals(n, shift, seed):
    margin = np.random.default_rng(seed).normal(shift, 1, n)
    loss = np.logaddexp(0, -margin)
    return Signals(loss, loss, margin, margin > 0, np.zeros(n, np.int64), "classification")


def test_sets_may_stand_anywhere_among_the_columns():
    signals = {"forget": fake_signals(30, 4, 1), "unseen": fake_signals(50, 0, 2)}
    together = fake({"forget": 30, "unseen": 50})
    apart = fake({"unseen": 50, "other": 9, "forget": 30})
    for array in (apart.scores, together.scores):
        assert array.shape[1] in (80, 89)
    moved = np.full((8, 89), np.nan, np.float32)
    member = np.zeros((8, 89), bool)
    for source, to in ((slice(0, 30), slice(59, 89)), (slice(30, 80), slice(0, 50))):
        moved[:, to], member[:, to] = together.scores[:, source], together.membership[:, source]
    apart = dataclasses.replace(apart, scores=moved, packed=np.packbits(member, axis=1))
    for attack, pair in sample_scores(signals, together, offline=True).items():
        for ours, theirs in zip(pair, sample_scores(signals, apart, offline=True)[attack], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_loss_of_ones_own_is_attacked_by_likelihood_alone():
    shadow = fake({"forget": 30, "unseen": 50}, signal="loss")
    signals = {"forget": fake_signals(30, 4, 1), "unseen": fake_signals(50, 0, 2)}
    bare = {n: dataclasses.replace(s, margin=None, entropy=None, correct=None) for n, s in signals.items()}
    assert [*sample_scores(bare, shadow)] == ["lira"]
    with pytest.raises(ValueError, match="scored by their margin, which this model does not have"):
        sample_scores(bare, fake({"forget": 30, "unseen": 50}))
