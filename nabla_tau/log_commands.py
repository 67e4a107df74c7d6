"""`nabla-tau log`: the deletion log on the command line, and how other commands open it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from nabla_tau.checkpoint import check_writable
from nabla_tau.deletion_log import DeletionLog
from nabla_tau.digest import check_key, of_ids
from nabla_tau.outputs import check_json, check_outputs, write_json


def run_log(args: Namespace) -> None:
    options = args[args.action]
    check_json(options.json)
    # Here, because an entry that was appended cannot be taken back when the JSON cannot be written.
    check_outputs([options.json], [options.get(name) for name in ("file", "ids", "key")])
    content = {"request": _request, "show": _show, "verify": _verify}[args.action](options)
    if options.json is not None:
        write_json(content, options.json)


def open_log(path: Path | None, key: Path | None) -> DeletionLog | None:
    """The log that a command will append to when its work is done, looked at before it begins: one that is damaged or
    cannot be written must not cost the work."""
    secret = read_key(key)
    if path is None:
        return None
    log = DeletionLog(path, key=secret)
    if path.exists():
        log.verify()
    check_writable(path)
    return log


def read_key(path: Path | None) -> bytes | None:
    """The bytes of a file; ValueError where they are too few."""
    if path is None:
        return None
    key = path.read_bytes()
    check_key(key)
    return key


def _request(options: Namespace) -> dict[str, Any]:
    log = DeletionLog(options.file, key=read_key(options.key))
    try:
        lines = options.ids.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.ids} is no text in UTF-8: {error}") from error
    ids = [line.strip() for line in lines if line.strip()]
    head = log.request(ids_fingerprint=of_ids(ids), count=len(ids), note=options.note)
    print(f"{len(ids)} identifiers\nhead: {head}")
    return {"count": len(ids), "head": head}


def _show(options: Namespace) -> dict[str, Any]:
    entries = []
    for entry in DeletionLog(options.file).entries():
        entries.append(entry)
        print(f"{entry['index']:>5}  {entry['time']}  {entry['kind']:<8}{_line(entry['kind'], entry['content'])}")
    return {"entries": entries}


def _line(kind: str, content: dict[str, Any]) -> str:
    if kind == "request":
        text = f"{content['count']} samples, {content['fingerprint'][:19]}...  {content.get('note', '')}"
    elif kind == "result":
        counts = content["counts"]
        text = f"{counts['forget']} forgotten, {counts['retain']} retained, by {content['method']}, {content['recipe']}"
    elif kind == "audit":
        text = f"{content['verdict']} ({content['counts']['forget']} forgotten, {content['counts']['unseen']} unseen)"
    else:
        text = content["text"]
    return "".join(c if c.isprintable() else "?" for c in text).rstrip()


def _verify(options: Namespace) -> dict[str, Any]:
    log = DeletionLog(options.file)
    if not log.path.exists():
        raise FileNotFoundError(f"no log at {log.path}")
    if options.repair and log.repair() is not None:
        print("the last line was torn, and is put right")
    found = log.verify(options.head)
    print(f"{log.path}: {found.entries} entries, every line fits")
    if options.head is None:
        print("without --head this does not show whether lines were cut off its end, or all of it was written anew")
    else:
        print(f"the head given is in it, {found.since} lines before its end")
    print(f"head: {found.head}")
    return {"entries": found.entries, "head": found.head, "since": None if options.head is None else found.since}
