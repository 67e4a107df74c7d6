# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Launches of the update kernels: tables on the device, made once, and written again only when an address changed."""

from __future__ import annotations

import functools
from array import array

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_tau.kernels import launch, update, update_sums
from nabla_tau.kernels.reference import compute_dtype
from nabla_tau.kernels.update_reference import Noise, Products, Row, Settings
from nabla_tau.kernels.update_table import COLUMNS, table_of

_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_ADDRESSES = COLUMNS.index("step")  # the columns before it are addresses of whole tensors
_SPARE = 4  # captures of CUDA graphs that a workspace has tables for


@functools.lru_cache(maxsize=256)
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A fill, not a copy from the host, which would wait.
    return torch.full((), value, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _aligned(content: bytes) -> bool:
    """Whether every tensor of a table starts on 16 bytes."""
    words, width = memoryview(content).cast("q"), len(COLUMNS)
    return all(word % 16 == 0 for start in range(0, len(words), width) for word in words[start : start + _ADDRESSES])


def _on_device(value: float | Tensor, device: torch.device) -> Tensor:
    return value if isinstance(value, Tensor) else _scalar(float(value), torch.float64, device)


def _bits(value: int | Tensor, device: torch.device) -> Tensor:
    """64 bits as int64; 2^63 and above become negative."""
    if isinstance(value, Tensor):
        return value
    return _scalar((value + 2**63) % 2**64 - 2**63, torch.int64, device)


class _Part:
    """The buffers for the parameters of one dtype. All have a size that depends on the parameters' sizes alone."""

    def __init__(self, rows: list[Row]) -> None:
        parameter = rows[0].parameter
        self.device, self.dtype = parameter.device, parameter.dtype
        self.sizes = [row.parameter.numel() for row in rows]
        self.config = launch.chunk(self.dtype.itemsize)
        pairs = array("i")
        for number, size in enumerate(self.sizes):
            for chunk in range(triton.cdiv(size, self.config.classes)):
                pairs.extend((number, chunk))
        self.count = len(pairs) // 2
        self.chunks = torch.tensor(pairs, dtype=torch.int32).to(self.device)
        self.sums = torch.empty(3 * self.count, dtype=torch.float64, device=self.device)
        self.coefficients = torch.empty(len(rows) * 8, dtype=torch.float64, device=self.device)
        self._table = self._new_table()
        self._written = b""
        self._spare = [(self._host(), self._new_table()) for _ in range(_SPARE * self.device.type.startswith("cuda"))]
        self._captured: list[tuple[Tensor, Tensor]] = []

    def _new_table(self) -> Tensor:
        return torch.empty(len(self.sizes) * len(COLUMNS), dtype=torch.int64, device=self.device)

    def _host(self) -> Tensor:
        return torch.empty(len(self.sizes) * len(COLUMNS), dtype=torch.int64, pin_memory=self.device.type == "cuda")

    def table(self, content: bytes) -> Tensor:
        """The table on the device. A graph that is being captured gets one of its own, of which nothing is freed or
        written again: its replays copy it anew."""
        given = torch.frombuffer(bytearray(content), dtype=torch.int64)
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if not self._spare:
                raise RuntimeError(f"an optimizer can be captured in {_SPARE} CUDA graphs, and this would be another")
            host, table = self._spare.pop()
            self._captured.append((host, table))
            host.copy_(given)
            return table.copy_(host, non_blocking=True)
        if content != self._written:
            host = self._host()  # PyTorch does not give it to anyone else before the copy is done
            host.copy_(given)
            self._table.copy_(host, non_blocking=True)
            self._written = content
        return self._table


class Workspace:
    """The launches of one optimizer. The first step makes the buffers; then a step of the same parameters allocates
    nothing (`products` returns a tensor of three numbers), and the host does not wait."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, torch.device, torch.dtype], _Part] = {}

    def _part(self, use: str, rows: list[Row]) -> _Part:
        key = use, rows[0].parameter.device, rows[0].parameter.dtype
        found = self._parts.get(key)
        if found is None or found.sizes != [row.parameter.numel() for row in rows]:
            found = self._parts[key] = _Part(rows)
        return found

    def _launch(self, kernel, part: _Part, rows: list[Row], table: Tensor, content: bytes, *arguments) -> None:
        real = tl.float64 if compute_dtype(rows[0].parameter) == torch.float64 else tl.float32
        masked = any(row.mask is not None for row in rows)
        with torch.cuda.device_of(rows[0].parameter):
            kernel[(part.count,)](
                table, part.chunks, *arguments,
                T=_TYPES[part.dtype], Real=real, MASKED=masked, ALIGNED=_aligned(content),
                BLOCK=part.config.classes, num_warps=part.config.num_warps(),
            )  # fmt: skip

    def _sum(self, use: str, parts: list[list[Row]], kernel, count: int) -> Tensor:
        """`count` sums over the parameters of all dtypes, [count] float64."""
        out = torch.zeros(count, dtype=torch.float64, device=parts[0][0].parameter.device)
        config = launch.in_order()
        for rows in parts:
            part, content = self._part(use, rows), table_of(rows)
            if part.count == 0:
                continue
            self._launch(kernel, part, rows, part.table(content), content, part.sums, part.count)
            with torch.cuda.device_of(out):
                update_sums._finish_kernel[(1,)](
                    part.sums, out, part.count,
                    COUNT=count, BLOCK=config.classes, num_warps=config.num_warps(),
                )  # fmt: skip
        return out

    def products(self, parts: list[list[Row]]) -> Products:
        """`update_reference.gradient_products`; `parts`: the rows of each dtype."""
        return Products(*self._sum("products", parts, update_sums._products_kernel, 3))

    def step(
        self,
        rule: str,
        rows: list[Row],
        settings: list[Settings],
        forget_scale: float | Tensor,
        retain_scale: float | Tensor,
        products: Products | None,
        noise: Noise | None,
    ) -> None:
        """`update_reference.adamw` or `sgd` for parameters of one dtype; with products the projected step."""
        part, content = self._part(rule, rows), table_of(rows, settings)
        table, config, device = part.table(content), launch.in_order(), part.device
        together = None if products is None else torch.stack(products)
        with torch.cuda.device_of(table):
            update._prepare_kernel[(1,)](
                table, part.coefficients, _on_device(forget_scale, device), _on_device(retain_scale, device),
                together, len(rows), RULE=rule, BLOCK=config.threads, num_warps=config.num_warps(),
            )  # fmt: skip
        if part.count == 0:
            return
        drawn: tuple[Tensor | None, ...] = (None, None, None)
        if noise is not None:
            drawn = _on_device(noise.std, device), _bits(noise.seed, device), _bits(noise.step, device)
        kernel = {"adamw": update._adamw_kernel, "sgd": update._sgd_kernel}[rule]
        self._launch(kernel, part, rows, table, content, part.coefficients, *drawn)

    def ball(self, parts: list[list[Row]], radius: float | Tensor) -> None:
        """`update_reference.pull` of the rows of all dtypes."""
        squared = self._sum("ball", parts, update_sums._distance_kernel, 1)
        bound = _on_device(radius, squared.device)
        for rows in parts:
            part, content = self._part("ball", rows), table_of(rows)
            if part.count:
                self._launch(update_sums._pull_kernel, part, rows, part.table(content), content, squared, bound)
