"""step: one step of the published recipe: as published, the best plain PyTorch, and the engine.

"as published": two DataLoaders, two forwards, default AdamW. "plain": what a good engineer writes: one mixed batch
gathered from tensors, forget rows first, one forward and backward, fused AdamW; channels_last where the model has
convolutions, bfloat16 autocast on a GPU; "plain, compiled" with torch.compile besides. The engine's step is that of
`unlearn`. All at 256 forget and 256 retain samples of the same data (16 of each of a small GPT's, on a GPU); each
provider has its own model, and they take turns. The gate is open in all of them; "nabla_tau, gate closed" is what a
step takes once it is not. On a GPU "nabla_tau" replays a step that was captured in a CUDA graph, whose own memory is
not in its peak_mb, and "nabla_tau, not captured" is the same step without.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from record import Record, peak_mb, records_of, seconds_of, timings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nabla_tau.sources import Stream, as_source
from nabla_tau.suites.data import fashion_mnist
from nabla_tau.suites.models import small_cnn
from nabla_tau.suites.resnet import resnet18
from nabla_tau.unlearner import Unlearner

BATCH, ALPHA = 256, 0.25
# Above and below the loss of a model that knows nothing, and steps so small that it stays one.
OPEN, CLOSED, LEARNING_RATE = 20.0, 0.1, 1e-7
Samples = tuple[Tensor, Tensor]


class Workload(NamedTuple):
    name: str
    model: Callable[[], nn.Module]
    forget: Samples
    retain: Samples
    batch: int = BATCH  # samples of each in a step

    def on(self, device: str) -> Workload:
        return self._replace(
            forget=tuple(t.to(device) for t in self.forget), retain=tuple(t.to(device) for t in self.retain)
        )


def fashion_cnn(fraction: float) -> Workload:
    x, y = fashion_mnist()
    x, y = x[:6000], y[:6000]
    cut = round(fraction * len(x))
    name = f"CNN, Fashion-MNIST, {fraction:.0%}"
    return Workload(name, small_cnn, (x[:cut], y[:cut]), (x[cut:], y[cut:]))


def table_mlp(fraction: float) -> Workload:
    """As examples/tabular.py's: 22 columns, 5 classes."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6000, 22, generator=generator), torch.randint(5, (6000,), generator=generator)
    cut = round(fraction * len(x))

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(22, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5))

    return Workload(f"MLP, table, {fraction:.0%}", model, (x[:cut], y[:cut]), (x[cut:], y[cut:]))


def cifar_resnet(fraction: float) -> Workload:
    """ResNet-18 on images of CIFAR-10's shape, random ones: what a step costs does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6000, 3, 32, 32, generator=generator), torch.randint(10, (6000,), generator=generator)
    cut = round(fraction * len(x))
    return Workload(f"ResNet-18, 32 x 32, {fraction:.0%}", resnet18, (x[:cut], y[:cut]), (x[cut:], y[cut:]))


class SmallGPT(nn.Module):
    """Four causal blocks of width 256 and a head that shares the weights of the words."""

    def __init__(self, vocabulary: int, length: int, width: int = 256, blocks: int = 4) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        nn.init.normal_(self.words.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, blocks, nn.LayerNorm(width), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device))
        return F.linear(self.blocks(self.words(x) + places, mask=self.mask, is_causal=True), self.words.weight)


def small_gpt(vocabulary: int, length: int = 128) -> Callable[[float], Workload]:
    """Random tokens, each the target of the one before it."""

    def workload(fraction: float) -> Workload:
        tokens = torch.randint(vocabulary, (400, length + 1), generator=torch.Generator().manual_seed(0))
        x, y, cut = tokens[:, :-1], tokens[:, 1:].contiguous(), round(fraction * 400)
        name = f"GPT, {vocabulary // 1024}K words, {fraction:.0%}"
        return Workload(name, lambda: SmallGPT(vocabulary, length), (x[:cut], y[:cut]), (x[cut:], y[cut:]), batch=16)

    return workload


def sample_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """[B], of a sequence the mean over its tokens."""
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(targets), -1).mean(1)


def endless(make: Callable[[], Any]) -> Iterator[Any]:
    while True:
        yield from make()


def objective(forget: Tensor, retain: Tensor) -> Tensor:
    return ALPHA * F.relu(OPEN - forget) ** 2 + (1 - ALPHA) * retain


def as_published(
    model: nn.Module,
    forget_data: Samples,
    retain_data: Samples,
    optimizer: torch.optim.Optimizer,
    objective: Callable[[Tensor, Tensor], Tensor] = objective,
    batch: int = BATCH,
) -> Callable[[], None]:
    def loader(data: Samples) -> Iterator[Samples]:
        return endless(lambda: DataLoader(TensorDataset(*data), batch, shuffle=True))

    forget, retain = loader(forget_data), loader(retain_data)
    device = next(model.parameters()).device

    def step() -> None:
        batches = [[t.to(device) for t in next(of_group)] for of_group in (forget, retain)]
        losses = [F.cross_entropy(model(x).flatten(0, -2), y.flatten()) for x, y in batches]
        optimizer.zero_grad()
        objective(*losses).backward()
        optimizer.step()

    return step


def plain(model: nn.Module, work: Workload, *, compiled: bool = False) -> Callable[[], None]:
    images = work.forget[0].ndim == 4
    if images:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    call = torch.compile(model) if compiled else model
    x, y = (torch.cat(pair) for pair in zip(work.forget, work.retain, strict=True))
    n_forget, n = len(work.forget[0]), len(x)

    def order(first: int, last: int) -> Iterator[Tensor]:
        return endless(lambda: torch.split(first + torch.randperm(last - first, device=x.device), work.batch))

    forget, retain = order(0, n_forget), order(n_forget, n)

    def step() -> None:
        a, b = next(forget), next(retain)
        index = torch.cat((a, b))
        inputs = x[index]
        if images:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16) if x.is_cuda else contextlib.nullcontext():
            losses = sample_losses(call(inputs), y[index])
        optimizer.zero_grad()
        objective(losses[: len(a)].mean(), losses[len(a) :].mean()).backward()
        optimizer.step()

    return step


def engine(model: nn.Module, work: Workload, tau: float = OPEN, *, captured: bool = True) -> Callable[[], None]:
    # An optimizer whose learning rate is a number cannot be captured.
    own = None if captured else torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    unlearner = Unlearner(model, alpha=ALPHA, tau=tau, learning_rate=LEARNING_RATE, optimizer=own)
    forget, retain = (
        Stream(as_source(data, name), work.batch, 0, role)
        for role, (name, data) in enumerate((("forget", work.forget), ("retain", work.retain)))
    )

    def step() -> None:
        unlearner.step(forget.next(), retain.next())

    return step


def published_adamw(model: nn.Module, learning_rate: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=learning_rate)


def scaling(device: str, threads: int, quick: bool) -> Iterator[Record]:
    """Microseconds per sample of the engine's step as the forget set grows, on random data of whole batches: what is
    measured is whether a step knows how large the set is, not how batches of other sizes run."""
    total = (100 if quick else 200) * BATCH
    for name, like in (("CNN", fashion_cnn(0.15)), ("MLP", table_mlp(0.15))):
        x = torch.randn(total, *like.forget[0].shape[1:], device=device)
        y = torch.randint(int(like.retain[1].max()) + 1, (total,), device=device)
        steps = {}
        for fraction in (0.01, 0.03, 0.10, 0.30):
            cut = round(fraction * total)
            model = like.model().to(device).eval()
            steps[f"{fraction:.0%}"] = engine(model, Workload(name, like.model, (x[:cut], y[:cut]), (x[cut:], y[cut:])))
        found = timings(steps, seconds=seconds_of(device, quick, 20), device=device, queued=False)
        for fraction, timing in found.items():
            yield Record(
                bench="step",
                case=f"scaling, {name}, forget {fraction} of {total}",
                provider="nabla_tau",
                device=device,
                dtype="float32",
                threads=threads,
                p20=timing.p20 * 1e3 / (2 * BATCH),
                p50=timing.p50 * 1e3 / (2 * BATCH),
                p80=timing.p80 * 1e3 / (2 * BATCH),
                unit="us/sample",
                note=f"{timing.p50 / found['1%'].p50 - 1:+.1%} against 1%",
            )


def run(device: str, threads: int, quick: bool) -> Iterator[Record]:
    fractions = (0.15,) if quick or device == "cuda" else (0.03, 0.15, 0.30)  # which change nothing on a GPU
    makers: list[Callable[[float], Workload]] = [fashion_cnn, table_mlp]
    if device == "cuda":
        makers = [cifar_resnet, small_gpt(2**15), small_gpt(2**17), *makers]
    found = [make(fraction) for make in makers for fraction in fractions]
    for on_host in found:
        torch.manual_seed(0)
        model, work = on_host.model().to(device).eval(), on_host.on(device)
        published = copy.deepcopy(model)
        adamw = published_adamw(published, LEARNING_RATE)
        steps = {
            "as published": as_published(published, on_host.forget, on_host.retain, adamw, batch=work.batch),
            "plain": plain(copy.deepcopy(model), work),
            "plain, compiled": plain(copy.deepcopy(model), work, compiled=True),
            "nabla_tau": engine(copy.deepcopy(model), work),
            "nabla_tau, gate closed": engine(copy.deepcopy(model), work, CLOSED),
        }
        if device == "cuda":
            steps["nabla_tau, not captured"] = engine(copy.deepcopy(model), work, captured=False)
        times = timings(steps, seconds=seconds_of(device, quick, 20), device=device, queued=False)
        peaks = {name: peak_mb(step, device) for name, step in steps.items()}
        for baseline in ("as published", "plain"):
            yield from records_of(
                times,
                baseline=baseline,
                peaks=peaks,
                bench="step",
                case=work.name,
                device=device,
                dtype="float32",
                threads=threads,
            )
    yield from scaling(device, threads, quick)
