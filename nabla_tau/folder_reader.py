"""Reading what torch.distributed.checkpoint wrote, without running code from it.

PyTorch keeps the index of such a folder as a pickle, and unpickles whatever is no tensor. Here the index may hold only
the classes that PyTorch puts there, and everything else is read with weights_only=True.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_METADATA = (
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "_MEM_FORMAT_ENCODING",
)
_KNOWN = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _KNOWN and not is_dtype:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint does")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """Of a folder; ValueError for an index that is damaged or holds anything that does not belong there."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        try:
            with self.fs.create_stream(self._get_metadata_path(options.get("rank")), "rb") as stream:
                index = _Index(stream).load()
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"the index of {self.path} is not read: {type(error).__name__} {error}") from error
        if not isinstance(index, Metadata):
            raise ValueError(f"the index of {self.path} is a {type(index).__name__}")
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class Planner(DefaultLoadPlanner):
    """Of values that are no tensors, those that weights_only=True takes: numbers, strings, tuples, dicts."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
