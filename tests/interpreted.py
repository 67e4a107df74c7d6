"""Triton kernels for tests: run on a GPU where there is one, elsewhere in Triton's interpreter.

The interpreter takes CPU tensors and one program after the other: it shows what kernels compute, not that their
programs do not race (`benchmarks/gpu.sh` looks at that).
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch

import nabla_tau.kernels

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Triton looks at it when a kernel is defined, when it is itself imported, and while an interpreted kernel runs.
INTERPRETED = {} if ON_GPU else {"TRITON_INTERPRET": "1"}


def load_kernels(*names: str) -> list[ModuleType]:
    """Copies of kernel modules for one test file alone, interpreted where there is no GPU: what the rest of the session
    has imported, or will import, stays as it is."""
    with mock.patch.dict(os.environ, INTERPRETED):
        triton = pytest.importorskip("triton", reason="triton is not installed")
        importlib.import_module("triton.runtime.interpreter")
        if not ON_GPU and isinstance(triton.language.sum, triton.JITFunction):
            raise RuntimeError("triton was imported before this file and without TRITON_INTERPRET=1")
        if not ON_GPU and triton.__version__.startswith("3.6."):
            try:
                int(np.zeros(1))
            except TypeError:
                pytest.skip("the interpreter of triton 3.6 does not loop with this NumPy", allow_module_level=True)
        with mock.patch.dict(sys.modules), mock.patch.dict(vars(nabla_tau.kernels)):
            for name in names:
                sys.modules.pop(f"nabla_tau.kernels.{name}", None)
            return [importlib.import_module(f"nabla_tau.kernels.{name}") for name in names]
