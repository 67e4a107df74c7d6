"""Worker processes that stay: importing torch once for all tests of a file, and a process group for each job."""

from __future__ import annotations

import datetime
import itertools
import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported once, in the server that the workers are forked from.
PRELOADED = [
    "nabla_tau.auditing",
    "nabla_tau.loop",
    "nabla_tau.report",
    "pytest",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]
TIMEOUT = datetime.timedelta(seconds=60)  # a deadlock is an error, not a hanging test


def _work(rank: int, connection: Any) -> None:
    torch.set_num_threads(1)
    while (job := connection.recv_bytes()) != b"":
        function, size, meeting_point, args = pickle.loads(job)
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size, timeout=TIMEOUT
            )
            try:
                dist.barrier()  # a rank that is done while another still connects would be taken for a crashed one
                answer = True, function(*args)
            finally:
                dist.destroy_process_group()
        except Exception:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))


class Processes:
    """`run(function, size, *args)`: what the function, of a module, gives on each of `size` ranks of a gloo group."""

    def __init__(self, most: int) -> None:
        multiprocessing.set_forkserver_preload(PRELOADED)
        self.context = multiprocessing.get_context("forkserver")
        self.folder = tempfile.TemporaryDirectory()
        self.numbers = itertools.count()
        self.most = most
        self._start()

    def _start(self) -> None:
        self.connections, self.workers = [], []
        for rank in range(self.most):
            mine, theirs = self.context.Pipe()
            worker = self.context.Process(target=_work, args=(rank, theirs), daemon=True)
            worker.start()
            self.connections.append(mine)
            self.workers.append(worker)

    def run(self, function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        meeting_point = Path(self.folder.name) / str(next(self.numbers))
        used = self.connections[:size]
        for connection in used:
            connection.send_bytes(pickle.dumps((function, size, str(meeting_point), args)))
        answers = [pickle.loads(connection.recv_bytes()) for connection in used]
        wrong = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if wrong:
            # torch counts process groups: ranks that failed at different points would never meet again.
            self._stop()
            self._start()
            raise RuntimeError("\n".join(wrong))
        return [value for _, value in answers]

    def close(self) -> None:
        self._stop()
        self.folder.cleanup()

    def _stop(self) -> None:
        for connection, worker in zip(self.connections, self.workers, strict=True):
            connection.send_bytes(b"")
            worker.join(10)
            if worker.is_alive():
                worker.terminate()
