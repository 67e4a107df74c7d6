"""Your own model and data for the command line: a file with model(), data() and, to retrain, train().

    python examples/own_task.py
    nabla-tau unlearn --task examples/own_task.py --weights trained.safetensors --out unlearned.safetensors
    nabla-tau audit --task examples/own_task.py --weights unlearned.safetensors --original trained.safetensors \\
        --retrain --out report.html

The first line stands for your own training: it writes trained.safetensors, with --quick after fewer epochs. The images
here are the upper halves of scikit-learn's digits, since whole ones are so easy that a model hardly has to remember any
one of them.
"""

import sys

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn


def model() -> nn.Module:
    """A new model of the shape that the weights have."""
    return nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 10))


def data() -> dict[str, tuple[Tensor, Tensor]]:
    """The same parts at every call: the commands must agree on what was trained on and what is to be forgotten."""
    digits = load_digits()
    x, y = torch.tensor(digits.data[:, :32], dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    forget, retain, held_out, unseen = order.split([150, 650, 300, 697])
    parts = {
        "forget": forget,  # trained on, to be forgotten
        "retain": retain,  # trained on, to be kept
        "held_out": held_out,  # never trained on: says what loss data should have that the model has not seen
        "unseen": unseen,  # never trained on, looked at by the audit alone
    }
    return {name: (x[rows], y[rows]) for name, rows in parts.items()}


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int = 150) -> None:
    """What `audit --retrain` calls with a new model and the retained data."""
    x, y = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)  # layers as small as these lose more by waiting for a second thread than it brings them
    torch.manual_seed(0)
    parts, trained = data(), model()
    x, y = (torch.cat(pair) for pair in zip(parts["forget"], parts["retain"], strict=True))
    train(trained, (x, y), epochs=60 if "--quick" in sys.argv else 150)
    save_file(trained.state_dict(), "trained.safetensors")
    print("weights: trained.safetensors")
