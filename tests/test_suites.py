"""Suites, scenarios and the comparison of methods."""

from __future__ import annotations

import csv
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs, mlp
from torch import nn

from nabla_tau import cli
from nabla_tau.suites import SUITES, Suite, models, runs
from nabla_tau.suites.data import Data, DataNotFoundError, digits
from nabla_tau.suites.measures import MEASURES, answers, compared, remarks
from nabla_tau.suites.runs import ORIGINAL, RETRAINED, compare_methods, load_suite, method_of, quick
from nabla_tau.suites.scenarios import Scenario, split
from nabla_tau.suites.shadows import Shadows, _leave_one_out
from nabla_tau.suites.table import ComparisonTable, Row

SUITE = Suite(
    "blobs",
    partial(blobs, 900),
    mlp,
    partial(mlp, width=24),
    train=400,
    held_out=150,
    epochs=40,
    batch_size=64,
    learning_rate=1e-2,
)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> tuple[ComparisonTable, Path]:
    cache = tmp_path_factory.mktemp("cache")
    methods = ("nabla-tau", "finetune", "neg-grad")
    return compare_methods(SUITE, Scenario("random", 0.15), methods=methods, seeds=(0, 1), cache=cache), cache


# Scenarios
# ---------------------------------------------------------------------------------------------------------------------

KINDS = [("random", 0.15), ("classes", 1), ("half a class", 0), ("mislabelled", 0.1), ("outliers", 40)]


def of(kind: str, amount: float, seed: int = 0):
    reference = partial(runs.train, mlp, epochs=5, batch_size=64, learning_rate=1e-2, seed=seed)
    return split(blobs(900), Scenario(kind, amount), train=400, held_out=150, seed=seed, reference=reference)


@pytest.mark.parametrize(("kind", "amount"), KINDS)
def test_parts_do_not_overlap_and_are_the_same_for_a_seed(kind, amount):
    parts = of(kind, amount)
    rows = [x.numpy() for x in (parts.forget[0], parts.retain[0], parts.held_out[0], parts.test[0])]
    together = np.concatenate(rows)
    assert len(np.unique(together, axis=0)) == len(together) == 900
    assert len(rows[0]) + len(rows[1]) == len(parts.train[0]) == 400
    for one, other in zip(parts, of(kind, amount), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert not torch.equal(of(kind, amount, seed=1).forget[0], parts.forget[0])


def test_what_each_scenario_forgets():
    x, y = blobs(900)
    labels = {tuple(row.tolist()): int(label) for row, label in zip(x, y, strict=True)}

    def changed(part) -> float:
        return float(np.mean([labels[tuple(row.tolist())] != int(label) for row, label in zip(*part, strict=True)]))

    assert len(of("random", 0.15).forget[1]) == 60
    whole = of("classes", 2)
    gone = set(whole.forget[1].tolist())
    assert len(gone) == 2
    assert not gone & set(whole.retain[1].tolist())
    assert set(whole.unseen[1].tolist()) == gone < set(whole.test[1].tolist())
    half = of("half a class", 0)
    (label,) = set(half.forget[1].tolist())
    kept = int((half.retain[1] == label).sum())
    assert 0.25 < len(half.forget[1]) / (kept + len(half.forget[1])) < 0.75
    wrong = of("mislabelled", 0.1)
    assert len(wrong.forget[1]) == 40
    assert changed(wrong.forget) == changed(wrong.unseen) == 1.0
    assert changed(wrong.retain) == changed(wrong.held_out) == changed(wrong.test) == 0.0
    hard = of("outliers", 40)
    judge = runs.train(mlp, hard.held_out, epochs=5, batch_size=64, learning_rate=1e-2, seed=0)
    with torch.no_grad():
        found = [nn.functional.cross_entropy(judge(x), y, reduction="none") for x, y in (hard.forget, hard.retain)]
    assert found[0].min() >= found[1].max()
    assert len(hard.unseen[1]) == round(40 * 350 / 400)


@pytest.mark.parametrize(
    ("kind", "amount", "message"),
    [
        ("random", 1.5, "random: the share must be in .0, 1., got 1.5"),
        ("classes", 0, "classes: the number must be a whole one of at least 1, got 0"),
        ("outliers", 2.5, "outliers: the number must be a whole one"),
        ("nonsense", 1, "kind must be one of random, .* got 'nonsense'"),
    ],
)
def test_scenarios_that_make_no_sense(kind, amount, message):
    with pytest.raises(ValueError, match=message):
        Scenario(kind, amount)


def test_scenarios_that_the_data_cannot_fill():
    with pytest.raises(ValueError, match="4 classes are to be forgotten of 4"):
        of("classes", 4)
    with pytest.raises(ValueError, match="800 training and 100 held-out samples leave none unseen of 900"):
        split(blobs(900), Scenario("random", 0.1), train=800, held_out=100, seed=0)


# Suites
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, suite in SUITES.items() if suite.device == "cpu"])
def test_model_and_data_of_a_suite_fit(name):
    suite = SUITES[name]
    try:
        x, y = suite.data()
    except DataNotFoundError as error:
        pytest.skip(str(error))
    assert y.dtype == torch.int64
    assert suite.train + suite.held_out < len(x) == len(y)
    assert len(torch.unique(x.flatten(1), dim=0)) > 0.99 * len(x), "what is forgotten must not be retained too"
    for make in filter(None, (suite.model, suite.shadow)):
        with torch.no_grad():
            assert make().eval()(x[:3]).shape == (3, int(y.max()) + 1)


def test_padding_does_not_change_a_text():
    model = models.SmallTransformer(5).eval()
    words = torch.randint(1, 1000, (2, 12))
    with torch.no_grad():
        padded = torch.cat((words, torch.zeros(2, 18, dtype=torch.long)), 1)
        torch.testing.assert_close(model(padded), model(words), rtol=1e-4, atol=1e-5)


def test_a_suite_of_a_strangers_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from sklearn.datasets import load_wine\nimport torch\nfrom torch import nn\n"
        "from nabla_tau.suites import Suite\n"
        "def data():\n    x, y = load_wine(return_X_y=True)\n"
        "    return torch.from_numpy((x - x.mean(0)) / x.std(0)).float(), torch.from_numpy(y)\n"
        "def model():\n    return nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3))\n"
        "SUITE = Suite('wine', data, model, shadow=None, train=100, held_out=30, epochs=10)\n"
    )
    out = tmp_path / "wine.html"
    arguments = ["--data", path, "--quick", "--methods", "finetune", "--out", out, "--cache", tmp_path / "c"]
    assert cli.main(["compare", *map(str, arguments)]) == 0
    assert {row["suite"] for row in csv.DictReader(out.with_suffix(".csv").open())} == {"wine"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing"], "data must be one of fashion_mnist, .* got 'nothing'"),
        (["--data", "absent.py"], "no task file at absent.py"),
        (["--methods", "magic"], "methods must be of default, nabla-tau, .* got 'magic'"),
        (["--fraction", "2"], "random: the share must be in"),
        (["--fraction", ".1", "--classes", "1"], "one thing is forgotten in a comparison, got 10% random and 1 class"),
        (["--shadow", "3"], "U-LiRA needs at least 16 shadow models, got 3"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--out", "x.pdf"], "--out writes a .html file"),
    ],
)
def test_what_the_command_refuses(arguments, message, capsys):
    import re

    assert cli.main(["compare", "--data", "digits", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


# The comparison
# ---------------------------------------------------------------------------------------------------------------------


def test_gaps_are_differences_from_the_retrained_model_of_the_seed(table):
    found, cache = table
    case = runs._Case(SUITE, Scenario("random", 0.15), SUITE.data(), 1, runs._Store(cache, "unused"), 0)
    row = next(row for row in found.rows if (row.method, row.seed) == (ORIGINAL, 1))
    x, y = case.parts.test
    with torch.no_grad():
        accuracies = [float((model(x).argmax(1) == y).float().mean()) for model, _ in case.models.values()]
        x, y = case.parts.forget
        logs = [model(x).log_softmax(1).double() for model, _ in case.models.values()]
    original, retrained, _ = accuracies
    assert row.measures["gap_test_accuracy"] == pytest.approx(original - retrained, abs=1e-6)
    divergence = (logs[1].exp() * (logs[1] - logs[0])).sum(1).mean()
    assert row.measures["kl_forget"] == pytest.approx(float(divergence), rel=1e-4)
    assert row.measures["gap_auc_loss"] > 0.02, "these models have memorised"


def test_a_model_compared_with_itself_has_no_gap():
    parts = of("random", 0.15)
    own = answers(runs.train(mlp, parts.retain, epochs=5, batch_size=64, learning_rate=1e-2, seed=0), parts)
    figures = compared(own, own)
    assert {name: value for name, value in figures.items() if name.startswith("gap_")} == dict.fromkeys(
        [name for name in MEASURES if name.startswith("gap_")], 0.0
    )
    assert (figures["tow"], figures["kl_forget"]) == (1.0, 0.0)
    assert remarks(own, own, own) == []


def test_the_table_says_what_did_nothing_and_what_collapsed(table):
    parts = of("random", 0.15)
    original, retrained = (
        answers(runs.train(mlp, part, epochs=40, batch_size=64, learning_rate=1e-2, seed=0), parts)
        for part in (parts.train, parts.retain)
    )
    assert remarks(original, original, retrained) == [
        "nothing done: on the forget set it answers nearly as the original does"
    ]
    assert remarks(answers(mlp().eval(), parts), original, retrained)[0].startswith("collapsed: more than 10 points")


def test_order_and_distance(table):
    found, _ = table
    summaries = found.summaries()
    assert [s.distance for s in summaries] == sorted(s.distance for s in summaries)
    assert {s.method for s in summaries} == {ORIGINAL, RETRAINED, "nabla-tau", "finetune", "neg-grad"}
    for s in summaries:
        rows = [row.measures for row in found.rows if row.method == s.method]
        names = [f"gap_{name}" for name in ("forget_accuracy", "retain_accuracy", "test_accuracy", "mia_loss")]
        wanted = np.mean([[abs(r[name]) for name in names] for r in rows])
        assert s.distance == pytest.approx(100 * wanted)
        mean, deviation = s.measures["gap_auc_loss"]
        values = [r["gap_auc_loss"] for r in rows]
        assert (mean, deviation) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))


def test_files(table, tmp_path):
    found, _ = table
    for suffix in (".json", ".csv", ".html", ".png", ".svg"):
        assert found.save(tmp_path / f"c{suffix}").stat().st_size > 500
    assert json.loads((tmp_path / "c.json").read_text())["suite"] == "blobs"
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert len(rows) == len(found.rows) == 10
    assert float(rows[0]["gap_auc_loss"]) == pytest.approx(found.rows[0].measures["gap_auc_loss"], rel=1e-5)
    with pytest.raises(ValueError, match="a comparison is written as .json, .csv, .html, .png, .svg, got c.pdf"):
        found.save("c.pdf")


def test_the_page_escapes_what_it_shows(tmp_path):
    text = "<script>alert(1)</script>"
    row = Row(text, 0, dict.fromkeys(MEASURES, 0.1), [text])
    settings = {"seeds": [0], "shadow_models": 0, "versions": {}}
    ComparisonTable(text, text, [row], {"forget": 1, "train": 2}, settings).save(tmp_path / "c.html")
    assert "<script>" not in (tmp_path / "c.html").read_text()


def test_what_is_in_the_cache_is_not_made_again(table, monkeypatch):
    found, cache = table

    def never(*args: object, **settings: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(runs, "train", never)
    monkeypatch.setattr(runs, "unlearn", never)
    methods = ("nabla-tau", "finetune", "neg-grad")
    again = compare_methods(SUITE, Scenario("random", 0.15), methods=methods, seeds=(0, 1), cache=cache)
    assert again.to_dict()["rows"] == found.to_dict()["rows"]
    other = dataclasses.replace(SUITE, epochs=3)
    with pytest.raises(AssertionError, match="made again"):
        compare_methods(other, Scenario("random", 0.15), methods=methods, seeds=(0,), cache=cache, shadows=0)


def test_what_takes_little_is_timed_three_times():
    for seconds, wanted in (([0.3, 9.0, 0.2], 0.3), ([0.3, 0.2, 0.1], 0.2), ([5.0], 5.0)):
        given = iter(enumerate(seconds))
        assert runs._timed(lambda given=given: next(given)) == (0, wanted), "what came first, and the median"
        assert not list(given)


def test_a_method_that_cannot_serve_says_so(tmp_path):
    suite = dataclasses.replace(SUITE, model=partial(nn.Linear, 8, 4), shadow=None, epochs=3)
    table = compare_methods(suite, Scenario("random", 0.15), methods=("cf-k",), seeds=(0,), cache=tmp_path)
    (row,) = (row for row in table.rows if row.method == "cf-k")
    assert row.measures == {}
    assert row.remarks == ["not for this: k must be between 1 and the 1 layers with parameters of this model, got 2"]
    assert table.summaries()[-1].method == "cf-k"
    assert "not for this" in table.table()


# U-LiRA
# ---------------------------------------------------------------------------------------------------------------------


def test_ulira_of_a_known_shift():
    generator = np.random.default_rng(0)
    retrained = generator.normal(size=(16, 400))
    alike = generator.normal(size=(16, 400))
    assert abs(_leave_one_out(alike, retrained) - 0.5) < 0.02
    # Two normal distributions one standard deviation apart: AUC = Phi(1 / sqrt 2) = .76 for an attack that knows them.
    assert 0.7 < _leave_one_out(alike + 1.0, retrained) < 0.76


def test_attacks_on_methods_by_shadow_models():
    parts = of("random", 0.15)
    shadows = Shadows(SUITE, parts, models=16, seed=0)

    def nothing(model: nn.Module, *_: Any) -> nn.Module:
        return model

    def retrain(_: nn.Module, forget: Data, seed: int) -> nn.Module:
        return runs.train(partial(mlp, width=24), parts.retain, epochs=40, batch_size=64, learning_rate=1e-2, seed=seed)

    def wreck(model: nn.Module, forget: Data, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        for layer in (model[0], model[2]):
            layer.reset_parameters()
        return model

    untouched = shadows.ulira(nothing)
    assert shadows.ulira(wreck) > 0.95
    assert abs(shadows.ruli(wreck) - 0.5) < 0.06, "it is seen that all were wrecked, and not because of which samples"
    assert shadows.ulira(nothing) == untouched, "what a method does to a model is not done to the next one's"
    assert abs(shadows.control - 0.5) < 0.06
    assert untouched > shadows.control + 0.15
    assert shadows.ruli(nothing) > shadows.control + 0.15
    assert abs(shadows.ulira(retrain) - 0.5) < 0.15
    assert abs(shadows.ruli(retrain) - 0.5) < 0.06
    assert shadows.cut_short(1.0) == shadows.control
    assert shadows.cut_short(0.25) > shadows.control + 0.15
    with pytest.raises(ValueError, match="epochs of a training that is cut short must be at least 1, got 0"):
        shadows.cut_short(0.001)


def test_ruli_gives_each_model_its_own_half():
    parts = of("random", 0.15)
    shadows = Shadows(SUITE, parts, models=16, seed=0)
    asked: list[list[tuple[float, ...]]] = []

    def remember(model: nn.Module, forget: Data, _: int) -> nn.Module:
        asked.append(sorted(map(tuple, forget[0].tolist())))
        return model

    shadows.ruli(remember)
    assert len(asked) == 32
    assert asked[:16] == [asked[0]] * 16
    assert asked[16:] == [asked[16]] * 16
    assert sorted(asked[0] + asked[16]) == sorted(map(tuple, parts.forget[0].tolist()))


def test_names():
    assert load_suite("digits") is SUITES["digits"]
    assert method_of("nabla-tau (paper)") == {"recipe": "paper"}
    small = quick(SUITES["digits"])
    assert (small.train, small.held_out) == (250, 75)
    assert len(digits()[0]) == 1797


HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "]]>--><svg onload=x>",
    "&lt;b&gt;",
    "$\\frac{ $",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_strangers_becomes_markup(tmp_path, text):
    from html.parser import HTMLParser

    class Page(HTMLParser):
        tags, shown = set(), ""

        def handle_starttag(self, tag, attributes):
            self.tags = self.tags | {tag, *(name for name, _ in attributes)}

        def handle_data(self, data):
            self.shown += data

    row = Row(text, 0, dict.fromkeys(MEASURES, 0.1), [text])
    settings = {"seeds": [0], "shadow_models": 0, text: text}
    table = ComparisonTable(text, text, [row], {"forget": 1, "train": 2, text: 3}, settings)
    page = Page()
    page.feed(table.save(tmp_path / "c.html").read_text())
    assert not page.tags & {"script", "img", "onload", "onerror"}
    # Title, heading, the plot, the row and its remark, counts and settings.
    assert page.shown.count(text) >= 8
    assert text in json.dumps(table.to_dict(), ensure_ascii=False).replace('\\"', '"').replace("\\\\", "\\")
