"""The result of an audit: what it holds, how it is stored as JSON and read back, and how a terminal shows it."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from nabla_tau.membership.measures import MEASURES, ModelAudit
from nabla_tau.membership.verdict import CODES, Finding
from nabla_tau.provenance import now, versions

SCHEMA = "nabla_tau.audit/1"


@dataclass(frozen=True)
class AuditReport:
    """An audit's verdict, its figures, and everything that its HTML page shows.

    verdict: one of "forgotten", "partly remembered", "remembered", "over-unlearned", "damaged", "inconclusive";
    sentence: the same with its figures. models: name -> `ModelAudit`, "unlearned" being the one judged. reference:
    "retrained" or "chance". comparison: sample counts and classes. statistics: settings of the statistics. record:
    what was asked and done, as given. fingerprints: SHA-256 by name of the "models" and the "sets" that were audited
    (empty where only their signals were given). hardware, versions: what the audit ran on (`provenance.py`). seconds:
    that it took, None where it was given signals. created: when it ended, UTC.
    All of it is plain data: `to_dict` and `load` are inverse to each other; schemas/audit-report.schema.json describes
    it.
    """

    verdict: str
    sentence: str
    findings: tuple[Finding, ...]
    models: Mapping[str, ModelAudit]
    reference: str
    comparison: Mapping[str, Any]
    statistics: Mapping[str, Any]
    loss_bins: Mapping[str, Any]
    record: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)
    seconds: float | None = None
    created: str = field(default_factory=now)

    def to_dict(self) -> dict[str, Any]:
        """Strictly JSON-able content: no NaN, no infinity; unknown numbers are None."""
        content: dict[str, Any] = json_able({"schema": SCHEMA, **asdict(self)}, "the report")
        return content

    @classmethod
    def from_dict(cls, content: object, *, source: str = "this") -> AuditReport:
        """The report of a `to_dict`; ValueError, naming `source`, for anything else."""
        schema = content.get("schema") if isinstance(content, dict) else None
        if not isinstance(content, dict) or not isinstance(schema, str) or not schema.startswith("nabla_tau.audit/"):
            raise ValueError(f"{source} is no audit report: it has no schema {SCHEMA!r}")
        if schema != SCHEMA:
            raise ValueError(f"{source} has schema {schema!r}; this version reads {SCHEMA!r}")
        try:
            values = {f.name: content[f.name] for f in fields(cls)}
            values["findings"] = tuple(Finding(**finding) for finding in values["findings"])
            values["models"] = {name: _model(entry) for name, entry in values["models"].items()}
            if values["verdict"] not in CODES:
                raise ValueError(f"unknown verdict {values['verdict']!r}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source} is a damaged audit report: {type(error).__name__} {error}") from error
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write "x.json" (everything) or "x.html" (a page to read; needs `pip install nabla_tau[report]`).

        The file appears whole or not at all. ValueError for another ending.
        """
        path = Path(path)
        if path.suffix == ".json":
            text = json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False, indent=1)
        elif path.suffix == ".html":
            from nabla_tau.report import render_html

            text = render_html(self)
        else:
            raise ValueError(f"an audit report is saved as .json or .html, got {path.name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            # Half a surrogate pair, which JSON may hold, becomes the escape that JSON has for it.
            with temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def model_card(self, *, key: bytes | None = None) -> str:
        """A section "Unlearning" for a model card (Markdown, such as Hugging Face shows): what was removed, by which
        method, the verdict, the main figures and what they do not show. Fingerprints of data are in it; with a key of
        at least 16 secret bytes they are keyed, so that who can guess the samples cannot tell (ValueError for fewer).
        """
        from nabla_tau.membership.model_card import model_card

        return model_card(self, key)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AuditReport:
        """Read what `save("x.json")` wrote; ValueError for a truncated, damaged or foreign file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except ValueError as error:
            raise ValueError(f"{path} is no complete JSON file: {error}") from error
        return cls.from_dict(content, source=str(path))

    def table(self) -> str:
        """The report as plain text for a terminal: the verdict, one line a model, and the findings."""
        confidence = f"{self.statistics['confidence']:.0%}"
        by_models = {
            title: measure
            for title, measure in _BY_MODELS.items()
            if any(model.number(measure) is not None for model in self.models.values())
        }
        accuracies = ("forget", "retain", "test")
        rows = [["model", "AUC", f"{confidence} interval", "gap", "MIA", "MIA ent.", *by_models, *accuracies, "s"]]
        for name, model in self.models.items():
            low, high = model.intervals.get("auc_loss", (None, None))
            label = f"{name} (mean of {model.runs})" if model.runs > 1 else name
            numbers = [model.mia_loss, model.mia_entropy, *(model.number(measure) for measure in by_models.values())]
            numbers += [model.number(f"{name}_accuracy") for name in accuracies]
            rows.append(
                [
                    _one_line(label),
                    _text(model.auc_loss),
                    f"{_text(low)}-{_text(high)}",
                    _text(model.gap.get("auc_loss"), "+.3f"),
                    *(_text(number) for number in numbers),
                    _text(model.seconds, ".1f"),
                ]
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [f"verdict: {self.verdict}", *_wrapped(self.sentence, ""), ""]
        for row in rows:
            cells = (c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))
            lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
        gap = "AUC less the retrained model's" if self.reference == "retrained" else "unknown without a retrained model"
        lines += [
            "",
            f"AUC and MIA attack the loss (MIA ent.: the entropy); gap: {gap}.",
            *(_wrapped(f"{', '.join(by_models)}: {self._by_models_text()}.", "") if by_models else ()),
            *(line for f in self.findings for line in _wrapped(f"{f.level}: {f.text}", "  ")),
            "An audit is evidence, not a certificate: a stronger attack may find what these do not.",
        ]
        return "\n".join(lines)

    def _by_models_text(self) -> str:
        about = self.statistics["by_models"]
        return (
            f"AUC of the attacks by {about['models']} {about['by']}, and the share of forgotten samples that LiRA "
            "names while accusing 1% of the unseen ones"
        )


# Title of a column -> measure.
_BY_MODELS = {
    "LiRA": "auc_lira",
    "U-LiRA": "auc_ulira",
    "RMIA": "auc_rmia",
    "TPR 1%": "tpr_at_1_percent_fpr_lira",
}


def json_able(value: Any, name: str) -> Any:
    """A copy in plain JSON types: tuples become lists, numpy numbers plain ones, NaN and infinity None.

    TypeError, naming the place, for what JSON cannot hold.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        return json_able(value.tolist(), name)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise TypeError(f"{name} must have strings as keys, got {wrong[0]!r}")
        return {key: json_able(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_able(item, f"{name}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{name} must be JSON-able, got {type(value).__name__}")


def _model(entry: Mapping[str, Any]) -> ModelAudit:
    model = ModelAudit(**entry)
    for name in MEASURES:
        if not isinstance(model.number(name), (int, float, type(None))):
            raise ValueError(f"{name} is {model.number(name)!r}, not a number")
    return model


def _refuse_constant(token: str) -> float:
    raise ValueError(f"{token} is not JSON")


def _text(number: float | None, form: str = ".3f") -> str:
    return "-" if number is None else format(number, form)


def _one_line(label: str, limit: int = 40) -> str:
    label = "".join(c if c.isprintable() else "?" for c in label)
    return label if len(label) <= limit else label[: limit - 3] + "..."


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=indent, subsequent_indent=indent + "  " * bool(indent))
