"""Files that are whole or absent: atomic writes, and checkpoints that tell when they are damaged.

A checkpoint is a magic word, the SHA-256 of what follows, and a `torch.save` payload read with weights_only=True:
nothing in it is ever unpickled into code.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

MAGIC = b"nabla_tau checkpoint 1\n"


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that, whatever happens, `path` holds the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors, numbers, strings, lists and dicts. Raises OSError, the old file left as it was."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    write_atomic(path, MAGIC + hashlib.sha256(payload).digest() + payload)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint. Raises FileNotFoundError, or ValueError for a file that is none or is damaged."""
    content = path.read_bytes()
    head, payload = len(MAGIC), content[len(MAGIC) + 32 :]
    if content[:head] != MAGIC:
        raise ValueError(f"{path} is not a nabla_tau checkpoint (it does not start with the expected word)")
    if hashlib.sha256(payload).digest() != content[head : head + 32]:
        raise ValueError(f"checkpoint {path} is damaged: its {len(payload)} bytes do not match their SHA-256")
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    return state


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
