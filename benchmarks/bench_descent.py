"""descent: one step of training on retained samples, of which `unlearn` by itself consists, beside plain PyTorch.

"loader": a DataLoader of tensors, the mean cross-entropy, AdamW as it comes. "plain": what a good engineer writes:
batches gathered from tensors where the model is, fused AdamW; channels_last where the model has convolutions, bfloat16
autocast on a GPU; "plain, compiled" with torch.compile besides. "nabla_tau" is the step of `unlearn`. Train mode, each
provider with a model of its own, all in turns; steps so small that the models stay what they are. On a GPU "nabla_tau"
replays a step that was captured in a CUDA graph, and "nabla_tau, not captured" is the same step without.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from bench_step import LEARNING_RATE, cifar_resnet, endless, fashion_cnn, sample_losses, small_gpt
from record import Record, peak_mb, records_of, seconds_of, timings
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nabla_tau.distributed import ranks_of
from nabla_tau.job import Job
from nabla_tau.methods import Finetune
from nabla_tau.methods.stages import StagedSteps
from nabla_tau.preparation import prepare
from nabla_tau.suites.data import BUCKETS, WORDS
from nabla_tau.suites.models import embedding_bag, mlp

Step = Callable[[], object]
FOREVER = 1e6  # passes


class Training(NamedTuple):
    name: str
    model: nn.Module
    data: tuple[Tensor, Tensor]
    batch: int


def trainings(device: str, quick: bool) -> Iterator[Training]:
    generator = torch.Generator().manual_seed(0)

    def labels(classes: int) -> Tensor:
        return torch.randint(classes, (5000,), generator=generator)

    yield Training("MLP 64-128-10", mlp(64, 128, 10), (torch.randn(5000, 64, generator=generator), labels(10)), 64)
    if quick:
        return
    words = torch.randint(1, BUCKETS, (5000, WORDS), generator=generator)
    yield Training("bag of embeddings", embedding_bag(150), (words, labels(150)), 256)
    works = {"CNN, Fashion-MNIST": fashion_cnn}
    if device == "cuda":
        works |= {"ResNet-18, 32 x 32": cifar_resnet, "GPT, 32K words": small_gpt(2**15)}
    for name, make in works.items():
        work = make(0.15)
        yield Training(name, work.model(), work.retain, min(64, work.batch))


def loader(model: nn.Module, training: Training) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    batches = endless(lambda: DataLoader(TensorDataset(*training.data), training.batch, shuffle=True))
    device = next(model.parameters()).device

    def step() -> None:
        x, y = (t.to(device) for t in next(batches))
        loss = nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def plain(model: nn.Module, training: Training, *, compiled: bool = False) -> Step:
    x, y = (t.to(next(model.parameters()).device) for t in training.data)
    images = x.ndim == 4
    if images:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    call = torch.compile(model) if compiled else model
    order = endless(lambda: torch.split(torch.randperm(len(x), device=x.device), training.batch))

    def step() -> None:
        index = next(order)
        inputs = x[index]
        if images:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16) if x.is_cuda else contextlib.nullcontext():
            loss = sample_losses(call(inputs), y[index]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def engine(model: nn.Module, training: Training, *, captured: bool = True) -> Step:
    few = tuple(t[:64] for t in training.data)
    ranks = ranks_of(model, "auto")
    settings = {"ranks": ranks, "sharded": False, "forward": None, "loss": None, "seed": 0, "performance": "auto"}
    data = prepare(model, forget=few, retain=training.data, held_out=few, retain_is_unseen=False, **settings)
    job = Job(model, data=data, micro_batch_size=None, process_group="auto", **settings)
    steps = StagedSteps(Finetune(FOREVER, LEARNING_RATE, training.batch), job)
    if not captured:
        steps.setup.refused = "for comparison"
    numbers = iter(range(steps.count))
    return lambda: steps.step(next(numbers))


def run(device: str, threads: int, quick: bool) -> Iterator[Record]:
    for training in trainings(device, quick):
        torch.manual_seed(0)
        model = training.model.to(device).train()
        steps = {
            "loader": loader(copy.deepcopy(model), training),
            "plain": plain(copy.deepcopy(model), training),
            "plain, compiled": plain(copy.deepcopy(model), training, compiled=True),
            "nabla_tau": engine(copy.deepcopy(model), training),
        }
        if device == "cuda":
            steps["nabla_tau, not captured"] = engine(copy.deepcopy(model), training, captured=False)
        times = timings(steps, seconds=seconds_of(device, quick, 15), device=device, queued=False)
        peaks = {name: peak_mb(step, device) for name, step in steps.items()}
        for baseline in ("loader", "plain"):
            yield from records_of(
                times,
                baseline=baseline,
                peaks=peaks,
                bench="descent",
                case=f"{training.name}, {training.batch} samples",
                device=device,
                dtype="float32",
                threads=threads,
            )
