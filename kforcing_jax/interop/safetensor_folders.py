"""The safetensors files of a folder, with or without an index, as one set of tensors that are read where they lie."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from kforcing_jax.interop.torch_zip import CheckpointFormatError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Longer ones are damage: the library has the same limit.
_LONGEST_HEADER = 100_000_000
# Weights in other layouts, which are not read.
_OTHERS = ("*.bin", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.onnx")


class Tensor(NamedTuple):
    """Where a tensor lies in a file."""

    file: Path
    dtype: str  # as safetensors call it
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def is_readable(self) -> bool:
        """Whether its numbers are of a floating type of 16 bits or more."""
        return self.dtype in _DTYPES

    def rows(self, rows: slice = slice(None)) -> np.ndarray:
        """Rows of its first axis, not read before they are looked at. Raises CheckpointFormatError."""
        try:
            return np.memmap(self.file, _DTYPES[self.dtype], "r", self.start, self.shape)[rows]
        except (OSError, ValueError) as error:
            raise CheckpointFormatError(f"{self.file} cannot be read: {error}") from None


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name: of its one file, or else those that an index names, or of all its files.

    Raises:
      CheckpointFormatError: there are none, a file is missing, cut short or damaged, or two have a tensor of one name.
    """
    index, whole = folder / INDEX, folder / WEIGHTS
    if index.is_file() and not whole.is_file():
        return _indexed(folder, _weight_map(index))
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for pattern in _OTHERS for path in folder.glob(pattern))
        hint = f"; {others[0]} is of another layout: save it as safetensors" if others else ""
        raise CheckpointFormatError(f"{folder} has no weights: neither {WEIGHTS} nor any other *.safetensors{hint}")
    found: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_header(file)[0].items():
            if name in found:
                raise CheckpointFormatError(f"{name} is in {found[name].file.name} and in {file.name} of {folder}")
            found[name] = tensor
    return found


def _weight_map(index) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ValueError("weight_map should say the file of every tensor")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{index} is no index of safetensors ({error})") from None
    for file in files.values():
        if Path(file).name != file:
            raise CheckpointFormatError(f"{index} names {file!r}, which is not a file beside it")
    return files


def _indexed(folder, files: Mapping[str, str]) -> dict[str, Tensor]:
    names = sorted(set(files.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        several = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointFormatError(f"{folder}: {missing[0]}{several} of {len(names)} is missing, {INDEX} names it")
    headers = {name: read_header(folder / name)[0] for name in names}
    found: dict[str, Tensor] = {}
    for name, file in files.items():
        if name not in headers[file]:
            raise CheckpointFormatError(f"{folder}: {file} has no {name}, {INDEX} says that it has")
        found[name] = headers[file][name]
    return found


def read_header(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, notes) of a file. Raises CheckpointFormatError when it is damaged or cut short."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise CheckpointFormatError(f"{file} is cut short, or no safetensors file")
            header = json.loads(opened.read(length))
        notes = header.pop("__metadata__", None) or {}
        if not isinstance(notes, dict):
            raise ValueError("its notes are no object")
        tensors = dict(_tensors(file, header, 8 + length))
    except OSError as error:
        raise CheckpointFormatError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointFormatError):
            raise
        raise CheckpointFormatError(f"{file} is damaged, or no safetensors file ({error})") from None
    end = max((tensor.stop for tensor in tensors.values()), default=0)
    if end > size:
        raise CheckpointFormatError(f"{file} is cut short: {size:,} bytes of {end:,}; copy or download it again")
    return tensors, notes


def _tensors(file, header, offset) -> Iterator[tuple[str, Tensor]]:
    for name, said in header.items():
        shape, (start, stop) = tuple(said["shape"]), said["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise ValueError(f"the place of {name} is not made of numbers")
        dtype = _DTYPES.get(said["dtype"])
        if dtype is not None and stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has not as many bytes as its shape says")
        yield name, Tensor(file, said["dtype"], shape, offset + start, offset + stop)
