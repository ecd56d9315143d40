"""The tensors of one safetensors file or of a directory of them: names first, bytes only when asked for.

Files are memory-mapped by safetensors; opening reads headers only. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from glu4.errors import CheckpointError

__all__ = ["TensorFiles", "read_json"]

INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_JSON_BYTES = 256 * 2**20  # the largest real index (a million tensors) stays below this


class TensorFiles:
    """A read-only mapping from tensor name to tensor over one or several safetensors files.

    path  a .safetensors file, or a directory with model.safetensors.index.json or any *.safetensors files
    Raises CheckpointError, naming the file and the remedy, for anything that cannot be read without doubt.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.notes: list[str] = []
        self._handles: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    # ---- opening ----

    def _open(self) -> None:
        if self.path.is_file():
            if self.path.suffix != ".safetensors":
                raise CheckpointError(f"{self.path}: expected a .safetensors file; {_refused_kind(self.path)}")
            self.root = self.path.parent
            self._add_shard(self.path.name)
            return
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such file or directory; give a .safetensors file or a model directory")
        self.root = self.path
        if (self.root / INDEX).exists():
            self._open_index()
            return
        shards = sorted(p.name for p in self.root.glob("*.safetensors"))
        if not shards:
            raise CheckpointError(_nothing_to_read(self.root))
        for shard in shards:
            self._add_shard(shard)

    def _open_index(self) -> None:
        document = read_json(self.root / INDEX)
        weight_map = document.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{self.root / INDEX}: expected a non-empty weight_map from tensor names to file names")
        for shard in sorted(set(weight_map.values())):
            if PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts or "\\" in shard or "\0" in shard:
                raise CheckpointError(
                    f"{self.root / INDEX}: shard {shard!r} lies outside the directory; the index is not to be trusted"
                )
            if not (self.root / shard).is_file():
                raise CheckpointError(f"{self.root / INDEX} names shard {shard}, which is not there; download it again")
            self._add_shard(shard)
        for name, shard in weight_map.items():
            if self._where.get(name) != shard:
                raise CheckpointError(
                    f"{self.root / INDEX} puts tensor {name} in {shard}, which does not hold it; the index and the shards "
                    "are of different exports, download both again"
                )
        extra = [name for name in self._where if name not in weight_map]
        if extra:
            self.notes.append(f"{len(extra)} tensors are in the shards but not in {INDEX}, such as {extra[0]}")

    def _add_shard(self, shard: str) -> None:
        from safetensors import safe_open

        file = self.root / shard
        with _readable(file):
            handle = safe_open(str(file), framework="pt", device="cpu")
        self._handles[shard] = handle
        names: list[str] = list(handle.keys())  # type: ignore[no-untyped-call]
        for name in names:
            if name in self._where:
                raise CheckpointError(
                    f"{file}: tensor {name} is in {self._where[name]} too; remove the file that does not belong here"
                )
            self._where[name] = shard

    def close(self) -> None:
        """Drop the file handles; tensors already loaded stay valid."""
        self._handles.clear()

    # ---- reading ----

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor; raises CheckpointError when there is none."""
        if name not in self._where:
            raise CheckpointError(f"{self.path}: no tensor {name}")
        return self.root / self._where[name]

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype as safetensors spells it, shape) from the header alone."""
        file, handle = self.file_of(name), self._handle(name)
        with _readable(file, name):
            view = handle.get_slice(name)
            return str(view.get_dtype()), tuple(int(n) for n in view.get_shape())

    def load(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        file, handle = self.file_of(name), self._handle(name)
        with _readable(file, name):
            tensor: Tensor = handle.get_tensor(name)
            return tensor

    def _handle(self, name: str) -> Any:
        if not self._handles:
            raise ValueError(f"{self.path}: this checkpoint is closed; open it again")
        return self._handles[self._where[name]]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointError when it is missing, too large, or anything else."""
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes are too many for a JSON description; the file is damaged")
        document = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(document).__name__}; download it again")
    return document


@contextmanager
def _readable(file: Path, name: str | None = None) -> Iterator[None]:
    """Turn whatever safetensors raises on a damaged file into one CheckpointError; our own errors pass."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        part = f", tensor {name}" if name else ""
        raise CheckpointError(f"{file}{part}: cannot be read as safetensors ({error}); download the file again") from error


def _refused_kind(file: Path) -> str:
    if any(file.match(pattern) for pattern in _PICKLES):
        return "a pickle can run code when it is opened, so glu4 never opens one; convert it to safetensors"
    return f"{file.suffix or 'a file without suffix'} is not read here"


def _nothing_to_read(root: Path) -> str:
    pickles = sorted(p.name for pattern in _PICKLES for p in root.glob(pattern))
    if pickles:
        return (
            f"{root}: holds no .safetensors, only pickles such as {pickles[0]}; a pickle can run code when it is opened, so "
            "glu4 never opens one; convert it to safetensors"
        )
    ggufs = sorted(p.name for p in root.glob("*.gguf"))
    if ggufs:
        return f"{root}: holds no .safetensors; GGUF files such as {ggufs[0]} are another format, which glu4 does not read"
    return f"{root}: holds no .safetensors file; give the directory of a model in safetensors form"
