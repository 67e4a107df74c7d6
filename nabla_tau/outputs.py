"""What the commands write, checked before any work is done and written whole; and the JSON that they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nabla_tau.checkpoint import check_writable, write_atomic
from nabla_tau.weights import check_new


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises OSError, and ValueError, naming the file, for anything else."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


def write_json(content: Any, path: Path) -> None:
    write_atomic(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def check_outputs(outputs: list[Path | None], inputs: list[Path | None]) -> None:
    """Raise before any work is done where an output exists, is an input, is named twice, or cannot be written."""
    taken = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        if path is None:
            continue
        if path.resolve() in taken:
            raise ValueError(f"{path} is already used in this command, as an input or another output")
        taken.add(path.resolve())
        check_new(path)
        check_writable(path)


def check_json(path: Path | None) -> None:
    if path is not None and path.suffix != ".json":
        raise ValueError(f"--json writes a .json file, got {path}")
