"""linear_rows: loss and gradients of a linear head, of its hidden vectors and its weight, against whole logits.

Half of the rows is to be forgotten, first in the batch, and the gate is open: every row has a gradient. Providers:

    eager            F.linear, then the loss from the formula, in plain PyTorch
    compile          torch.compile of eager
    F.linear_ce      torch.nn.functional.linear_cross_entropy (torch 2.13), chunked, reduction="none", then the formula
    CCE              cut_cross_entropy.linear_cross_entropy, reduction="none", then the formula
    Liger            liger_fused_linear_cross_entropy: the plain mean loss, since it has no weights by row
    nabla_tau        linear_nabla_tau_loss: every chunk of logits made once
    nabla_tau rows   linear_row_losses, then the formula: every chunk made twice, any objective

and eager and nabla_tau with the attack signals of every row beside the gradients. peak_mb is the most that one step
allocates, its gradients included; the note says how much of it is not the gradients, which is what the logits cost.
What is counted as the floor: hidden vectors and weight read once, their gradients written once; the GEMMs, 6 N V D
operations, take far longer, and the note has their rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from record import Record, peak_mb, records_of, seconds_of, timings
from torch import Tensor
from torch.nn import functional as F

from nabla_tau.linear import linear_nabla_tau_loss, linear_row_losses, linear_row_signals

CPU_CASES = [(2048, 512, 32000, torch.float32)]
CPU_QUICK = [(256, 64, 1000, torch.float32)]
GPU_CASES = [(8192, 4096, classes, torch.bfloat16) for classes in (32000, 128256, 256000)]
GPU_QUICK = [(2048, 1024, 32000, torch.bfloat16)]
TAU, ALPHA = 30.0, 0.5  # a target above every loss here


class Batch(NamedTuple):
    """`forget` is on the CPU, `forget_here` on the device."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    forget: Tensor
    forget_here: Tensor
    tau: Tensor
    alpha: Tensor


Step = Callable[[Batch], tuple[Tensor, ...]]


def make_batch(rows: int, width: int, classes: int, dtype: torch.dtype, device: str) -> Batch:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, device=device).to(dtype)
    weight = (3 * torch.randn(classes, width, generator=generator, device=device) / width**0.5).to(dtype)
    targets = torch.randint(classes, (rows,), generator=generator, device=device)
    forget = torch.arange(rows) < rows // 2
    scalars = (torch.tensor(value, device=device) for value in (TAU, ALPHA))
    return Batch(hidden.requires_grad_(), weight.requires_grad_(), targets, forget, forget.to(device), *scalars)


def formula(losses: Tensor, batch: Batch) -> Tensor:
    losses, forget = losses.float(), batch.forget_here
    count = forget.sum()
    forget_mean = (losses * forget).sum() / count
    retain_mean = (losses * ~forget).sum() / (len(losses) - count)
    return batch.alpha * F.relu(batch.tau - forget_mean) ** 2 + (1 - batch.alpha) * retain_mean


def eager_loss(batch: Batch) -> Tensor:
    return formula(F.cross_entropy(F.linear(batch.hidden, batch.weight), batch.targets, reduction="none"), batch)


def eager_with_signals(batch: Batch) -> tuple[Tensor, ...]:
    logits = F.linear(batch.hidden, batch.weight)
    log_p = logits.log_softmax(1)
    losses = F.nll_loss(log_p, batch.targets, reduction="none")
    gradients = torch.autograd.grad(formula(losses, batch), batch[:2])
    with torch.no_grad():
        y, loss = batch.targets.unsqueeze(1), losses.detach()
        p = log_p.detach().exp()
        others = p.scatter(1, y, 0)
        rest = others.sum(1)
        signals = (
            loss,
            loss + logits.gather(1, y).squeeze(1),
            -(p * log_p).sum(1),
            -loss - rest.log(),
            p.amax(1),
            others.square().sum(1) + rest.square(),
            logits.argmax(1) == batch.targets,
        )
    return *gradients, *signals


def torch_loss(batch: Batch) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    rows = F.linear_cross_entropy(batch.hidden, batch.weight, batch.targets, reduction="none", options=options)
    return formula(rows, batch)


def cce_loss(batch: Batch) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return formula(linear_cross_entropy(batch.hidden, batch.weight, batch.targets, reduction="none"), batch)


def liger_loss(batch: Batch) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    found = liger_fused_linear_cross_entropy(batch.hidden, batch.weight, batch.targets)
    return found[0] if isinstance(found, tuple) else found


def our_loss(batch: Batch) -> Tensor:
    return linear_nabla_tau_loss(*batch[:4], tau=batch.tau, alpha=batch.alpha)


def our_rows_loss(batch: Batch) -> Tensor:
    return formula(linear_row_losses(*batch[:3]), batch)


def step(loss: Callable[[Batch], Tensor]) -> Step:
    """Gradients of hidden and weight."""
    return lambda batch: torch.autograd.grad(loss(batch), batch[:2])


def ours_with_signals(batch: Batch) -> tuple[Tensor, ...]:
    return *step(our_loss)(batch), *linear_row_signals(*batch[:3])


def candidates(device: str) -> dict[str, Step]:
    found = {
        "eager": step(eager_loss),
        "compile": step(torch.compile(eager_loss, dynamic=False, fullgraph=True)),
        "F.linear_ce": step(torch_loss),
        "CCE": step(cce_loss),
        "Liger": step(liger_loss),
        "nabla_tau": step(our_loss),
        "nabla_tau rows": step(our_rows_loss),
    }
    if device == "cpu":
        del found["CCE"], found["Liger"]
    return found


def reason_against(run: Step, batch: Batch) -> str:
    """Why this provider cannot be measured here; empty if it can."""
    try:
        run(batch)
    except ModuleNotFoundError as error:
        return f"skipped: {error.name} is not installed"
    except Exception as error:  # whatever this machine, or this torch, makes of it
        return f"skipped: {type(error).__name__}: {str(error).strip().splitlines()[0]}"[:120]
    return ""


def measure(batch: Batch, *, seconds: float, threads: int) -> Iterator[Record]:
    device, (rows, width), classes = batch.hidden.device.type, batch.hidden.shape, len(batch.weight)
    same = {
        "bench": "linear_rows",
        "device": device,
        "dtype": str(batch.hidden.dtype).removeprefix("torch."),
        "threads": threads,
    }
    case, operations = f"{rows}x{width}x{classes}", 6 * rows * width * classes
    gradients_mb = (batch.hidden.nbytes + batch.weight.nbytes) / 1e6
    torch.compiler.reset()
    steps = {
        case: candidates(device),
        f"{case} + signals": {"eager": eager_with_signals, "nabla_tau": ours_with_signals},
    }
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, group in steps.items():
        for provider, run in group.items():
            if reason := reason_against(run, batch):
                yield Record(case=name, provider=provider, unit="ms", note=reason, **same)
            else:
                runs[name, provider] = lambda run=run: run(batch)
    peaks = {key: peak_mb(run, device) for key, run in runs.items()}
    found = timings(runs, seconds=seconds, device=device)
    for name in steps:
        here = {provider: timing for (of, provider), timing in found.items() if of == name}
        records = records_of(
            here,
            baseline="eager",
            floor_mb=2 * gradients_mb,
            peaks={provider: peaks[name, provider] for provider in here},
            case=name,
            **same,
        )
        for record in records:
            beside = peaks[name, record.provider] - gradients_mb
            rate = operations / 1e9 / here[record.provider].p50
            yield dataclasses.replace(record, note=f"{beside:.4g} MB beside the gradients, {rate:.3g} TFLOP/s of GEMMs")


def run(device: str, threads: int, quick: bool) -> Iterator[Record]:
    cases = {"cpu": (CPU_CASES, CPU_QUICK), "cuda": (GPU_CASES, GPU_QUICK)}[device][quick]
    if device == "cpu":
        for provider in ("CCE", "Liger"):
            yield Record(
                bench="linear_rows",
                case="any",
                provider=provider,
                device=device,
                dtype="",
                threads=threads,
                unit="ms",
                note="skipped: needs a GPU",
            )
    for case in cases:
        yield from measure(make_batch(*case, device), seconds=seconds_of(device, quick, 20), threads=threads)
