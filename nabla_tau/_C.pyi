from typing import Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

_Logits = TypeVar("_Logits", NDArray[np.float32], NDArray[np.float64], NDArray[np.uint16])
_Real: TypeAlias = NDArray[np.float32] | NDArray[np.float64]

def rows_forward(
    logits: NDArray[np.float32] | NDArray[np.float64] | NDArray[np.uint16],
    targets: NDArray[np.int64],
    ignore_index: int = -100,
    num_threads: int = 1,
) -> tuple[_Real, _Real, _Real, _Real, NDArray[np.bool_]]: ...
def rows_backward(
    logits: _Logits,
    targets: NDArray[np.int64],
    lse: _Real,
    margin: _Real,
    weights: _Real,
    ignore_index: int = -100,
    num_threads: int = 1,
    out: _Logits | None = None,
) -> _Logits: ...
def auc(scores: _Real, labels: NDArray[np.bool_]) -> float: ...
def roc(
    scores: _Real, labels: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]: ...
def openmp_max_threads() -> int: ...
def simd_level() -> Literal["baseline", "x86-64-v3", "x86-64-v4"]: ...
