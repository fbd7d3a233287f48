"""GGUF files (of llama.cpp and its like): what they say, and their tensors, read by the package `gguf`."""

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kforcing_jax.errors import DataError

ENDING = ".gguf"
_MAGIC = b"GGUF"


class GgufTensor(NamedTuple):
    """A tensor of a file, in whatever type it is kept."""

    kind: Any  # a gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # as torch has it: a matrix is (out, in)
    data: np.ndarray  # mapped: numbers, or bytes of blocks of the last axis

    def rows(self, rows: slice = slice(None)) -> np.ndarray:
        """Rows of the first axis, as f32 unless they are f16."""
        import gguf

        data = self.data[rows]
        return data if data.dtype in (np.float32, np.float16) else gguf.dequantize(data, self.kind)

    @property
    def is_readable(self) -> bool:
        """Whether the package can turn this type into numbers."""
        import gguf

        if self.kind.name in ("F32", "F16"):
            return True
        one_block = np.zeros((1, gguf.GGML_QUANT_SIZES[self.kind][1]), np.uint8)
        try:
            return gguf.dequantize(one_block, self.kind).size > 0
        except NotImplementedError:
            return False


class GgufFile(NamedTuple):
    """What a file says by name, and its tensors by name."""

    values: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its ending or by how it begins."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ENDING:
        return True
    try:
        with open(path, "rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False  # said by who opens it next


def read_gguf(path: Path) -> GgufFile:
    """What is in a file; its tensors are mapped, not read.

    Raises:
      DataError: it cannot be read, is damaged or cut short, or the package is not installed.
    """
    if not importlib.util.find_spec("gguf"):
        raise DataError(f"{path} is read by the package gguf, which is not installed; pip install gguf")
    try:
        there = path.stat()
        return _read(path, there.st_size, there.st_mtime_ns)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # the package raises many kinds for a file that ends early
        raise DataError(
            f"{path} is damaged, cut short or no GGUF file ({' '.join(str(error).split())[:150]})"
        ) from None


@functools.lru_cache(maxsize=1)  # reading a vocabulary takes seconds, and several ask for the same file
def _read(path, size, changed) -> GgufFile:
    del size, changed
    import gguf

    reader = gguf.GGUFReader(path)
    if reader.byte_order != "I":
        raise DataError(f"{path} is in another byte order than this machine's")
    values = {name: _value(field) for name, field in reader.fields.items()}
    if values.get("split.count", 1) > 1:
        raise DataError(f"{path} is one of {values['split.count']} parts; join them with llama-gguf-split --merge")
    tensors = {
        tensor.name: GgufTensor(tensor.tensor_type, tuple(map(int, reversed(tensor.shape))), tensor.data)
        for tensor in reader.tensors
    }
    return GgufFile(values, tensors)


def _value(field):
    """What a field holds; an f32 as the shortest number that it stands for, 1e-05 and not 9.999999747e-06."""
    value = field.contents()
    return float(str(np.float32(value))) if [kind.name for kind in field.types] == ["FLOAT32"] else value
