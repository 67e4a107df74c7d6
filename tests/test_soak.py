"""Many small deletion requests, one after another, in one process: nothing piles up and the log holds them all.

`NABLA_TAU_SOAK=1000 pytest tests/test_soak.py` serves a thousand.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import os
from pathlib import Path

import pytest
from conftest import blobs, mlp, train

import nabla_tau
from nabla_tau import digest
from nabla_tau.deletion_log import DeletionLog
from nabla_tau.recipes import ASCENT

REQUESTS = int(os.environ.get("NABLA_TAU_SOAK", "60"))
SMALL = 3  # samples a request
EVERY = 10  # requests between two audits
WARM = 20  # requests after which what is made once has been made
# A model of 280 kB: kept once a request, it would show in the shortest run. What is allowed is an allocator's own
# coming and going, which does not grow with the number of requests.
FEATURES, WIDTH = 64, 1024
KEPT = 4 << 20


def resident() -> int:
    """Bytes of memory in use, after what is free was given back."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc has it, others need not
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own account of memory")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_many_requests_leave_no_memory_behind_and_a_log_that_verifies(tmp_path):
    x, y = blobs(SMALL * REQUESTS + 700, features=FEATURES)
    held_out, unseen, data = (x[:100], y[:100]), (x[100:200], y[100:200]), (x[200:], y[200:])
    model = train(mlp(FEATURES, width=WIDTH), data, epochs=20)
    log = DeletionLog(tmp_path / "log", key=b"sixteen secret bytes")
    # Weights that are shrunk once a request, and trained for ten steps, would be gone after some dozens.
    recipe = dataclasses.replace(ASCENT, name="short", shrink=1.0, noise=0.0, retain_passes=0.1, min_steps=10)
    after_warming = files = 0
    for request in range(REQUESTS):
        ids = range(SMALL * request, SMALL * (request + 1))
        log.request(ids_fingerprint=digest.of_ids(ids), count=SMALL)
        start, end = ids.start, ids.stop
        result = nabla_tau.unlearn(
            model,
            forget=(data[0][start:end], data[1][start:end]),
            retain=(data[0][end:], data[1][end:]),
            held_out=held_out,
            recipe=recipe,
            seed=request,
        )
        model = result.model
        log.result(result)
        if request % EVERY == 0:
            forgotten = data[0][: end + 20], data[1][: end + 20]
            log.audit(nabla_tau.audit(model, forget=forgotten, unseen=unseen, record=result.to_dict(), bootstrap=100))
        if request == WARM:
            after_warming, files = resident(), open_files()
    grown = resident() - after_warming
    print(f"{REQUESTS} requests: {grown / 1024:+.0f} KiB since request {WARM}")
    assert grown < KEPT
    assert open_files() <= files
    found = log.verify()
    assert found.entries == 2 * REQUESTS + -(-REQUESTS // EVERY)
    assert [entry["content"]["count"] for entry in log.entries() if entry["kind"] == "request"] == [SMALL] * REQUESTS
    kept, labels = data[0][SMALL * REQUESTS :], data[1][SMALL * REQUESTS :]
    assert (model(kept).argmax(1) == labels).float().mean() > 0.5, "it was a model that served the requests"
