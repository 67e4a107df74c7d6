"""Formulas as MathML, made when the site is built: no script and no font to load.

arithmatex leaves each formula as TeX in an element of class "arithmatex". TeX that the converter does not know would
stand in the page as it is, so it is an error.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    return FORMULA.sub(_mathml, content)


def _mathml(formula: re.Match[str]) -> str:
    tag, bracket, tex = formula.groups()
    made = convert(html.unescape(tex), display="block" if bracket == "[" else "inline")
    if "\\" in made:
        raise PluginError(f"a formula has TeX that cannot be MathML: {html.unescape(tex)}")
    return f'<{tag} class="arithmatex">{made}</{tag}>'
