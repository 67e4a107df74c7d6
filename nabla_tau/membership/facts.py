"""What was asked, done and checked, line by line, for a reader who must answer for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nabla_tau.membership.audit_report import AuditReport
from nabla_tau.membership.definitions import number
from nabla_tau.membership.fingerprints import same


class Fact(NamedTuple):
    """A line: a name, words, the SHA-256 of what they are about, and whether the audit found it to be what the record
    says (None: not known)."""

    name: str
    value: str
    digest: str = ""
    agrees: bool | None = None


def facts(report: AuditReport) -> dict[str, list[Fact]]:
    """Lines under "Asked", "Done" and "Checked"; the first two are empty where no record was given."""
    return {
        "Asked": [*_asked(report.record)],
        "Done": [*_done(report.record)],
        "Checked": [*_checked(report)],
    }


def _asked(record: Mapping[str, Any]) -> Iterator[Fact]:
    counts, digests = part(record, "counts"), part(record, "fingerprints")
    if counts.get("forget") is not None:
        forget, retain = counts["forget"], counts.get("retain")
        whole = f" of {forget + retain:,} training" if isinstance(forget, int) and isinstance(retain, int) else ""
        yield Fact("to forget", f"{_count(forget)}{whole} samples", _digest(digests, "forget"))
    if kind := part(record, "settings").get("forget_kind"):
        removed = record.get("removed_classes")
        classes = ", ".join(map(str, removed)) if isinstance(removed, list) else ""
        yield Fact("which are", f"{kind}: {classes}" if classes else str(kind))
    for name, title in (("retain", "to keep"), ("held_out", "held out, for comparison")):
        if counts.get(name) is not None:
            yield Fact(title, f"{_count(counts[name])} samples", _digest(digests, name))


def _done(record: Mapping[str, Any]) -> Iterator[Fact]:
    settings = part(record, "settings")
    method, recipe = record.get("method"), record.get("recipe")
    named = [str(method)] * (method is not None) + [f"recipe {recipe}"] * (recipe not in (None, method))
    if named:
        yield Fact("method", ", ".join(named))
    if record.get("created"):
        yield Fact("finished", _time(record["created"]))
    took = [number(record["seconds"], "seconds")] if isinstance(record.get("seconds"), (int, float)) else []
    took += [f"{_count(settings['steps'])} steps"] if "steps" in settings else []
    if took:
        yield Fact("took", ", ".join(took))
    yield from _machine(part(record, "hardware"), part(record, "versions"))
    if "seed" in settings:
        yield Fact("seed", str(settings["seed"]))
    for title, digest in (
        ("weights before", _digest(part(record, "fingerprints"), "model")),
        ("weights after", _digest(record, "unlearned_fingerprint")),
    ):
        if digest:
            yield Fact(title, "", digest)


def _checked(report: AuditReport) -> Iterator[Fact]:
    counts, statistics, agree = report.comparison, report.statistics, same(report.record, report.fingerprints)
    models, sets = (report.fingerprints.get(kind, {}) for kind in ("models", "sets"))
    attacked = f"{counts['n_members']:,} forgotten samples against {counts['n_nonmembers']:,} unseen ones"
    yield Fact("attacked", attacked)
    runs = sum(model.role in ("retrained", "retrained run") for model in report.models.values())
    runs -= runs > 1  # their mean is listed as one, too
    models_of = f"{runs} models" if runs > 1 else "a model"
    yield Fact("compared with", f"{models_of} retrained without them" if runs else "guessing: no retrained model")
    took = "" if report.seconds is None else f", in {number(report.seconds, 'seconds')}"
    yield Fact("finished", _time(report.created) + took)
    yield from _machine(report.hardware, report.versions)
    yield Fact(
        "intervals",
        f"{statistics['confidence']:.0%}, {statistics['bootstrap']:,} resamples, seed {statistics['random_state']}",
    )
    if "unseen" in sets:
        yield Fact("unseen set", f"{counts['n_unseen']:,} samples", sets["unseen"])
    if "forget" in sets:
        yield Fact("forget set", f"{counts['n_forget']:,} samples", sets["forget"], agree.get("forget"))
    if "original" in models:
        yield Fact("weights before", "", models["original"], agree.get("original"))
    if "unlearned" in models:
        yield Fact("weights audited", "", models["unlearned"], agree.get("unlearned"))


def _machine(hardware: Mapping[str, Any], versions: Mapping[str, Any]) -> Iterator[Fact]:
    if hardware:
        threads = hardware.get("threads")
        on = f"{hardware.get('device')}; {hardware.get('processor')}, {threads} thread{'s' * (threads != 1)}"
        yield Fact("on", on)
    shown = [f"{name} {versions[name]}" for name in ("nabla_tau", "torch", "python") if versions.get(name)]
    if shown:
        yield Fact("with", ", ".join(shown))


def part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping in a record, empty for anything else: a record may be of another program."""
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}


def _digest(content: Mapping[str, Any], name: str) -> str:
    value = content.get(name)
    return value if isinstance(value, str) else ""


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _time(iso: object) -> str:
    return str(iso).replace("T", " ").replace("+00:00", " UTC")
