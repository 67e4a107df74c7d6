"""norms: what per-sample gradient norms and gradients kept apart cost beside a plain step. Providers:

    plain            forward and backward of the mean loss: the gradients of all parameters
    norms            sample_gradient_norms: the squared norm of each sample's gradient
    vmap norms       the same from per-sample gradients by torch.func (forward, backward and norms)
    fisher           fisher_diagonal of the batch
    dual             DualGradients: the first half's gradients and the second half's, from one backward
    two backwards    the same by two backwards over one forward

each with its forward, in eval mode, on a batch of the same data. The ratio is that of plain's time over the provider's:
0.8 is 1.25 times a plain step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from record import Record, peak_mb, records_of, seconds_of, timings
from torch import Tensor, nn
from torch.nn import functional as F

from nabla_tau.functional import sample_losses
from nabla_tau.gradients import ONE, DualGradients
from nabla_tau.sample_norms import fisher_diagonal, sample_gradient_norms


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        heads = (layer(h).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        h = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """Causal language model with position embeddings and the embedding as its head."""

    def __init__(self, vocabulary: int, width: int, depth: int, length: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.position(positions))))


def mlp(quick: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    width = 64 if quick else 512
    model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return model, (torch.randn(128, 784), torch.randint(10, (128,)))


def cnn(quick: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Three 3 x 3 convolutions on images of 28 x 28, as of Fashion-MNIST."""
    count = 16 if quick else 128
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if outputs > 16 else []
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 7 * 7, 10))
    return model, (torch.randn(count, 1, 28, 28), torch.randint(10, (count,)))


def transformer(quick: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    vocabulary, width, depth, count, length = (100, 32, 1, 4, 16) if quick else (2000, 128, 4, 32, 64)
    tokens = torch.randint(vocabulary, (count, length + 1))
    return Transformer(vocabulary, width, depth, length), (tokens[:, :-1], tokens[:, 1:])


def providers(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Callable[[], object]]:
    parameters = list(model.parameters())
    inputs, targets = batch
    samples = len(inputs)
    weights = torch.full((samples,), 1 / samples, device=inputs.device)
    dual = DualGradients(model, parameters)

    def losses() -> Tensor:
        return sample_losses(model(inputs), targets)

    def one() -> object:
        with dual.watch():
            found = losses()
        return dual.backward(found, weights, samples // 2)

    def two() -> object:
        found = losses()
        forget = torch.autograd.grad(found[: samples // 2].mean(), parameters, retain_graph=True)
        return forget, torch.autograd.grad(found[samples // 2 :].mean(), parameters)

    own = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def own_loss(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, own, (x[None],))
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    per_sample = torch.func.vmap(torch.func.grad(own_loss), in_dims=(None, 0, 0))

    def vectorised() -> Tensor:
        return torch.stack([g.flatten(1).square().sum(1) for g in per_sample(own, inputs, targets).values()]).sum(0)

    torch.testing.assert_close(sample_gradient_norms(model, batch), vectorised(), rtol=1e-3, atol=1e-6)
    one()
    assert dual.how == ONE, dual.how
    return {
        "plain": lambda: torch.autograd.grad(losses().mean(), parameters),
        "norms": lambda: sample_gradient_norms(model, batch),
        "vmap norms": vectorised,
        "fisher": lambda: fisher_diagonal(model, [batch]),
        "dual": one,
        "two backwards": two,
    }


def run(device: str, threads: int, quick: bool) -> Iterator[Record]:
    torch.manual_seed(0)
    for name, make in {"MLP": mlp, "CNN": cnn, "transformer": transformer}.items():
        model, (inputs, targets) = make(quick)
        runs = providers(model.to(device).eval(), (inputs.to(device), targets.to(device)))
        peaks = {provider: peak_mb(call, device) for provider, call in runs.items()}
        found = timings(runs, seconds=seconds_of(device, quick, 20), device=device)
        yield from records_of(
            found, baseline="plain", peaks=peaks, bench="norms", case=f"{name} {len(inputs)}", device=device,
            dtype="float32", threads=threads,
        )  # fmt: skip
