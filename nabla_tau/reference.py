"""A file of -log p of sequences by a model as it once was: computed once, and read by as many runs as one likes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from nabla_tau import fingerprint
from nabla_tau.batch import rows_between, sample_count, tensors_of
from nabla_tau.checkpoint import load_checkpoint, save_checkpoint
from nabla_tau.sources import Source


class ReferenceFile:
    """losses [n] float64 of the first n samples, and fingerprints of the weights and of every sample: what is of
    another model or of other data is refused with a ValueError, as is a damaged file."""

    def __init__(self, path: Path, model: nn.Module, source: Source) -> None:
        batches = source.read(256)
        samples = (rows_between(batch, slice(i, i + 1)) for batch in batches for i in range(sample_count(batch)))
        self.path = path
        self.identity = {
            "model": fingerprint.of_model(model),
            "data": fingerprint.of_texts(fingerprint.of_tensors(tensors_of(sample)) for sample in samples),
        }

    def read(self) -> Tensor:
        """Raises OSError where there is none that can be read."""
        kept = load_checkpoint(self.path, torch.device("cpu"))
        different = [name for name, mine in self.identity.items() if kept.get(name) != mine]
        if different:
            raise ValueError(f"{self.path} holds the reference losses of another {' and other '.join(different)}")
        losses: Tensor = kept["losses"]
        return losses

    def write(self, losses: Tensor) -> None:
        """Whole or not at all. Raises OSError, the old file left as it was."""
        save_checkpoint(self.path, {**self.identity, "losses": losses})
