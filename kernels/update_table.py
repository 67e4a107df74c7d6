"""The table that tells the update kernels, on the CPU and on the GPU, where the tensors of each parameter lie."""

from __future__ import annotations

import struct

from torch import Tensor

from nabla_tau.kernels.update_reference import Row, Settings

# A row a parameter: addresses, 0 where there is nothing; the number of entries; the parameter's number; the address of
# the rate where it is a tensor on the device; then, from `rate` on, the bits of float64 numbers.
COLUMNS = (
    "parameter", "first", "second", "forget", "retain", "mask", "centre", "step", "size", "number", "rate_at",
    "rate", "decay", "sign", "beta1", "beta2", "eps", "momentum", "dampening", "nesterov",
)  # fmt: skip
_ROW = struct.Struct("=11q9d")
_NOTHING = Settings(0.0, 0.0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def table_of(rows: list[Row], settings: list[Settings] | None = None) -> bytes:
    """The table as native int64, [P, len(COLUMNS)] in row-major order. The tensors must outlive its use."""
    parts = []
    for row, given in zip(rows, settings or [_NOTHING] * len(rows), strict=True):
        rate, rate_at = given.rate, 0
        if isinstance(rate, Tensor):
            rate, rate_at = (0.0, rate.data_ptr()) if rate.is_cuda else (float(rate), 0)
        parts.append(
            _ROW.pack(
                row.parameter.data_ptr(),
                _address(row.first),
                _address(row.second),
                _address(row.forget),
                _address(row.retain),
                _address(row.mask),
                _address(row.centre),
                _address(row.step),
                row.parameter.numel(),
                row.number,
                rate_at,
                rate,
                *given[1:],
            )
        )
    return b"".join(parts)
