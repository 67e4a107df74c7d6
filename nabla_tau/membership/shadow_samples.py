"""Which samples shadow models are trained on, and whether an audit has the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from nabla_tau.arguments import numbers_checked
from nabla_tau.fingerprint import of_source
from nabla_tau.membership.shadow_store import Packed, ShadowScores
from nabla_tau.sources import as_source

# Samples whose membership is drawn at a time: bounds the memory at some tens of megabytes.
_BLOCK = 4096


@numbers_checked
def balanced_membership(models: int, samples: int, *, probability: float = 0.5, seed: int = 0) -> Packed:
    """Which model is trained on which sample, packed: uint8 [models, ceil(samples / 8)], `numpy.packbits(_, axis=1)`.

    Every sample is in exactly probability * models models, or where that is no whole number in one of the two nearest,
    by chance; which ones is drawn for each sample on its own. ValueError for fewer than two models or a probability
    outside (0, 1).
    """
    if models < 2:
        raise ValueError(f"there must be at least 2 models, got {models}")
    if samples < 1:
        raise ValueError(f"there must be at least one sample, got {samples}")
    if not 0 < probability < 1:
        raise ValueError(f"probability must be in (0, 1), got {probability}")
    generator = np.random.default_rng(seed)
    whole, rest = divmod(probability * models, 1)
    blocks = []
    for start in range(0, samples, _BLOCK):
        width = min(_BLOCK, samples - start)
        rank = generator.random((models, width)).argsort(axis=0).argsort(axis=0)
        blocks.append(np.packbits(rank < whole + (generator.random(width) < rest), axis=1))
    return np.concatenate(blocks, axis=1)


def fingerprint(data: Any, name: str) -> str:
    """Of a data set: the same for tensors, a TensorDataset of them and a DataLoader over it."""
    source = as_source(data.dataset if isinstance(data, DataLoader) else data, name)
    return of_source(source, source.targets())


def check_samples(shadow: ShadowScores, sets: Mapping[str, Any]) -> None:
    """ValueError where the shadow models scored other samples than those of `sets`, or not these sets at all."""
    for name, of_set in sets.items():
        shadow.columns(name)
        if shadow.plan.fingerprints[name] != fingerprint(of_set, name):
            count = as_source(of_set, name).count
            raise ValueError(
                f"the shadow models were trained on another {name} set: of {shadow.plan.sets[name]} samples, while "
                f"this one has {count}, or of other content or order"
            )
