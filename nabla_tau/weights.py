"""Weight files: safetensors, or .pt read without unpickling code; written atomically, never over another file."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from nabla_tau.checkpoint import write_atomic


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into a model on the CPU.

    Raises FileNotFoundError; ValueError for a damaged file, a pickle of anything but tensors, or weights that do not
    fit the model (naming what differs). The model is left as it was.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}" + ", it is a folder" * path.is_dir())
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    different = [
        f"{name}: {_described(state[name])} in the file, {_described(own[name])} in the model"
        for name in sorted(own.keys() & state.keys())
        if not _fits(state[name], own[name])
    ]
    if missing or extra or different:
        parts = [f"missing {missing[:5]}"] * bool(missing) + [f"unknown {extra[:5]}"] * bool(extra) + different[:5]
        raise ValueError(f"the weights in {path} do not fit the model: {'; '.join(parts)}")
    model.load_state_dict(state)


def _fits(found: Tensor, own: Tensor) -> bool:
    """Whether nothing but precision is lost when one is copied to the other."""
    kinds = [(t.is_floating_point(), t.is_complex(), t.is_quantized, t.layout) for t in (found, own)]
    return found.shape == own.shape and kinds[0] == kinds[1] and not found.is_meta


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("reading .safetensors needs safetensors: pip install 'nabla_tau[cli]'") from error
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds pickled objects, not only tensors; it is not loaded, since that would run code from it. "
            "Save the state dict (model.state_dict()), best as safetensors"
        ) from error
    except Exception as error:  # a damaged file ends in any error that its bytes happen to lead to
        raise ValueError(f"{path} is not a whole weight file: {type(error).__name__} {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a state dict of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} holds a {type(value).__name__} as {name!r}, expected a state dict of tensors")
    return state


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state dict as safetensors. Raises what `check_new_weights` raises."""
    check_new_weights(path)
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError("writing .safetensors needs safetensors: pip install 'nabla_tau[cli]'") from error
    # A copy each: safetensors refuses tensors that share memory, as tied weights do.
    write_atomic(path, save({name: value.detach().cpu().clone() for name, value in model.state_dict().items()}))


def check_new(path: Path) -> None:
    """Raise FileExistsError for an output that exists already."""
    if path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten: choose another name or remove it")


def check_new_weights(path: Path) -> None:
    """Raise FileExistsError or ValueError for a path that `save_weights` would refuse."""
    check_new(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"weights are written as .safetensors, got {path}")
