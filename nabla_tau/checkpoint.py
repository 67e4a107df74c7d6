"""Files that are whole or absent: atomic writes, and checkpoints that tell when they are damaged.

A checkpoint is a magic word, the SHA-256 of what follows, and a `torch.save` payload read with weights_only=True:
nothing in it is ever unpickled into code.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("nabla_tau")

MAGIC = b"nabla_tau checkpoint 1\n"


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name the path in any OSError: that of a full disk comes without one, and some name a file beside it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        # OSError makes itself the subclass of its number (PermissionError, ...).
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


def write_atomic(path: Path, *parts: bytes | memoryview, mode: int = 0o666) -> None:
    """Write a file so that, whatever happens, `path` holds the old content or the new one, never a part.

    mode: the file's permissions, less the process's umask, from its first byte on. Raises OSError, which names the path
    and the cause.
    """
    temporary = path.with_name(path.name + ".tmp")
    with _writing(path):
        _make_folder(path.parent)
        try:
            temporary.unlink(missing_ok=True)  # one left by a crash would keep its own permissions
            with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # what happened first is what there is to say
                temporary.unlink(missing_ok=True)
            raise
        _settle(path.parent)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error


def _settle(folder: Path) -> None:
    """Have a renamed file survive a power cut; not every file system can say so of a folder, and none needs to."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(path: Path) -> None:
    """Raise the OSError that writing `path` would end in, as far as that can be known before there is something to
    write: a folder that cannot be written to, a disk that is full by now. Leaves nothing behind, not even a folder."""
    with _writing(path):
        if path.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"?")
            file.flush()
            os.fsync(file.fileno())


def save_checkpoint(path: Path, state: dict[str, Any], mode: int = 0o666) -> None:
    """Write a checkpoint of tensors, numbers, strings, lists and dicts, with these permissions at most. Raises OSError,
    the old file left as it was."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    write_atomic(path, MAGIC, hashlib.sha256(payload).digest(), payload, mode=mode)


class Checkpoints:
    """Checkpoints of one run, each in place of the last. One that cannot be written does not end the run: it is logged
    as a warning, the last good one stays, and the next is tried as if nothing had been. step: of the one that is there
    already, None where none is."""

    def __init__(self, path: Path, step: int | None = None) -> None:
        self.path = path
        self.step = step
        self._tries = 0
        self._failures: list[str] = []

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Call write(path), which raises OSError where it fails and leaves the old checkpoint as it was."""
        self._tries += 1
        try:
            write(self.path)
        except OSError as error:
            self._failures.append(f"step {step}: {error}")
            logger.warning("checkpoint of step %d: %s; the run goes on, %s", step, error, self._kept())
        else:
            self.step = step

    def _kept(self) -> str:
        return "no checkpoint is there" if self.step is None else f"that of step {self.step} is kept"

    @property
    def warnings(self) -> list[str]:
        """What went wrong, in one sentence; empty where nothing did."""
        if not self._failures:
            return []
        failed = f"{len(self._failures)} of {self._tries} checkpoints could not be written"
        return [f"{failed} (the last one at {self._failures[-1]}); {self._kept()}"]


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint. Raises OSError where it cannot be read, ValueError for a file that is none or is damaged."""
    content = memoryview(path.read_bytes())
    head, payload = len(MAGIC), content[len(MAGIC) + 32 :]
    if content[:head] != MAGIC:
        raise ValueError(f"{path} is not a nabla_tau checkpoint (it does not start with the expected word)")
    if hashlib.sha256(payload).digest() != content[head : head + 32]:
        raise ValueError(f"checkpoint {path} is damaged: its {len(payload)} bytes do not match their SHA-256")
    try:
        state: Any = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"checkpoint {path} holds more than tensors and is not loaded: that would run code") from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # its SHA-256 is right, so it was made so: by another program, or to do harm
        raise ValueError(f"checkpoint {path} is damaged: {type(error).__name__} {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path} holds a {type(state).__name__}, not a dict")
    return state


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
