"""update: one optimizer step on two gradients for each parameter, against adding them up and torch's AdamW.

The floor is every tensor moved once: parameter, two moments and two gradients read, the first three written, 32 bytes a
float32 parameter. The copy beside it moves as many bytes. Gradients lie ready, and both scales are 0-d tensors.
Providers, all of AdamW:

    eager           forget_scale * f + retain_scale * r with plain operators for each parameter, then torch.optim.AdamW
                    one parameter after another, which is its default on the CPU
    foreach         the same sum and step with torch's multi-tensor operators, its default on a GPU
    combine+fused   the sum with multi-tensor operators, then torch.optim.AdamW(fused=True)
    nabla_tau       DualAdamW.step_dual

and nabla_tau with more: the projection of conflicting gradients, a mask (half of the entries), noise, a ball. Of those
there is no counterpart in torch.optim; their ratio is to the plain step of eager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from record import Record, graphed, peak_mb, records_of, seconds_of, timings
from torch import Tensor

from nabla_tau.optim import Ball, DualAdamW, Noise

Shapes = list[tuple[int, ...]]
Run = Callable[[], object]
BYTES = 32


def small_cnn() -> Shapes:
    """A CNN for images of 28 x 28: 105 thousand parameters in 12 tensors."""
    kernels = [(16, 1), (32, 16), (32, 32), (64, 32)]
    convolutions: Shapes = [shape for out, into in kernels for shape in ((out, into, 3, 3), (out,))]
    return [*convolutions, (64, 1152), (64,), (10, 64), (10,)]


def resnet18() -> Shapes:
    """ResNet-18 for images of 32 x 32: 11.2 million parameters in 62 tensors."""
    shapes: Shapes = [(64, 3, 3, 3), (64,), (64,)]
    into = 64
    for out in (64, 128, 256, 512):
        for block in range(2):
            for source in (into if block == 0 else out, out):
                shapes += [(out, source, 3, 3), (out,), (out,)]
            if block == 0 and into != out:
                shapes += [(out, into, 1, 1), (out,), (out,)]
        into = out
    return [*shapes, (10, 512), (10,)]


def tiny() -> Shapes:
    """500 tensors of 64 numbers: the cost of a call, not of memory."""
    return [(64,)] * 500


MODELS = {"small CNN": small_cnn, "ResNet-18": resnet18, "500 x 64": tiny}


class Problem:
    """Parameters with their two gradients; each provider has parameters and state of its own."""

    def __init__(self, shapes: Shapes, device: str) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.shapes, self.device = shapes, device
        self.forget, self.retain = self.numbers(), self.numbers()
        self.forget_scale, self.retain_scale = (torch.tensor(value, device=device) for value in (-0.3, 1.0))

    def numbers(self) -> list[Tensor]:
        return [torch.randn(shape, generator=self.generator, device=self.device) for shape in self.shapes]

    def leaves(self) -> list[Tensor]:
        return [p.requires_grad_() for p in self.numbers()]

    def eager(self) -> Run:
        parameters = self.leaves()
        optimizer = torch.optim.AdamW(parameters, foreach=False, capturable=self.device == "cuda")

        def run() -> None:
            for p, f, r in zip(parameters, self.forget, self.retain, strict=True):
                p.grad = self.forget_scale * f + self.retain_scale * r
            optimizer.step()

        return run

    def multi_tensor(self, **options: bool) -> Run:
        parameters = self.leaves()
        optimizer = torch.optim.AdamW(parameters, capturable=self.device == "cuda", **options)

        def run() -> None:
            sums = torch._foreach_mul(self.forget, self.forget_scale)
            torch._foreach_add_(sums, torch._foreach_mul(self.retain, self.retain_scale))
            for p, g in zip(parameters, sums, strict=True):
                p.grad = g
            optimizer.step()

        return run

    def dual(self, option: str = "") -> Run:
        parameters = self.leaves()
        optimizer = DualAdamW(parameters)
        scales = self.forget_scale, self.retain_scale
        more: dict[str, object] = {}
        if option == "projection":
            more["project"] = True
        elif option == "mask":
            more["mask"] = [n > 0 for n in self.numbers()]
        elif option == "noise":
            more["noise"] = Noise(0.1, 1, 2)
        elif option == "ball":
            more["ball"] = Ball([p.detach().clone() for p in parameters], 0.01)
        return lambda: optimizer.step_dual(self.forget, self.retain, *scales, **more)  # type: ignore[arg-type]


def providers(shapes: Shapes, device: str) -> dict[str, Run]:
    problem = Problem(shapes, device)
    plain = {
        "eager": problem.eager(),
        "foreach": problem.multi_tensor(foreach=True),
        "combine+fused": problem.multi_tensor(fused=True),
        "nabla_tau": problem.dual(),
    }
    return plain | {f"+ {option}": problem.dual(option) for option in ("projection", "mask", "noise", "ball")}


def measure(name: str, *, seconds: float, threads: int, device: str, graph: bool = False) -> Iterator[Record]:
    shapes = MODELS[name]()
    runs = providers(shapes, device)
    count = sum(torch.Size(shape).numel() for shape in shapes)
    source = torch.zeros(BYTES // 8 * count, device=device)  # read and written: 8 bytes a number
    target = torch.empty_like(source)
    peaks = {provider: peak_mb(run, device) for provider, run in runs.items()}
    runs["copy"] = lambda: target.copy_(source)
    if graph:
        runs = {provider: graphed(run) for provider, run in runs.items()}
    taken = timings(runs, seconds=seconds, device=device, queued=graph or device == "cpu")
    yield from records_of(
        taken,
        baseline="eager",
        floor_mb=BYTES * count / 1e6,
        copy=taken["copy"],
        peaks=peaks,
        bench="update",
        case=name,
        device=device,
        dtype="float32",
        threads=threads,
        setting="" if device == "cpu" else "CUDA graph" if graph else "as called",
    )


def run(device: str, threads: int, quick: bool) -> Iterator[Record]:
    for name in ("small CNN",) if quick else MODELS:
        for graph in (False, True) if device == "cuda" else (False,):
            yield from measure(name, seconds=seconds_of(device, quick, 8), threads=threads, device=device, graph=graph)
