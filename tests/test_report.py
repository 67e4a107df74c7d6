"""The HTML page: whole in one file, everything escaped, rebuilt from JSON alone, and nothing left out."""

import dataclasses
import re
import sys
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pytest

from nabla_tau.auditing import AuditReport, audit_signals
from nabla_tau.evaluation import Signals

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from nabla_tau.report import render_html

SCRIPT = "<script>alert('x')</script>"
LONG = "no-place-to-break/" * 12
VOID = {"meta", "br", "link", "img", "input", "hr"}


def sets(ease, own):
    def signals(n, shift, seed):
        rng = np.random.default_rng([seed, own])
        margin = rng.normal(shift, 2, n)
        loss = np.logaddexp(0, -margin)
        return Signals(loss, loss / 2, margin, margin > 0, rng.integers(0, 2, n) * 0, "classification")

    return {"forget": signals(120, ease, 1), "unseen": signals(200, 0, 2)}


@cache
def hostile():
    """With every text that a user can give made to break the page."""
    record = {
        "recipe": SCRIPT,
        "settings": {SCRIPT: SCRIPT, LONG: LONG, "learning_rate": 0.003, "unset": None, "list": ["<b>", 1]},
        "history": {"step": [0, 1, 2], "forget_loss": [0.1, None, 0.5], "tau": [1, 1, 1], "gate_open": [1, 1, 0]},
        "warnings": [SCRIPT, LONG],
        "counts": {"forget": 120, SCRIPT: 3},
        "versions": {SCRIPT: SCRIPT},
        "removed_classes": [],
    }
    models = {
        "unlearned": sets(0.5, 1),
        "r1": sets(0, 2),
        "r2": sets(0, 3),
        "original": sets(4, 4),
        SCRIPT: sets(1, 5),
        'cost $x^2$ & "more"': sets(1, 6),
        LONG: sets(2, 7),
    }
    return audit_signals(
        models, retrained=["r1", "r2"], original="original", record=record, bootstrap=100, seconds={"retrained": 60}
    )


@pytest.fixture(scope="module")
def full():
    return hostile()


class Page(HTMLParser):
    """Tags with attributes, visible text, and whether every tag that opens also closes."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_every_text_of_a_user_is_escaped_and_shown(full):
    html = render_html(full)
    page = Page(html)
    assert page.open == []
    assert "<script" not in html
    assert not any(tag == "script" or any(k.startswith("on") for k in attributes) for tag, attributes in page.tags)
    # In figures, table, legend, histogram, settings (name and value), recipe, counts, versions and findings.
    assert page.text.count(SCRIPT) >= 9


def test_every_model_is_in_the_page(full):
    text = Page(render_html(full)).text
    for name, model in full.models.items():
        assert name in text
        assert f"{model.auc_loss:.3f}" in text
    assert full.sentence in text
    for finding in full.findings:
        assert finding.text in text


def test_the_page_loads_nothing(full):
    html = render_html(full)
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", html)
    for tag, attributes in Page(html).tags:
        assert tag not in {"link", "img", "iframe", "object", "embed"}
        assert not {"src", "srcset", "href", "data"} & attributes.keys()
        assert attributes.get("xlink:href", "#").startswith("#")


def test_the_page_is_rebuilt_from_json_alone(full, tmp_path):
    loaded = AuditReport.load(full.save(tmp_path / "audit.json"))
    assert render_html(loaded) == render_html(full)
    page = loaded.save(tmp_path / "audit.html").read_text()
    assert page == render_html(full)


def test_every_line_of_a_plot_follows_the_page_colours(full):
    html = render_html(full)
    assert "#0a0b" not in html  # a placeholder that no variable replaced
    for variable in set(re.findall(r"var\((--[\w-]+)\)", html)):
        assert f"{variable}:" in html, f"{variable} is used and not defined"


DIGESTS = {name: str(i) * 64 for i, name in enumerate(("forget", "retain", "held_out", "unseen", "before", "after"))}


def documented(**options):
    record = {
        "method": "nabla-tau",
        "recipe": "default",
        "counts": {"forget": 1200, "retain": 34000, "held_out": 560},
        "settings": {"forget_kind": "random subset", "steps": 7890, "seed": 41},
        "history": {
            "step": [0, 10, 20],
            "forget_loss": [0.1, 0.6, 0.5],
            "retain_loss": [0.1, 0.3, 0.2],
            "tau": [0.5] * 3,
        },
        "seconds": 33.0,
        "created": "2031-02-03T04:05:06+00:00",
        "hardware": {"processor": "Abacus 9", "cores": 4, "threads": 3, "device": "cuda:1 (Loom)"},
        "versions": {"nabla_tau": "9.8.7", "torch": "6.5.4"},
        "fingerprints": {name: DIGESTS[name] for name in ("forget", "retain", "held_out")}
        | {"model": DIGESTS["before"]},
        "unlearned_fingerprint": DIGESTS["after"],
    }
    fingerprints = {
        "models": {"unlearned": DIGESTS["after"], "original": DIGESTS["before"]},
        "sets": {"forget": DIGESTS["forget"], "unseen": DIGESTS["unseen"]},
    }
    models = {"unlearned": sets(0.5, 1), "retrained": sets(0, 2), "original": sets(4, 4), "finetuned": sets(2, 5)}
    roles = {"retrained": ["retrained"], "original": "original"}
    return audit_signals(models, **roles, record=record, fingerprints=fingerprints, bootstrap=100, **options)


def test_the_page_says_what_was_asked_done_and_checked():
    report = documented(random_state=77)
    page = " ".join(Page(render_html(report)).text.split())
    section = page.split("What was asked, done and checked")[1].split("How well the attacks do")[0]
    for digest in DIGESTS.values():
        assert digest in section
    asked, done, checked = re.split(r"Done|Checked", section)
    assert "1,200 of 35,200 training samples" in asked
    assert "random subset" in asked
    assert "34,000 samples" in asked
    for words in ("nabla-tau, recipe default", "2031-02-03 04:05:06 UTC", "33 s, 7,890 steps", "seed41"):
        assert words in done
    assert "cuda:1 (Loom); Abacus 9, 3 threads" in done
    assert "nabla_tau 9.8.7, torch 6.5.4" in done
    for words in ("120 forgotten samples against 200 unseen ones", "a model retrained without them", "seed 77"):
        assert words in checked
    assert report.created[:10] in checked
    assert f"torch {report.versions['torch']}" in checked
    assert checked.count("as recorded") == 3
    assert "not as recorded" not in checked


def test_a_fingerprint_that_is_not_the_records_is_marked():
    report = documented()
    other = {"models": {"unlearned": "f" * 64}, "sets": {"forget": DIGESTS["forget"]}}
    page = Page(render_html(dataclasses.replace(report, fingerprints=other))).text
    assert page.count("not as recorded") == 1
    assert page.count("as recorded") == 2


def test_how_sure_the_figures_are_can_be_read_without_a_mouse(full):
    html = render_html(full)
    text = Page(html).text.replace("\N{MINUS SIGN}", "-")
    low, high = full.models["unlearned"].gap_intervals["auc_loss"]
    assert f"{low:+.3f} to {high:+.3f}" in text
    low, high = full.models["unlearned"].intervals["auc_loss"]
    assert f"interval {low:.3f} to {high:.3f}" in text
    assert "title=" not in html


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"settings": None, "history": None, "counts": None},
        {"history": {"forget_loss": "nonsense", "tau": [1.0], "alpha": [], "retain_loss": [0.5]}},
        {
            "fingerprints": "none",
            "hardware": [],
            "created": 5,
            "method": 7,
            "unlearned_fingerprint": {},
        },
    ],
)
def test_a_bare_audit_has_a_page_too(record):
    bare = audit_signals({"unlearned": sets(0, 1)}, record=record, bootstrap=100)
    text = Page(render_html(bare)).text
    assert "No retrained model was given" in text
    assert "original" not in text.split("What this audit does not show")[0]


def test_a_missing_package_is_named_with_its_remedy(full, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"jinja2.*nabla_tau\[report\]"):
        render_html(full)
