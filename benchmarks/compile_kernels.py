"""Compile the Triton kernels without a GPU and hold them to their limits:

    python benchmarks/compile_kernels.py [--quick] [--csv FILE]

Prints one line for each kernel, case and target, and fails when a kernel spills, takes more registers than `limit`
gives, moves logits in less than 128 bits where the rows allow it, or does not compile. `--quick` takes one case of
every kernel and form.

How to read the table: `registers` are of one thread (NVIDIA: ptxas; gfx942: vector registers), `spills` bytes a thread
keeps in local memory for lack of them, `shared` bytes of a block, `wide_loads` and `wide_stores` whether the kernel has
128-bit ones. A case with odd rows has none and need not.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from compile_update import WRITING, update_arguments, update_cases

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90a": ("cuda", 90, 32),
    "sm_100a": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
BYTES = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """`form` names what is asked of the kernel; `quick` is the case that stands for its form."""

    kernel: str
    form: str
    dtype: str
    classes: int
    quick: bool = False


@dataclasses.dataclass
class Compiled:
    kernel: str
    form: str
    dtype: str
    classes: int
    target: str
    threads: int
    registers: int | None = None
    limit: int | None = None
    spills: int | None = None
    shared: int | None = None
    wide_loads: bool | None = None
    wide_stores: bool | None = None
    note: str = ""


FORWARD = ("signals", "signals+gradient", "smoothed", "smoothed+gradient", "smoothed+weighted+gradient")
GATES = ("gate batch", "gate sample")


def cases() -> Iterator[Case]:
    for dtype in ("bf16", "fp32", "fp64"):
        limit = 512 if dtype == "fp64" else 32768
        for classes in (10, limit - 128, min(limit, 1000)):
            for form in FORWARD[:2]:
                yield Case(
                    "rows.tile", form, dtype, classes, quick=(dtype, classes, form) == ("bf16", 32640, FORWARD[1])
                )
        for form in FORWARD[2:]:
            yield Case("rows.tile", form, dtype, min(limit, 8192), quick=(dtype, form) == ("fp32", FORWARD[4]))
        for form in (*FORWARD[:2], FORWARD[4]):
            yield Case("rows.online", form, dtype, 128256, quick=dtype == "bf16" and form == FORWARD[4])
        for classes in (10, 1000, 128256):
            yield Case("rows.backward", "plain", dtype, classes, quick=(dtype, classes) == ("bf16", 128256))
        yield Case("rows.backward", "smoothed+weighted", dtype, 1000)
        for kernel in ("multilabel.forward", "multilabel.backward"):
            for classes in (10, 4096):
                yield Case(kernel, "plain", dtype, classes, quick=(dtype, classes) == ("fp32", 4096))
    for dtype in ("bf16", "fp16", "fp32"):
        for width in (64, 1000, 4096):
            yield Case("gram.norms", "tiles", dtype, width, quick=(dtype, width) == ("bf16", 1000))
    yield Case("rows.tile", FORWARD[0], "bf16", 256)
    yield Case("rows.tile", FORWARD[1], "fp16", 1000)
    for form in GATES:
        yield Case("rows.tile", form, "bf16", 1000, quick=form == GATES[0])
        yield Case("rows.tile", form, "fp32", 32000)
        yield Case("rows.online", form, "bf16", 128256, quick=form == GATES[0])
        yield Case("rows.gate", form, "fp32", 1, quick=form == GATES[1])
    for case in update_cases():
        yield Case(*case)


def limit_of(case: Case, target: str, threads: int) -> int:
    """Registers a thread may take.

    512 threads are to be resident on a multiprocessor, and a block of 1024 has to fit: 512 threads with 32 logits of 2
    bytes each keep 32 KB in flight, and 3.35 TB/s x 0.7 us / 132 multiprocessors asks for 18 KB. NVIDIA has 65536
    registers for that; gfx942 has 4 x 512 x 64, of which each of 1024 threads gets 128. In float64, which is for tests
    and for the one program that prepares an update, half as many threads will do: a number takes two registers.
    """
    if case.dtype == "fp64":
        return 256 if target == "gfx942" else min(255, 65536 // threads)
    return 128 if target == "gfx942" else 65536 // max(threads, 512)


def arguments(case: Case, target: str) -> tuple[Any, Any, dict[str, Any]]:
    """The kernel, its launch configuration, and its arguments: "*type" for a pointer, (value,) for a number known at
    run time, anything else for a constant."""
    import torch

    from nabla_tau.kernels import gram, launch, multilabel, rows

    module, name = case.kernel.split(".")
    if module.startswith("update"):
        return update_arguments(case.kernel, case.form, case.dtype)
    kernel = getattr({"rows": rows, "multilabel": multilabel, "gram": gram}[module], f"_{name}_kernel")
    if module == "gram":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype]
        config, align = launch.gram(512, dtype), launch.alignment(case.classes)
        return kernel, config, {
            "inputs": f"*{case.dtype}", "gradients": f"*{case.dtype}", "partial": "*fp32",
            "T": (512,), "p_units": (case.classes // align,), "q_units": (case.classes // align,), "ALIGN": align,
            "WIDEN": False,
            "PRECISION": gram.precision(dtype, target == "gfx942"),
            "BLOCK_T": config.rows, "BLOCK_K": config.classes,
        }  # fmt: skip
    data, real = f"*{case.dtype}", "fp64" if case.dtype == "fp64" else "fp32"
    torch_real = torch.float64 if real == "fp64" else torch.float32
    smoothing = 0.1 if "smoothed" in case.form else 0.0
    gate = case.form.split()[1] if case.form in GATES else None
    align = launch.alignment(case.classes)
    units = (case.classes // align,)
    given: dict[str, Any] = {
        "logits": data, "targets": data if module == "multilabel" else "*i64", "correct": "*i1",
        "signals": f"*{real}", "lse": f"*{real}", "margin": f"*{real}", "weights": f"*{real}",
        "N": (4096,), "ignore_index": (-100,), "units": units, "stride_units": units, "target_units": units,
        "out_units": (0,), "weight_stride": (1,),
        "SMOOTHING": smoothing, "GATE": gate, "POWER": 2, "ALIGN": align,
    }  # fmt: skip
    if "gradient" in case.form or name == "backward":
        given |= {"gradient": data, "row_weights": f"*{real}", "out_units": units}
    if "weighted" in case.form:
        given |= {"class_weights": f"*{real}", "mean_class_weight": f"*{real}"}
    if gate:
        given |= {"forget": "*i1", "tau": f"*{real}", "alpha": f"*{real}", "terms": f"*{real}"}
        given |= {"gate_weights": f"*{real}", "counter": "*i32"}
    if name in ("tile", "online"):
        config = launch.rows(case.classes, torch_real, smoothing=smoothing > 0, gate=gate is not None)
        assert config.online == (name == "online"), case
    elif name == "gate":
        config = launch.gate()
        given["BLOCK"] = config.rows
    else:
        config = (
            launch.labels(case.classes, BYTES[case.dtype]) if name == "forward" else launch.elementwise(case.classes)
        )
    given |= {"GATE_BLOCK": launch.GATE_BLOCK, "BLOCK_N": config.rows, "BLOCK_V": config.classes}
    if module == "multilabel":
        from triton import language as tl

        given["Real"] = getattr(tl, f"float{real[2:]}")
    return kernel, config, given


def source(kernel: Any, given: dict[str, Any]) -> Any:
    """The kernel as a launch would specialise it: pointers on 16 bytes, numbers that 16 divides, ones and absent
    pointers as constants."""
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    specialised = {p.name for p in kernel.params if not p.do_not_specialize}
    for position, name in enumerate(kernel.arg_names):
        value = given.get(name)
        if isinstance(value, str) and value.startswith("*"):
            signature[name] = value
            attributes[position,] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple) and not (value[0] == 1 and name in specialised):
            signature[name] = "i32"
            if value[0] % 16 == 0 and name in specialised:
                attributes[position,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[name] = value[0] if isinstance(value, tuple) else value
    return ASTSource(kernel, signature, constants, attributes)


def compile_case(job: tuple[Case, str]) -> Compiled:
    case, target = job
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, config, given = arguments(case, target)
    done = Compiled(case.kernel, case.form, case.dtype, case.classes, target, config.threads)
    gpu = GPUTarget(*TARGETS[target])
    log = io.StringIO()
    triton.knobs.nvidia.dump_ptxas_log = True
    try:
        with contextlib.redirect_stdout(log):
            options = {"num_warps": config.num_warps(gpu.warp_size)}
            compiled = triton.compile(source(kernel, given), target=gpu, options=options)
    except Exception as error:
        done.note = (
            f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        )
        return done
    done.limit, done.shared = limit_of(case, target, config.threads), compiled.metadata.shared
    if gpu.backend == "cuda":
        done.registers = int(_first(r"Used (\d+) registers", log.getvalue()))
        done.spills = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
        text, wide = compiled.asm["ptx"], r"{}\.global\S*\.(v4\.b32|v2\.b64|v8\.b32|v4\.b64)"
        done.wide_loads, done.wide_stores = (bool(re.search(wide.format(op), text)) for op in ("ld", "st"))
        # A copy to shared memory that passes the registers by.
        done.wide_loads |= bool(re.search(r"cp\.async\.c[ag]\.shared\.global .*, (16|0x10),", text))
    else:
        text = compiled.asm["amdgcn"]
        done.registers = int(_first(r"\.vgpr_count:\s+(\d+)", text))
        done.spills = int(_first(r"\.private_segment_fixed_size:\s+(\d+)", text))
        wide = r"(global|buffer)_{}_dwordx4"
        done.wide_loads, done.wide_stores = (bool(re.search(wide.format(op), text)) for op in ("load", "store"))
    return done


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in the compiler's output")
    return found[1]


def faults(done: Compiled) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    if done.registers is None or done.limit is None:
        return [done.note]
    found = []
    if done.spills:
        found.append(f"spills {done.spills} bytes")
    if done.registers > done.limit:
        found.append(f"takes {done.registers} registers of {done.limit}")
    if done.classes * BYTES[done.dtype] % 16 == 0:
        if not done.wide_loads:
            found.append("has no 128-bit loads")
        if not done.wide_stores and (
            "gradient" in done.form or done.kernel.endswith("backward") or done.kernel in WRITING
        ):
            found.append("has no 128-bit stores")
    return found


def run(quick: bool) -> list[Compiled]:
    jobs = [(case, target) for case in cases() if case.quick or not quick for target in TARGETS]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_case, jobs, chunksize=2))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    # Interpreted kernels cannot be compiled, and from the cache there is no log of ptxas to read.
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_ALWAYS_COMPILE": "1"}
        table = run(args.quick)
    fields = [field.name for field in dataclasses.fields(Compiled)]
    rows = [["" if value is None else value for value in dataclasses.astuple(done)] for done in table]
    widths = [max(len(str(cell)) for cell in column) for column in zip(fields, *rows, strict=True)]
    for row in (fields, *rows):
        print("  ".join(f"{cell!s:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    if args.csv:
        import triton

        with open(args.csv, "w", newline="") as file:
            file.write(f"# triton: {triton.__version__}\n")
            csv.writer(file).writerows([fields, *rows])
    bad = [(done, fault) for done in table for fault in faults(done)]
    for done, fault in bad:
        print(f"{done.kernel} {done.form} {done.dtype} {done.classes} on {done.target}: {fault}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
