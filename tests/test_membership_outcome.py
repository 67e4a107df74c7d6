"""What every result of a statistic can do: be frozen, become strict JSON, and be drawn."""

import dataclasses
import json

import matplotlib
import numpy as np
import pytest

from nabla_tau import membership
from nabla_tau.membership.outcome import draw_estimates
from nabla_tau.membership.text import privleak_bootstrap

matplotlib.use("Agg")
from matplotlib import pyplot

RNG = np.random.default_rng(0)
INSIDE, OUTSIDE = RNG.normal(1, 1, 60), RNG.normal(0, 1, 60)
SCORES, LABELS = np.concatenate([INSIDE, OUTSIDE]), np.arange(120) < 60
CLASSES = RNG.integers(0, 3, 120)
LOGITS = RNG.normal(0, 3, (120, 4))
MARGINS = RNG.normal(0, 1, (24, 120))
GROUP = (np.arange(24)[:, None] + np.arange(120)) % 2 == 0
OTHERS = RNG.normal(0, 1, (24, 50))


def results():
    stats = membership.group_stats(MARGINS, GROUP)
    paired = membership.bootstrap_auc({"a": INSIDE, "b": -INSIDE}, {"a": OUTSIDE, "b": OUTSIDE}, fpr=[0.1])
    return [
        paired,
        paired.tpr[0.1],
        membership.class_thresholds(SCORES, LABELS, CLASSES),
        membership.delong_test(SCORES, SCORES + RNG.normal(size=120), LABELS),
        membership.eps_clopper_pearson(SCORES, LABELS),
        membership.eps_bayes(SCORES, LABELS),
        membership.neurips_forgetting(MARGINS[:12], MARGINS[12:]),
        stats,
        membership.js_divergence(LOGITS, LOGITS + RNG.normal(0, 0.1, LOGITS.shape)),
        membership.klom(MARGINS[:12], MARGINS[12:]),
        membership.ks_quality(INSIDE, OUTSIDE),
        membership.lira(SCORES, stats, variance="shrink"),
        membership.simple_mia(INSIDE, OUTSIDE),
        membership.attack_p(SCORES, OUTSIDE),
        membership.privleak(0.6, 0.5),
        privleak_bootstrap(paired, "a", "b"),
        membership.rmia(SCORES, MARGINS, GROUP, OTHERS[0], OTHERS, mode="offline", a="tune"),
        membership.roc(SCORES, LABELS),
        membership.song_mittal(LOGITS[:60], LOGITS[:60].argmax(1), LOGITS[60:], CLASSES[60:]),
        membership.svc_mia(INSIDE, OUTSIDE, INSIDE[:20]),
        membership.min_k([INSIDE[:9], OUTSIDE[:5]]),
        membership.yeom(-INSIDE, -OUTSIDE),
    ]


RESULTS = {type(found).__name__: found for found in results()}


def test_no_result_is_left_out():
    exported = {name for name in membership.__all__ if name.endswith(("Result", "Stats", "Thresholds", "Bootstrap"))}
    assert exported <= set(RESULTS)


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_every_result_is_frozen_becomes_strict_json_and_is_drawn(result):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(result, dataclasses.fields(result)[0].name, None)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))
    axes = result.plot()
    assert axes.has_data()
    assert result.plot(axes) is axes
    pyplot.close(axes.figure)


def test_estimates_are_drawn_from_the_top_with_their_intervals():
    axes = draw_estimates(pyplot.subplots()[1], {"first": (0.6, (0.5, 0.8)), "second": (0.2, None)}, reference=0.5)
    drawn = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert [[0.5, 0.0], [0.8, 0.0]] in drawn
    assert [[0.2, 1.0]] in drawn
    assert len(drawn) == 4
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
    assert axes.yaxis_inverted()
    pyplot.close(axes.figure)


def test_a_bound_is_drawn_up_to_what_could_have_been_shown():
    bound = membership.eps_clopper_pearson(SCORES, LABELS)
    interval = bound.plot().get_lines()[0].get_xdata()
    assert list(interval) == [bound.epsilon, bound.ceiling]


def test_scores_of_members_and_others_are_drawn_apart():
    scores = membership.min_k(list(RNG.normal(size=(40, 5)) - np.arange(40)[:, None]))
    axes = scores.plot(members=np.arange(40) < 20)
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"members", "others"}
    with pytest.raises(ValueError, match=r"labels must have shape \[40\]"):
        scores.plot(members=np.arange(3) < 2)
