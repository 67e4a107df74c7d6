"""The cases of `compile_kernels.py` for the optimizer step: a kernel, what is asked of it, and its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FORMS = ("plain", "noise+mask")
WRITING = ("update.adamw", "update.sgd", "update_sums.pull")  # expected to have 128-bit stores


def update_cases() -> Iterator[tuple[str, str, str, int, bool]]:
    """kernel, form, dtype, entries of a parameter, quick. Kernels without entries, which go through the parameters or
    the sums of all chunks, have 1."""
    for dtype in ("bf16", "fp32", "fp64"):
        for form in FORMS:
            for kernel in WRITING[:2]:
                yield kernel, form, dtype, 4096, dtype == "fp32"
        for kernel in ("products", "distance", "pull"):
            yield f"update_sums.{kernel}", "plain", dtype, 4096, dtype == "fp32"
        yield "update_sums.products", "mask", dtype, 4096, False
    for form in ("adamw", "adamw+projection", "sgd"):
        yield "update.prepare", form, "fp64", 1, form == "adamw+projection"
    yield "update_sums.finish", "plain", "fp64", 1, True


def update_arguments(name: str, form: str, dtype: str) -> tuple[Any, Any, dict[str, Any]]:
    """As `compile_kernels.arguments`."""
    import torch
    from triton import language as tl

    from nabla_tau.kernels import launch, update, update_sums

    module, kernel = name.split(".")
    types = {
        "bf16": (tl.bfloat16, torch.bfloat16),
        "fp32": (tl.float32, torch.float32),
        "fp64": (tl.float64, torch.float64),
    }
    entry, torch_entry = types[dtype]
    given: dict[str, Any] = {
        "table": "*i64", "chunks": "*i32", "coefficients": "*fp64", "forget_scale": "*fp64", "retain_scale": "*fp64",
        "sums": "*fp64", "out": "*fp64", "squared": "*fp64", "radius": "*fp64", "P": (62,), "C": (4096,),
        "T": entry, "Real": tl.float64 if dtype == "fp64" else tl.float32, "MASKED": "mask" in form, "ALIGNED": True,
        "RULE": form.split("+")[0], "COUNT": 3,
    }  # fmt: skip
    if "noise" in form:
        given |= {"noise_std": "*fp64", "seed": "*i64", "step": "*i64"}
    if "projection" in form:
        given["products"] = "*fp64"
    config = launch.in_order() if kernel in ("prepare", "finish") else launch.chunk(torch_entry.itemsize)
    given["BLOCK"] = config.threads if kernel == "prepare" else config.classes
    return getattr({"update": update, "update_sums": update_sums}[module], f"_{kernel}_kernel"), config, given
