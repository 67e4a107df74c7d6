"""Every row op once on small and ragged shapes, for a checker of memory or races to watch.

python benchmarks/small_shapes.py [cpu|cuda]. Results are held to float64 by the tests; here they need only be finite.
"""

from __future__ import annotations

import sys

import torch

from nabla_tau import nabla_tau_loss
from nabla_tau.functional import row_losses, row_signals
from nabla_tau.fused import mean_gradient
from nabla_tau.linear import linear_nabla_tau_loss
from nabla_tau.optim import Ball, DualAdamW, DualSGD, Noise

# One row, ragged ends, a multiple of the vector width, and rows too wide for one block.
SHAPES = [(1, 2), (33, 10), (7, 257), (5, 4096), (3, 32768), (2, 40001)]
SIZES = [1, 3, 2047, 2048, 2049, 10000]  # of parameters: around the chunk of a program


def main(device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for rows, classes in SHAPES:
            logits = torch.randn(rows, classes, generator=generator, device=device).to(dtype).requires_grad_()
            targets = torch.randint(classes, (rows,), generator=generator, device=device)
            labels = (torch.rand(rows, classes, generator=generator, device=device) > 0.5).to(dtype)
            forget = torch.arange(rows, device=device) % 2 == 0
            head = torch.randn(classes, 16, generator=generator, device=device).to(dtype).requires_grad_()
            hidden = torch.randn(rows, 16, generator=generator, device=device).to(dtype).requires_grad_()
            settings = {"tau": 20.0, "alpha": 0.5}
            smoothed = {"label_smoothing": 0.1, "class_weights": torch.ones(classes, device=device)}
            losses = [
                nabla_tau_loss(logits, targets, forget, **settings),
                nabla_tau_loss(logits, targets, forget, gate="sample", power=1, **settings),
                nabla_tau_loss(logits, targets, forget, **smoothed, **settings),
                nabla_tau_loss(logits, labels, forget, **settings),
                row_losses(logits, targets).mean(),
                linear_nabla_tau_loss(hidden, head, targets, forget.cpu(), **settings),
            ]
            for loss in losses:
                loss.backward()
            mean, gradient = mean_gradient(logits.detach(), targets, 1.0)
            results = [mean, gradient, *losses, *row_signals(logits, targets), logits.grad, hidden.grad, head.grad]
            assert all(bool(result.isfinite().all()) for result in results), (rows, classes, dtype)
        for kind in (DualAdamW, DualSGD):
            start = [torch.randn(size, generator=generator, device=device).to(dtype) for size in SIZES]
            parameters, forget, retain = ([p.clone() for p in start] for _ in range(3))
            mask = [p > 0 for p in start]
            optimizer = kind(parameters, 0.1)
            options = {"mask": mask, "noise": Noise(0.1, 1, 2), "ball": Ball(start, 1.0)}
            optimizer.step_dual(forget, retain, -0.5, 1.0, project=True, **options)
            assert all(bool(p.isfinite().all()) for p in parameters), (kind, dtype)
    print(f"{len(SHAPES)} shapes, 2 dtypes, 8 ops and 2 optimizers on {device}: finite")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
