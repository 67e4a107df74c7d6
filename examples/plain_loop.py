"""Unlearning in a training loop of your own, in plain PyTorch: `Unlearner.step` in place of backward and step.

python examples/plain_loop.py [--quick]
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nabla_tau import Unlearner
from nabla_tau.evaluation import evaluate

epochs = 7 if "--quick" in sys.argv else 10
torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data[:, :32], dtype=torch.float32) / 16, torch.tensor(digits.target)
forget, retain, held_out = (TensorDataset(x[rows], y[rows]) for rows in torch.randperm(1797).split([150, 1000, 647]))
model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 10))

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(50):  # the training that came before
    for inputs, labels in DataLoader(torch.utils.data.ConcatDataset([forget, retain]), 64, shuffle=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

unlearner = Unlearner(model.eval(), alpha=0.5, learning_rate=1e-3)
to_forget = DataLoader(forget, 64, shuffle=True)
for epoch in range(epochs):
    unlearner.set_tau(torch.tensor(evaluate(model, held_out).loss))
    batches = iter(to_forget)
    for retain_batch in DataLoader(retain, 64, shuffle=True):
        forget_batch = next(batches, None) or next(batches := iter(to_forget))
        metrics = unlearner.step(forget_batch, retain_batch)
    losses = f"forget loss {metrics.forget_loss:.3f}, tau {unlearner.tau:.3f}, retain {metrics.retain_loss:.3f}"
    print(f"epoch {epoch}: {losses}")
