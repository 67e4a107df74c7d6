"""A log of deletion requests and of what became of them: append-only, each line bound to the one before by its SHA-256.

    log = DeletionLog("deletions.jsonl", key=secret)
    log.request(ids_fingerprint=digest.of_ids(ids), count=len(ids))
    log.result(result)
    head = log.audit(report)  # to be kept elsewhere

It holds counts, settings, figures and fingerprints, and refuses data. A line is canonical JSON of index, time, kind,
previous (the hash of the line before), content, and hash, the SHA-256 of all these. Whoever can write the file can also
write it anew from the first line on: that, and a tail cut off, shows only against a head that was kept elsewhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nabla_tau.digest import DIGEST, canonical_json, check_key, of_json, stated
from nabla_tau.provenance import now

if TYPE_CHECKING:
    from nabla_tau.membership.audit_report import AuditReport
    from nabla_tau.result import UnlearnResult

START = "0" * 64  # what the first line has for the hash of the line before
KINDS = ("request", "result", "audit", "note")
FIELDS = {"index", "time", "kind", "previous", "content", "hash"}
_SETS = ("forget", "retain", "held_out")
LONGEST_NOTE = 1000
LONGEST_LINE = 1 << 16


@dataclass(frozen=True)
class Verified:
    """A log whose every line fits. entries: their number; head: hash of the last, START where there is none. since:
    lines after the head that was asked for."""

    entries: int
    head: str
    since: int


class DeletionLog:
    """The log in a file, which the first entry makes, its folder too. Processes may append to it at the same time (a
    lock on the file; not on every network file system).

    key: at least 16 secret bytes. With it data fingerprints are stored as HMAC-SHA256, since who can guess the few
    samples of a small set can compute their SHA-256. Every method that appends returns the hash of its entry, the head;
    and raises TypeError or ValueError for what may not be in a log, ValueError where the last line is damaged, OSError
    where it cannot be written, with the file as it was.
    """

    def __init__(self, path: str | os.PathLike[str], *, key: bytes | None = None) -> None:
        self.path, self.key = Path(path), key
        if key is not None:
            check_key(key)

    def request(self, *, ids_fingerprint: str, count: int, note: str | None = None) -> str:
        """Somebody asked for `count` samples to be deleted; ids_fingerprint: `digest.of_ids` of their identifiers, or
        any SHA-256 by which they can be told."""
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"count must be an int, got {type(count).__name__}")
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        content = {"count": count, "fingerprint": stated(ids_fingerprint, self.key)}
        return self._append("request", content | ({} if note is None else {"note": _short(note)}))

    def result(self, result: UnlearnResult | Mapping[str, Any]) -> str:
        """A run of unlearning; its record (`result.to_dict()`, or with what the command line adds) serves too. "record"
        is `digest.of_json` of it."""
        record = result if isinstance(result, Mapping) else getattr(result, "to_dict", dict)()
        if record.get("schema") != "nabla_tau.record/1":
            raise ValueError(f"a result must be an UnlearnResult or its record, got schema {record.get('schema')!r}")
        try:
            content = {
                "counts": {name: int(record["counts"][name]) for name in _SETS},
                "fingerprints": {name: stated(record["fingerprints"][name], self.key) for name in _SETS}
                | {
                    "original": stated(record["fingerprints"]["model"]),
                    "unlearned": stated(record["unlearned_fingerprint"]),
                },
                "method": _short(record["method"]),
                "recipe": _short(record["recipe"]),
                "classes_removed_whole": len(record["removed_classes"]),
                "seed": int(record["settings"]["seed"]),
                "seconds": float(record["seconds"]),
                "ended": _short(record["created"]),
                "record": stated(of_json(record)),
            }
        except (KeyError, TypeError) as error:
            raise ValueError(f"the record is damaged: {type(error).__name__} {error}") from error
        return self._append("result", content)

    def audit(self, report: AuditReport) -> str:
        """An audit: its verdict and main figures. "report" is `digest.of_json` of its `to_dict()`."""
        if not hasattr(report, "to_dict"):
            raise TypeError(f"report must be an AuditReport, got {type(report).__name__}")
        whole = report.to_dict()
        subject = whole["models"]["unlearned"]
        models, sets = (report.fingerprints.get(kind, {}) for kind in ("models", "sets"))
        content = {
            "verdict": report.verdict,
            "reference": report.reference,
            "counts": {name: whole["comparison"][f"n_{name}"] for name in ("forget", "unseen", "retain")},
            "auc_loss": subject["auc_loss"],
            "auc_loss_interval": subject["intervals"].get("auc_loss"),
            "auc_loss_gap": subject["gap"].get("auc_loss"),
            "fingerprints": {name: stated(found, self.key) for name, found in sets.items()}
            | {name: stated(models[name]) for name in ("unlearned", "original") if name in models},
            "report": stated(of_json(whole)),
        }
        return self._append("audit", content)

    def note(self, text: str) -> str:
        """Words of at most 1000 characters. They are stored as they are: write nothing personal."""
        return self._append("note", {"text": _short(text)})

    def entries(self) -> Iterator[dict[str, Any]]:
        """The entries in their order, each verified. ValueError at the first line that does not fit, by its number."""
        with open(self.path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            left = os.fstat(file.fileno()).st_size
            fcntl.flock(file, fcntl.LOCK_UN)  # what is there stays; whoever reads may append meanwhile
            before = None
            for number, line in enumerate(file, start=1):
                if not left:
                    return
                left -= len(line)
                if not line.endswith(b"\n"):
                    raise ValueError(f"{self.path}, line {number}: torn, it does not end; {_REPAIR}")
                before = _following(before, line[:-1], f"{self.path}, line {number}")
                yield before

    def verify(self, head: str | None = None) -> Verified:
        """Check every line. head: a hash that an append returned; it must be that of a line, and `since` says how many
        came after it. Raises ValueError, naming the first line that does not fit, and FileNotFoundError."""
        if head is not None and not DIGEST.fullmatch(head):
            raise ValueError(f"a head is a SHA-256 of 64 hexadecimal digits, got {head!r}")
        last, count = START, 0
        found = 0 if head in (None, START) else None
        for entry in self.entries():
            last, count = entry["hash"], count + 1
            if last == head:
                found = count
        if found is None:
            raise ValueError(
                f"{self.path}: no line has the hash {head}: lines were cut off its end, or it was written anew"
            )
        return Verified(count, last, 0 if head is None else count - found)

    def repair(self) -> str | None:
        """Put right a last line that a crash cut off: complete but for its newline it is kept, else it is removed and a
        note says so. Returns the head, None where nothing was torn. Any other damage is left as it is (ValueError)."""
        with self._locked() as file:
            content = file.read()
            kept = content.rfind(b"\n") + 1
            torn = content[kept:]
            if not torn:
                return None
            before = _last(content[:kept], self.path)
            try:
                entry = _following(before, torn, f"{self.path}, last line")
            except ValueError:
                os.ftruncate(file.fileno(), kept)
                return self._write(file, before, "note", {"text": f"a torn line of {len(torn)} bytes was removed"})
            _add(file, b"\n")
            return str(entry["hash"])

    def _append(self, kind: str, content: Mapping[str, Any]) -> str:
        with self._locked() as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LONGEST_LINE - 1))
            return self._write(file, _last(file.read(), self.path), kind, content)

    def _write(self, file: FileIO, before: Mapping[str, Any] | None, kind: str, content: Mapping[str, Any]) -> str:
        entry = {
            "index": 0 if before is None else before["index"] + 1,
            "time": now(),
            "kind": kind,
            "previous": START if before is None else before["hash"],
            "content": content,
        }
        head = of_json(entry)
        line = canonical_json(entry | {"hash": head}) + b"\n"
        if len(line) > LONGEST_LINE:
            raise ValueError(f"an entry of {len(line)} bytes is too long: a line holds {LONGEST_LINE}")
        _add(file, line)
        return head

    @contextlib.contextmanager
    def _locked(self) -> Iterator[FileIO]:
        """The file, open for reading and appending, to this process alone."""
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file
        if new:
            _settle(self.path.absolute().parent)


def _add(file: FileIO, data: bytes) -> None:
    """Append all of it durably, or nothing."""
    size = os.fstat(file.fileno()).st_size
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(file.fileno(), left) :]
        os.fsync(file.fileno())
    except BaseException:
        os.ftruncate(file.fileno(), size)
        raise


def _settle(folder: Path) -> None:
    """Have the new file survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_REPAIR = "where a crash cut it off, `nabla-tau log verify --repair` puts it right"


def _following(before: Mapping[str, Any] | None, line: bytes, where: str) -> dict[str, Any]:
    """The entry of a line without its newline; ValueError where it does not fit the entry before."""
    entry = _whole(line, where)
    index = 0 if before is None else before["index"] + 1
    if entry["index"] != index:
        raise ValueError(
            f"{where}: it is entry {entry['index']}, where entry {index} belongs: lines were removed, added or moved"
        )
    if entry["previous"] != (START if before is None else before["hash"]):
        raise ValueError(f"{where}: it does not follow the line before, one of the two was replaced")
    return entry


def _whole(line: bytes, where: str) -> dict[str, Any]:
    """The entry of a line, whose content must have its hash and whose spelling must be the canonical one."""
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict) or entry.keys() != FIELDS or entry["kind"] not in KINDS:
            raise ValueError("not an entry")
        content = {name: value for name, value in entry.items() if name != "hash"}
        if type(entry["index"]) is not int or canonical_json(entry) != line or of_json(content) != entry["hash"]:
            raise ValueError("not its hash")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: changed, its content does not have its hash") from error
    return entry


def _last(tail: bytes, path: Path) -> dict[str, Any] | None:
    """The last entry of a file by its end, None of an empty one; ValueError where the last line is torn or damaged."""
    if not tail:
        return None
    if not tail.endswith(b"\n"):
        raise ValueError(f"{path}: the last line is torn, nothing is appended; {_REPAIR}")
    return _whole(tail[:-1].rpartition(b"\n")[2], f"{path}, last line")


def _short(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"a note must be a str, got {type(text).__name__}")
    if not 0 < len(text) <= LONGEST_NOTE:
        raise ValueError(f"a note must have 1 to {LONGEST_NOTE} characters, got {len(text)}")
    return text
