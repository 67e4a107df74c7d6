"""The optimizer step on lists of tensors: which implementation serves them, and the memory order they are taken in.

C++ serves CPU tensors, Triton CUDA tensors, `kernels/update_reference.py` everything else. The kernels walk through
memory without looking at shapes, so all tensors of a parameter must lie in its order; those that do not, and parameters
with gaps, are copied for the step. Nothing here validates; that is `optim.py`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nabla_tau import _C
from nabla_tau._library import CPP_DTYPES, Provider, row_provider
from nabla_tau.kernels import update_reference as reference
from nabla_tau.kernels.update_reference import Noise, Products, Row, Settings
from nabla_tau.kernels.update_table import COLUMNS, table_of

Rule: TypeAlias = Literal["adamw", "sgd"]
_TENSORS = ("parameter", "forget", "retain", "mask", "first", "second", "centre")


def update_provider(parameter: Tensor) -> Provider:
    """Name of the implementation that serves the step of this parameter."""
    return row_provider(parameter) if parameter.dtype in CPP_DTYPES else "reference"


@functools.cache
def _launches() -> Any:
    return importlib.import_module("nabla_tau.kernels.update_launch")


def _by_dtype(rows: list[Row]) -> list[list[int]]:
    """Positions of the rows of each dtype and device."""
    found: dict[Any, list[int]] = {}
    for position, row in enumerate(rows):
        found.setdefault((row.parameter.dtype, row.parameter.device), []).append(position)
    return list(found.values())


def _address_table(rows: list[Row], settings: list[Settings] | None = None) -> Any:
    return np.frombuffer(table_of(rows, settings), np.int64).reshape(len(rows), len(COLUMNS))


def _is_simple(row: Row) -> bool:
    p, _, f, r, mask, first, second, _, centre = row
    return (  # no loop: of many small parameters this is called once a step for each
        p.is_contiguous()
        and (f is None or f.is_contiguous())
        and (r is None or r.is_contiguous())
        and (first is None or first.is_contiguous())
        and (second is None or second.is_contiguous())
        and (mask is None or mask.is_contiguous())
        and (centre is None or centre.is_contiguous())
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether its entries fill their part of the memory, in whatever order of the dimensions."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


class _InMemoryOrder:
    """The rows with every tensor in the memory order of its parameter; `write_back` where that took a copy."""

    def __init__(self, rows: list[Row]) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.rows = [row if _is_simple(row) else self._ordered(row) for row in rows]

    def _ordered(self, row: Row) -> Row:
        p = row.parameter
        strides = p.stride() if is_dense(p) else torch.empty(p.shape, device="meta").stride()
        ordered: dict[str, Any] = {name: self._as(getattr(row, name), strides, name) for name in _TENSORS}
        return row._replace(**ordered)

    def _as(self, tensor: Tensor | None, strides: tuple[int, ...], name: str) -> Tensor | None:
        if tensor is None or tensor.stride() == strides:
            return tensor
        copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        if name in ("parameter", "first", "second"):
            self._copies.append((tensor, copy))
        return copy

    def write_back(self) -> None:
        for tensor, copy in self._copies:
            tensor.copy_(copy)


class Updates:
    """The steps of one optimizer; it keeps what the launches on a GPU need from one step to the next."""

    def __init__(self) -> None:
        self._workspace: Any = None

    def _triton(self) -> Any:
        if self._workspace is None:
            self._workspace = _launches().Workspace()
        return self._workspace

    @torch.no_grad()
    def products(self, rows: list[Row]) -> Products:
        """`reference.gradient_products`; all parameters on one device."""
        rows = _InMemoryOrder([row for row in rows if row.forget is not None or row.retain is not None]).rows
        parts = [[rows[at] for at in part] for part in _by_dtype(rows)]
        provider = _provider_of(rows)
        if provider == "triton":
            found: Products = self._triton().products(parts)
            return found
        if provider == "reference":
            return reference.gradient_products(rows)
        sums = np.zeros(3)
        for part in parts:
            sums += _C.gradient_products(_address_table(part), _name(part[0]), torch.get_num_threads())
        return Products(*torch.from_numpy(sums))

    @torch.no_grad()
    def step(
        self,
        rule: Rule,
        rows: list[Row],
        settings: list[Settings],
        forget_scale: float | Tensor,
        retain_scale: float | Tensor,
        products: Products | None = None,
        noise: Noise | None = None,
    ) -> None:
        """`reference.adamw` or `reference.sgd`; with products, of the projected gradient."""
        if not rows:
            return
        ordered = _InMemoryOrder(rows)
        for part in _by_dtype(ordered.rows):
            there, given = [ordered.rows[at] for at in part], [settings[at] for at in part]
            provider = update_provider(there[0].parameter)
            if provider == "triton":
                self._triton().step(rule, there, given, forget_scale, retain_scale, products, noise)
                continue
            scale = retain_scale if products is None else products.projected(forget_scale, retain_scale)
            if provider == "reference":
                step = reference.adamw if rule == "adamw" else reference.sgd
                step(there, given, forget_scale, scale, noise)
                continue
            step_cpp = _C.adamw if rule == "adamw" else _C.sgd
            table, drawn = _address_table(there, given), None if noise is None else _numbers(noise)
            step_cpp(table, _name(there[0]), float(forget_scale), float(scale), drawn, torch.get_num_threads())
        ordered.write_back()
        written = [t for row in rows for t in (row.parameter, row.first, row.second) if t is not None]
        # The kernels write behind autograd's back: what was saved for a backward has changed all the same.
        torch.autograd.graph.increment_version(written)

    @torch.no_grad()
    def into_ball(self, rows: list[Row], radius: float | Tensor) -> None:
        """`reference.pull`, with the distance of all parameters together from their centres."""
        ordered = _InMemoryOrder(rows)
        parts = [[ordered.rows[at] for at in part] for part in _by_dtype(ordered.rows)]
        provider = _provider_of(rows)
        if provider == "triton":
            self._triton().ball(parts, radius)
        elif provider == "reference":
            reference.pull(ordered.rows, reference.squared_distance(ordered.rows), radius)
        else:
            tables = [(_address_table(part), _name(part[0])) for part in parts]
            threads = torch.get_num_threads()
            distance = sum(_C.squared_distance(*table, threads) for table in tables) ** 0.5
            if distance > radius:
                for table in tables:
                    _C.pull(*table, float(radius) / distance, threads)
        ordered.write_back()
        torch.autograd.graph.increment_version([row.parameter for row in rows])


def _provider_of(rows: list[Row]) -> Provider:
    """What serves all of them together."""
    found = {update_provider(row.parameter) for row in rows}
    return found.pop() if len(found) == 1 else "reference"


def _name(row: Row) -> Any:
    return str(row.parameter.dtype).removeprefix("torch.")


def _numbers(noise: Noise) -> tuple[float, int, int]:
    return float(noise.std), int(noise.seed) % 2**64, int(noise.step) % 2**64
