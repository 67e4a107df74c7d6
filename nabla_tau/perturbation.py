"""Shrink and perturb: what the recipe "ascent" does to the weights before its first step."""

from __future__ import annotations

import torch
from torch import nn

from nabla_tau.distributed import assign, full_tensor
from nabla_tau.unlearner import trainable_parameters


def shrink_and_perturb(model: nn.Module, shrink: float, noise: float, seed: int) -> None:
    """w <- shrink * w + noise * std(w) * N(0, 1) for every trainable tensor of two or more dimensions (Ash and Adams
    2020, arXiv 1910.08475): makes room for another solution without leaving the old one. Same numbers on every device;
    the padding rows of embeddings stay as they are, since no gradient would ever move them back."""
    generator = torch.Generator().manual_seed(seed)
    padding = {
        id(module.weight): module.padding_idx
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None
    }
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            if parameter.ndim > 1 and parameter.numel() > 1:
                before = full_tensor(parameter)
                draw = torch.randn(before.shape, generator=generator, dtype=torch.float64).to(before)
                after = shrink * before + noise * before.std() * draw
                if (row := padding.get(id(parameter))) is not None:
                    after[row] = before[row]
                assign(parameter, after)
