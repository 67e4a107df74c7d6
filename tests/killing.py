"""Processes to be killed, forked from a warm one: what takes seconds in a new process is importing PyTorch."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import conftest  # noqa: F401 - sets the number of threads in the new processes too, which import this module

CONTEXT = multiprocessing.get_context("forkserver")
# torch._dynamo is what the first step of an optimizer imports.
CONTEXT.set_forkserver_preload(["torch._dynamo", "nabla_tau.loop", "pytest"])
MOST = 200  # kills before a run counts as one that does not get on


def start(run: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that calls `run`, a function of a module, with arguments that can be pickled."""
    process = CONTEXT.Process(target=run, args=arguments)
    process.start()
    return process


def finish(process: BaseProcess, seconds: float = 120) -> None:
    process.join(seconds)
    assert process.exitcode == 0, f"exit code {process.exitcode} (None: still running after {seconds} s)"


def kills(
    run: Callable[..., None], arguments: tuple[Any, ...], output: Path, *, moments: random.Random, within: float
) -> Iterator[int]:
    """Start `run` and kill it with SIGKILL after a random time below `within` seconds, again and again until it lives
    to write `output`. Yields the number of kills so far after each. The time grows by 2 % with each, since a busy
    machine may take so long to get anywhere. A run that does not find its place again never comes to an end, and fails.
    """
    for count in range(1, MOST + 1):
        process = start(run, *arguments)
        process.join(moments.uniform(0, within * 1.02**count))
        process.kill()
        process.join()
        if process.exitcode == -9:
            yield count
        else:
            assert process.exitcode == 0
            assert output.exists()
            return
    raise AssertionError(f"the run did not come to an end between {MOST} kills")
