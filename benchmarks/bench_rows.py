"""rows: nabla-tau loss and gradient on a logits matrix, against eager PyTorch, with and without the attack signals."""

from __future__ import annotations

from collections.abc import Callable

import torch
from record import Record, timings
from torch import Tensor
from torch.nn import functional as F

from nabla_tau import nabla_tau_loss
from nabla_tau.functional import row_signals

CASES = [(4096, 10), (4096, 1000), (1024, 32000)]
QUICK_CASES = [(256, 10), (128, 1000)]
TAU, ALPHA = 20.0, 0.5


def eager(logits: Tensor, targets: Tensor, forget: Tensor, signals: bool) -> Tensor | None:
    """What one writes in plain PyTorch, from the formula."""
    losses = F.cross_entropy(logits, targets, reduction="none")
    count = forget.sum()
    forget_mean = (losses * forget).sum() / count
    retain_mean = (losses * ~forget).sum() / (len(losses) - count)
    (ALPHA * F.relu(TAU - forget_mean) ** 2 + (1 - ALPHA) * retain_mean).backward()
    if signals:
        with torch.no_grad():
            log_p = logits.log_softmax(1)
            entropy = -(log_p.exp() * log_p).sum(1)
            y = targets.unsqueeze(1)
            margin = logits.gather(1, y).squeeze(1) - logits.scatter(1, y, -torch.inf).logsumexp(1)
            return entropy + margin + (logits.argmax(1) == targets)
    return None


def engine(logits: Tensor, targets: Tensor, forget: Tensor, signals: bool) -> object:
    nabla_tau_loss(logits, targets, forget, tau=TAU, alpha=ALPHA).backward()
    return row_signals(logits.detach(), targets) if signals else None


def run(device: str, threads: int, quick: bool) -> list[Record]:
    records = []
    for rows, classes in QUICK_CASES if quick else CASES:
        generator = torch.Generator().manual_seed(0)
        logits = (3 * torch.randn(rows, classes, generator=generator)).to(device).requires_grad_()
        targets = torch.randint(classes, (rows,), generator=generator).to(device)
        forget = torch.arange(rows, device=device) < rows // 2

        def once(step: Callable[..., object], signals: bool, batch=(logits, targets, forget)) -> object:
            batch[0].grad = None
            return step(*batch, signals)

        for signals in (False, True):
            providers = {
                "eager": lambda signals=signals, once=once: once(eager, signals),
                "nabla_tau": lambda signals=signals, once=once: once(engine, signals),
            }
            found = timings(providers, seconds=0.5 if quick else 8, device=device)
            for name, (p20, p50, p80) in found.items():
                records.append(
                    Record(
                        bench="rows",
                        case=f"{rows}x{classes}" + " + signals" * signals,
                        provider=name,
                        device=device,
                        dtype="float32",
                        threads=threads,
                        p20=p20,
                        p50=p50,
                        p80=p80,
                        unit="ms",
                        ratio=found["eager"][1] / p50,
                        baseline="eager",
                    )
                )
    return records
