"""rows: nabla-tau loss and gradient of a logits matrix, with and without the attack signals, against plain PyTorch.

Three forms of a case: the loss alone; the loss and the attack signals; and the row kernel that every other objective is
built on (losses, signals and the gradient for weights of 1). The kernel reads the logits once; on a GPU the gate of
the loss costs a second read, since no gradient of a row is known before all forget losses are.

What is counted as the floor: the logits read once and their gradient written once, and per row the target, the mask
and (with signals) seven results. A copy of the matrix moves the same bytes but for those of the rows.

Cases on a GPU hold 2^28 logits (at most 2^22 rows), so that it is filled and no cache holds them; those on the CPU are
small enough that 4096x1000 fits into a large L3 cache, for the copy as for everyone else. Small batches on a GPU are
bound by launches: they are timed as called, and as replays of a CUDA graph. Providers:

    eager       plain PyTorch, from the formula; the signals from the log-probabilities that the loss already took
    eager fp32  the same on logits.float(), as training code for half-precision models has it
    compile     torch.compile of eager, each shape compiled for itself; one record says so where it cannot run
    nabla_tau   this package; with 2 threads too, against itself with 1. Its C++ rows use the memory of a gradient
                that was let go again, as training does, so that malloc's setting matters less to them
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from record import Record, graphed, peak_mb, records_of, timings
from torch import Tensor
from torch.nn import functional as F

from nabla_tau import _library, nabla_tau_loss
from nabla_tau.loss import nabla_tau_terms

CPU_CASES = [(4096, 10), (4096, 1000), (1024, 32000), (512, 128256)]
CPU_QUICK = [(256, 10), (128, 1000)]
GPU_CLASSES = [10, 100, 1000, 4096, 8192, 32000, 50257, 128256]
GPU_LOGITS, GPU_ROWS = 2**28, 2**22
GPU_SMALL = [(128, 10), (1024, 10), (256, 1000)]
TAU, ALPHA = 20.0, 0.5  # a target above every loss here, so that the gate is open and all rows have a gradient

LOSS, SIGNALS, ROW_KERNEL = FORMS = ("", " + signals", " row kernel")

Signals = tuple[Tensor, ...] | None
Run = Callable[[], object]


class Batch(NamedTuple):
    logits: Tensor
    targets: Tensor
    forget: Tensor
    tau: Tensor
    alpha: Tensor


def make_batch(rows: int, classes: int, dtype: torch.dtype, device: str) -> Batch:
    """Random logits and targets; the first half of the rows is to be forgotten."""
    generator = torch.Generator(device).manual_seed(0)
    logits = (3 * torch.randn(rows, classes, generator=generator, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(classes, (rows,), generator=generator, device=device)
    forget = torch.arange(rows, device=device) < rows // 2
    return Batch(logits, targets, forget, torch.tensor(TAU, device=device), torch.tensor(ALPHA, device=device))


def eager_forward(batch: Batch, signals: bool, upcast: bool = False) -> tuple[Tensor, Signals]:
    """The loss, and the fields of RowSignals in their order."""
    z = batch.logits.float() if upcast else batch.logits
    log_p = z.log_softmax(1)  # F.cross_entropy is this and nll_loss
    losses = F.nll_loss(log_p, batch.targets, reduction="none").float()
    count = batch.forget.sum()
    forget_mean = (losses * batch.forget).sum() / count
    retain_mean = (losses * ~batch.forget).sum() / (len(losses) - count)
    total = batch.alpha * F.relu(batch.tau - forget_mean) ** 2 + (1 - batch.alpha) * retain_mean
    if not signals:
        return total, None
    with torch.no_grad():
        y = batch.targets.unsqueeze(1)
        p = log_p.exp()
        others = p.scatter(1, y, 0)
        rest = others.sum(1)
        loss = losses.detach()
        return total, (
            loss,
            loss + z.gather(1, y).squeeze(1),
            -(p * log_p).sum(1),
            -loss - rest.log(),
            p.amax(1),
            others.square().sum(1) + rest.square(),
            z.argmax(1) == batch.targets,
        )


def engine_forward(batch: Batch, signals: bool) -> tuple[Tensor, Signals]:
    arguments = batch.logits, batch.targets, batch.forget
    if not signals:
        return nabla_tau_loss(*arguments, tau=batch.tau, alpha=batch.alpha), None
    terms, found = nabla_tau_terms(*arguments, tau=batch.tau, alpha=batch.alpha)
    return terms.total, found


def step(forward: Callable[..., tuple[Tensor, Signals]], batch: Batch, *options: bool) -> tuple[Tensor, Signals]:
    """Gradient of the logits, and the signals."""
    total, found = forward(batch, *options)
    return torch.autograd.grad(total, batch.logits)[0], found


def floor_bytes(logits: Tensor, signals: bool) -> int:
    """Logits in, gradient out; per row a target, a mask entry and, with signals, six floats and a bool out."""
    return 2 * logits.nbytes + len(logits) * (8 + 1 + signals * (6 * 4 + 1))


def compiled(batch: Batch, signals: bool) -> Run | str:
    """The compiled provider, or why there is none."""
    forward = torch.compile(eager_forward, dynamic=False, fullgraph=True)

    def run() -> object:
        return step(forward, batch, signals)

    try:
        run()
    except Exception as error:  # whatever a machine without a working compiler makes of it
        return f"skipped: {type(error).__name__}: {str(error).strip().splitlines()[0]}"[:120]
    return run


def providers(batch: Batch, form: str) -> dict[str, Run]:
    """What needs no compiler, in one of the FORMS."""
    if form == ROW_KERNEL:
        logits = batch.logits.detach()
        return {"nabla_tau": lambda: _library.rows_gradient(logits, batch.targets)}
    signals = form == SIGNALS
    found: dict[str, Run] = {"eager": lambda: step(eager_forward, batch, signals)}
    if batch.logits.dtype != torch.float32:
        found["eager fp32"] = lambda: step(eager_forward, batch, signals, True)
    return found | {"nabla_tau": lambda: step(engine_forward, batch, signals)}


def with_threads(count: int, run: Run) -> Run:
    def wrapped() -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return run()
        finally:
            torch.set_num_threads(before)

    return wrapped


def measure(
    batch: Batch, *, seconds: float, threads: int, setting: str = "", queued: bool = True, graph: bool = False
) -> Iterator[Record]:
    """Records of one batch: all providers in all forms take turns in one run."""
    device = batch.logits.device.type
    shape, dtype = "x".join(map(str, batch.logits.shape)), str(batch.logits.dtype).removeprefix("torch.")
    same = {"bench": "rows", "device": device, "dtype": dtype, "setting": setting}
    torch.compiler.reset()
    runs = {(name, form): run for form in FORMS for name, run in providers(batch, form).items()}
    for form in (LOSS, SIGNALS):
        found = compiled(batch, form == SIGNALS)
        if isinstance(found, str):
            yield Record(case=shape + form, provider="compile", threads=threads, unit="ms", note=found, **same)
        else:
            runs["compile", form] = found
    peaks = {key: peak_mb(run, device) for key, run in runs.items()}
    if device == "cpu" and threads == 1 and (os.cpu_count() or 1) > 1:
        runs |= {("2 threads", form): with_threads(2, runs["nabla_tau", form]) for form in FORMS}
    source, target = batch.logits.detach(), torch.empty_like(batch.logits)
    runs["copy", ""] = lambda: target.copy_(source)
    if graph:
        runs = {key: graphed(run) for key, run in runs.items()}
    taken = timings(runs, seconds=seconds, device=device, queued=queued)
    copy = taken.pop(("copy", ""))
    yield from records_of({"copy": copy}, case=shape, threads=threads, floor_mb=2 * source.nbytes / 1e6, **same)
    for form in FORMS:
        here = {name: timing for (name, of), timing in taken.items() if of == form}
        of_form = same | {"case": shape + form, "copy": copy, "floor_mb": floor_bytes(source, form != LOSS) / 1e6}
        on_two = here.pop("2 threads", None)
        held = {name: mb for (name, of), mb in peaks.items() if of == form}
        yield from records_of(here, baseline="eager", threads=threads, peaks=held, **of_form)
        if on_two:
            ours = {"1 thread": here["nabla_tau"], "nabla_tau": on_two}
            yield from records_of(ours, baseline="1 thread", threads=2, **of_form | {"copy": None})[1:]


def run(device: str, threads: int, quick: bool) -> Iterator[Record]:
    if device == "cpu":
        for rows, classes in CPU_QUICK if quick else CPU_CASES:
            batch = make_batch(rows, classes, torch.float32, device)
            yield from measure(batch, seconds=0.5 if quick else 15, threads=threads)
        return
    for rows, classes in GPU_SMALL:
        batch = make_batch(rows, classes, torch.float32, device)
        yield from measure(batch, seconds=1, threads=threads, setting="as called", queued=False)
        yield from measure(batch, seconds=1, threads=threads, setting="CUDA graph", graph=True)
    for classes in [1000] if quick else GPU_CLASSES:
        for dtype in (torch.float32, torch.bfloat16):
            batch = make_batch(min(GPU_ROWS, GPU_LOGITS // classes), classes, dtype, device)
            yield from measure(batch, seconds=1, threads=threads)
