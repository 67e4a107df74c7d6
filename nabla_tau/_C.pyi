from typing import Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

_Logits = TypeVar("_Logits", NDArray[np.float32], NDArray[np.float64], NDArray[np.float16], NDArray[np.uint16])
_Real: TypeAlias = NDArray[np.float32] | NDArray[np.float64]
# loss, lse, entropy, margin, p_max, grad_sq, correct
_Signals: TypeAlias = tuple[_Real, _Real, _Real, _Real, _Real, _Real, NDArray[np.bool_]]

def rows_forward(
    logits: _Logits,
    targets: NDArray[np.int64],
    ignore_index: int = -100,
    num_threads: int = 1,
    label_smoothing: float = 0.0,
    class_weights: _Real | None = None,
) -> _Signals: ...
def rows_backward(
    logits: _Logits,
    targets: NDArray[np.int64],
    lse: _Real,
    margin: _Real,
    weights: _Real,
    ignore_index: int = -100,
    num_threads: int = 1,
    label_smoothing: float = 0.0,
    class_weights: _Real | None = None,
    out: _Logits | None = None,
) -> _Logits: ...
def rows_gradient(
    logits: _Logits,
    targets: NDArray[np.int64],
    weights: _Real | None = None,
    ignore_index: int = -100,
    num_threads: int = 1,
    label_smoothing: float = 0.0,
    class_weights: _Real | None = None,
    out: _Logits | None = None,
) -> tuple[_Real, _Real, _Real, _Real, _Real, _Real, NDArray[np.bool_], _Logits]: ...
def rows_mean(
    logits: _Logits,
    targets: NDArray[np.int64],
    weight: float = 1.0,
    base: _Real | None = None,
    samples: float | None = None,
    ignore_index: int = -100,
    num_threads: int = 1,
    label_smoothing: float = 0.0,
    class_weights: _Real | None = None,
) -> tuple[_Real, _Logits]: ...
def nabla_tau_rows(
    logits: _Logits,
    targets: NDArray[np.int64],
    forget: NDArray[np.bool_],
    tau: float,
    alpha: float,
    gate: Literal["batch", "two_sided", "sample"] = "batch",
    power: int = 2,
    base: _Real | None = None,
    forget_count: float = 0.0,
    retain_count: float = 0.0,
    ignore_index: int = -100,
    num_threads: int = 1,
    label_smoothing: float = 0.0,
    class_weights: _Real | None = None,
    with_gradient: bool = True,
) -> tuple[_Real, _Real, _Signals, _Logits | None]: ...
def multilabel_forward(logits: _Logits, targets: _Real, num_threads: int = 1) -> _Signals: ...
def multilabel_backward(
    logits: _Logits, targets: _Real, weights: _Real, num_threads: int = 1, out: _Logits | None = None
) -> _Logits: ...
def roc(
    scores: _Real, labels: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]: ...
def openmp_max_threads() -> int: ...
def simd_level() -> Literal["baseline", "x86-64-v3", "x86-64-v4"]: ...
def placements(members: _Real, nonmembers: _Real) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def bootstrap(
    members: list[_Real],
    nonmembers: list[_Real],
    allowed_false: list[int],
    replicates: int,
    seed: int,
    num_threads: int = 1,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def class_thresholds(
    scores: _Real, labels: NDArray[np.bool_], classes: NDArray[np.int64], n_classes: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]: ...

_Floats: TypeAlias = NDArray[np.float16] | NDArray[np.float32] | NDArray[np.float64]
_Group: TypeAlias = NDArray[np.bool_] | NDArray[np.uint8]
_Moments: TypeAlias = tuple[
    NDArray[np.int32], NDArray[np.float64], NDArray[np.float64] | None, NDArray[np.float64] | None
]

def group_moments(
    scores: _Floats,
    group: _Group,
    limit: tuple[int, int] = (-1, -1),
    joint: bool = False,
    sigmoid: bool = False,
    squares: bool = True,
    known: _Moments | None = None,
    num_threads: int = 1,
) -> _Moments: ...
def group_medians(
    scores: _Floats, group: _Group, limit: tuple[int, int] = (-1, -1), joint: bool = False, num_threads: int = 1
) -> NDArray[np.float64]: ...
def forgetting_epsilon(
    unlearned: _Floats, retrained: _Floats, exact: bool, delta: float, cap: float = 50.0, num_threads: int = 1
) -> NDArray[np.float64]: ...
def klom(
    unlearned: _Floats,
    retrained: _Floats,
    bins: int = 20,
    clip: float = 100.0,
    floor: float = 1e-5,
    open_top: bool = False,
    num_threads: int = 1,
) -> NDArray[np.float64]: ...

UPDATE_COLUMNS: tuple[str, ...]
_Dtype: TypeAlias = Literal["float32", "float64", "float16", "bfloat16"]

def adamw(
    table: NDArray[np.int64],
    dtype: _Dtype,
    forget_scale: float,
    retain_scale: float,
    noise: tuple[float, int, int] | None = None,
    num_threads: int = 1,
) -> None: ...
def sgd(
    table: NDArray[np.int64],
    dtype: _Dtype,
    forget_scale: float,
    retain_scale: float,
    noise: tuple[float, int, int] | None = None,
    num_threads: int = 1,
) -> None: ...
def gradient_products(table: NDArray[np.int64], dtype: _Dtype, num_threads: int = 1) -> list[float]: ...
def squared_distance(table: NDArray[np.int64], dtype: _Dtype, num_threads: int = 1) -> float: ...
def pull(table: NDArray[np.int64], dtype: _Dtype, factor: float, num_threads: int = 1) -> None: ...
