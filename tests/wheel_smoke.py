"""What a built wheel must be able to do, wherever it is for: `python wheel_smoke.py`, outside the sources."""

import warnings

import torch
from torch import nn

import nabla_tau
from nabla_tau import _C
from nabla_tau.evaluation import evaluate

torch.manual_seed(0)
x, y = torch.randn(300, 8), torch.randint(3, (300,))
forget, retain, held_out = ((x[rows], y[rows]) for rows in torch.arange(300).split([50, 150, 100]))
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(200):  # labels at random: whatever it knows of them, it remembers
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[:200]), y[:200]).backward()
    optimizer.step()
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    result = nabla_tau.unlearn(model, forget=forget, retain=retain, held_out=held_out)
before, after = (float(evaluate(which, forget).loss.mean()) for which in (model, result.model))
assert result.settings["row_kernel"] == "cpp"
assert after > 2 * before, (before, after)
print(f"{_C.simd_level()}, {_C.openmp_max_threads()} threads: forget loss {before:.3f} -> {after:.3f}")
