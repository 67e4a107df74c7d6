"""Unlearning in Lightning's Trainer: pairs of a forget and a retained sample, and a callback that owns tau and alpha.

    pip install 'nabla_tau[lightning]'
    python examples/lightning_module.py [--quick]

The images are the upper halves of scikit-learn's digits, since whole ones hardly have to be remembered.
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from nabla_tau.evaluation import evaluate
from nabla_tau.integrations.lightning import Unlearning
from nabla_tau.integrations.pairs import PairCollator, Pairs, forget_mask


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 10))
        self.unlearning: Unlearning | None = None  # once there is something to forget

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        if self.unlearning is None:
            return nn.functional.cross_entropy(self(x), y)
        return self.unlearning.loss(self(x), y, forget_mask(y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3 if self.unlearning is None else 1e-3)


def main() -> None:
    epochs = 7 if "--quick" in sys.argv else 10
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data[:, :32], dtype=torch.float32) / 16, torch.tensor(digits.target)
    parts = torch.randperm(1797).split([150, 1000, 647])
    forget, retain, held_out = (TensorDataset(x[rows], y[rows]) for rows in parts)
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    model = Digits()
    trained_on = DataLoader(ConcatDataset([forget, retain]), 64, shuffle=True)
    Trainer(max_epochs=50, **quiet).fit(model, trained_on)
    before = evaluate(model, forget).loss.mean()

    model.unlearning = Unlearning(held_out=DataLoader(held_out, 256), alpha=0.5, alpha_end=1.0)
    pairs = DataLoader(Pairs(forget, retain), 64, shuffle=True, collate_fn=PairCollator())
    Trainer(max_epochs=epochs, callbacks=[model.unlearning], **quiet).fit(model, pairs)
    after, tau = evaluate(model, forget).loss.mean(), evaluate(model, held_out).loss.mean()
    print(f"mean forget loss: {before:.3f} before, {after:.3f} after, {tau:.3f} held out")


if __name__ == "__main__":
    main()
