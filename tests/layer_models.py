"""Models in float64 that between them use every layer whose gradients `layers.py` takes apart, and others."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """CNN with grouped, dilated, strided and reflecting convolutions, frozen BatchNorm and GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding="same", dilation=(2, 1)),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, (3, 2), stride=2, padding=(1, 0), groups=2, bias=False),
            nn.GroupNorm(2, 8),
            nn.GELU(),
            nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"),
            nn.Flatten(),
            nn.LazyLinear(5),
        )
        for buffer in self.layers[1].buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Signal(nn.Module):
    """CNN on sequences; as many rows of a sample as it has channels go through the second convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular")
        self.second = nn.Conv1d(1, 6, 2, stride=2)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.first(x))
        hidden = self.norm(self.second(hidden.flatten(0, 1).unsqueeze(1)))
        return self.head(hidden.mean(2).unflatten(0, (len(x), -1)).mean(1))


class Block(nn.Module):
    def __init__(self, width: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = norm(width), norm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        heads = (layer(h).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        h = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """Causal language model. tied: "module" shares the head's weight with the embedding, "function" applies it without
    a module. positions: "module", "parameter" (with a class token and a scale by hand) or None."""

    def __init__(
        self, tied: str = "module", norm: type[nn.Module] = nn.LayerNorm, positions: str | None = None, width: int = 8
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width, padding_idx=0)
        self.blocks = nn.ModuleList([Block(width, norm) for _ in range(2)])
        self.norm = norm(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.tied, self.positions = tied, positions
        if tied == "module":
            self.head.weight = self.embedding.weight
        if positions == "module":
            self.position = nn.Embedding(9, width)
        elif positions == "parameter":
            self.position = nn.Parameter(torch.randn(1, 9, width))
            self.token = nn.Parameter(torch.randn(1, 1, width))
            self.scale = nn.Parameter(torch.randn(width))
            self.shift = nn.Parameter(torch.randn(width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.positions == "module":
            x = x + self.position(torch.arange(tokens.shape[1]))
        elif self.positions == "parameter":
            x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.position[:, : x.shape[1] + 1]
            x = (self.scale * x + self.shift)[:, 1:] * self.scale.unsqueeze(0).exp()
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return F.linear(x, self.embedding.weight) if self.tied == "function" else self.head(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 6, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Twice(nn.Module):
    """A layer called twice, another whose weight is its own in a second module, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.other.weight
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.layer(input=torch.tanh(self.layer(x)))))
        x = self.conv(self.conv(x.unsqueeze(1)).tanh()).squeeze(1)
        return self.head(self.norm(self.tied(torch.tanh(self.other(x)))))


class Bags(nn.Module):
    def __init__(self, mode: str = "mean") -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(12, 6, mode=mode, padding_idx=1)
        self.head = nn.Linear(6, 5)

    def forward(self, tokens: Tensor, offsets: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.bag(tokens, offsets, per_sample_weights=scales)))


class SequenceFirst(nn.Module):
    """Samples are the second dimension inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x.transpose(0, 1))).mean(0))


def images(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 2, 7, 8), torch.randint(5, (count,))


def series(count: int, length: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, length), torch.randint(5, (count,))


def steps(count: int, length: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(count, length, 3), torch.randint(5, (count,))


def texts(count: int, length: int = 6) -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(11, (count, length)), torch.randint(11, (count, length))
    targets[:, :2] = -100
    return tokens, targets


def vectors(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 6), torch.randint(5, (count,))


def bags(count: int) -> tuple[Tensor, Tensor]:
    return torch.randint(12, (count, 4)), torch.randint(5, (count,))


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.RMSNorm(7), nn.Linear(7, 5, bias=False))


# Name: model, batch. Those whose layers give the gradients apart, and those whose do not.
BY_LAYERS = {
    "mlp": (small_mlp, vectors),
    "cnn": (Net, images),
    "cnn 1d": (Signal, series),
    "transformer": (Transformer, texts),
    "transformer, RMSNorm": (lambda: Transformer("not", nn.RMSNorm), texts),
    "transformer, position embedding": (lambda: Transformer(positions="module"), texts),
    "transformer, position parameters": (lambda: Transformer("not", positions="parameter"), texts),
    "called twice": (Twice, vectors),
    "bags, mean": (Bags, bags),
    "bags, sum": (lambda: Bags("sum"), bags),
}
NOT_BY_LAYERS = {
    "lstm": (Recurrent, steps, "lstm (LSTM)"),
    "transformer, tied by a function": (lambda: Transformer("function"), texts, "embedding (Embedding)"),
    "bags, max": (lambda: Bags("max"), bags, "bag (EmbeddingBag)"),
    "sequence first": (SequenceFirst, lambda n: steps(n, n), "layer (Linear)"),
    "sequence first, rows that do not divide": (SequenceFirst, lambda n: steps(n, n + 1), "layer (Linear)"),
}


def build(make: object) -> nn.Module:
    """The model in float64 and eval mode, initialised the same every time."""
    torch.manual_seed(0)
    model = make()
    if isinstance(model, Net):
        model(images(1)[0])
    model.double().eval()
    for parameter in model.parameters():  # no zeros or ones, with which mistakes would not show
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def sample(data: object, count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    x, y = data(count)
    return (x.double() if x.is_floating_point() else x), y
