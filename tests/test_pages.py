"""Every page of HTML in a real browser, as wide as a desk and as a phone, in light and dark colours.

The pictures are left in NABLA_TAU_ARTIFACTS (default build/artifacts) to be looked at."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from browser import FOUND, Browser
from pages import ROOT
from test_report import LONG, SCRIPT, documented, hostile

from nabla_tau.suites.measures import MEASURES
from nabla_tau.suites.table import ComparisonTable, Row

pytestmark = pytest.mark.skipif(FOUND is None, reason="no Chromium: install chromium or google-chrome")

ARTIFACTS = Path(os.environ.get("NABLA_TAU_ARTIFACTS", ROOT / "build" / "artifacts")).absolute()
# What lies beside the window and in no box of its own that scrolls: a reader does not get to see it.
CUT_OFF = """[...document.body.querySelectorAll("*")].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.left < -1 || box.right > innerWidth + 1) && !e.closest(".scroll");
}).map(e => e.outerHTML.slice(0, 200))"""


def comparison() -> ComparisonTable:
    methods = {"original": 0.3, "default": 0.01, "nabla-tau": 0.04, SCRIPT: 0.2, LONG: -0.1}
    rows = [
        Row(method, seed, dict.fromkeys(MEASURES, size * (1 + seed / 4)), [f"a remark on {method}"])
        for method, size in methods.items()
        for seed in (0, 1)
    ]
    settings = {"seeds": [0, 1], "shadow_models": 16, "device": LONG, SCRIPT: SCRIPT, "versions": {"torch": "2.13.0"}}
    return ComparisonTable(SCRIPT, LONG, rows, {"forget": 15, "train": 100}, settings)


PAGES = {"audit": documented, "audit-hostile": hostile, "comparison": comparison}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module", params=PAGES)
def page(request, tmp_path_factory):
    return PAGES[request.param]().save(tmp_path_factory.mktemp("page") / f"{request.param}.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_a_page_fits_its_window_and_loads_nothing(browser, page, width, scheme):
    browser.show(page, width, scheme)
    assert browser.requests == [page.as_uri()]
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.value(CUT_OFF) == []

    pixels = browser.picture(ARTIFACTS / f"{page.stem}-{width}-{scheme}.png")[..., :3].mean(-1)
    assert pixels.shape == (browser.value("document.documentElement.scrollHeight"), width)
    # Mostly paper of the scheme's colour, and something to read on every screenful of it.
    paper = {"light": pixels > 0.9, "dark": pixels < 0.2}[scheme]
    assert paper.mean() > 0.7
    assert all(screen.mean() < 0.995 for screen in np.array_split(paper, len(paper) // 844))
