"""A random state of one's own: what draws inside it moves nobody else's, and goes on from where it stood before.

Random transforms and samplers draw from torch's generator on the CPU, from `random` or from NumPy's global state.
While a batch is read these three, and the generators that a DataLoader was given, hold the state of that pass; then
everyone's own comes back. So a pass gives the same batches whatever is drawn between them, and none of them is felt
outside.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")


class RandomState:
    """Inside `with` the random states are those of this object; outside they are what they were.

    Starts from `seed`, or (None) from the states as they are now. generators: torch generators to keep apart as well.
    """

    def __init__(self, seed: int | None = None, generators: Sequence[torch.Generator] = ()) -> None:
        # Not torch.manual_seed: that reaches for the GPUs' generators too.
        self._generators = (torch.default_generator, *generators)
        self._other = self._states()
        if seed is not None:
            with self:
                self.seed(seed)

    def seed(self, seed: int) -> None:
        """Begin anew, from inside."""
        for generator in self._generators:
            generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the state that other people's transforms draw from

    def over(self, iterable: Iterable[T]) -> Iterator[T]:
        """The items of an iterable, each of them made inside and handed on outside."""
        with self:
            iterator = iter(iterable)
        while True:
            with self:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def _states(self) -> tuple[Any, ...]:
        states = [generator.get_state() for generator in self._generators]
        return states, random.getstate(), np.random.get_state()  # noqa: NPY002

    def _swap(self) -> None:
        here = self._states()
        states, python, numpy = self._other
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        self._other = here

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *exception: object) -> None:
        self._swap()
