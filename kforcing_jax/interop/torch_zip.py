"""Files of torch.save, read without torch, and without running what a file says.

Such a file is a zip archive: a pickle that describes nested containers and tensors, and one raw file per storage. The
pickle is read by an unpickler that imports nothing. It knows tensors; names of packages that training checkpoints are
full of (configs, tokenizers, paths) become placeholders that do nothing; every other name is refused. So opening a file
from a stranger cannot run anything. Storages are read when their tensor is asked for, and only then.
"""

import contextlib
import functools
import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from kforcing_jax.errors import UserError

_DTYPES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}

# Training checkpoints are full of objects of these. Nothing of them is imported: the list only says what to expect.
_INERT_PACKAGES = {
    *("lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "torch", "torchmetrics", "numpy"),
    *("omegaconf", "tokenizers", "transformers", "regex", "_regex_core", "re", "_codecs", "copyreg", "copy_reg"),
    *("argparse", "collections", "datetime", "decimal", "enum", "fractions", "pathlib", "typing", "uuid"),
}
_INERT_BUILTINS = {
    *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set"),
    *("slice", "str", "tuple", "type", "Ellipsis", "NotImplemented"),
    *("long", "unicode", "xrange"),  # torch.save writes the names of Python 2
}
_INERT_NAMES = {"operator.getitem", "_operator.getitem"}  # typing.Optional[int] is pickled as such a call

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP_MAGIC = b"PK\x03\x04"


class CheckpointFormatError(UserError, ValueError):
    """The file is not such a checkpoint, or holds something that is not safe to read."""


@contextlib.contextmanager
def damage_reported() -> Iterator[None]:
    """What is raised in this context becomes CheckpointFormatError: a damaged pickle or storage can raise anything."""
    try:
        yield
    except (CheckpointFormatError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointFormatError(f"damaged checkpoint ({type(error).__name__}: {error})") from None


class Storage(NamedTuple):
    """A raw file of an open archive: `length` numbers in a row."""

    archive: zipfile.ZipFile
    name: str
    dtype: np.dtype  # of the file, byte order included
    length: int

    def read(self) -> np.ndarray:
        """All of its numbers, (length,). Raises CheckpointFormatError where the file is shorter."""
        size = self.length * self.dtype.itemsize
        with self.archive.open(self.name) as file:
            raw = file.read(size)
        if len(raw) < size:
            raise CheckpointFormatError(f"storage {self.name.rpartition('/')[2]} is cut short")
        return np.frombuffer(raw, self.dtype, self.length)


class StoredTensor(NamedTuple):
    """A tensor of an open file. `read` gives a copy of it, and raises CheckpointFormatError where it is damaged."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def _read_view(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Strides are in numbers, as torch counts."""
    with damage_reported():
        # The numbers come from the file, and as_strided trusts them.
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        is_inside = 0 <= offset <= last < storage.length and min(strides, default=0) >= 0
        if min(shape, default=1) > 0 and not is_inside:
            raise CheckpointFormatError(f"a tensor of shape {shape} reaches outside its storage")
        numbers = storage.read()
        bytes_apart = [stride * numbers.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(numbers[offset:], shape, bytes_apart, writeable=False)
        return view.astype(numbers.dtype.newbyteorder("="), order="C")


class Placeholder:
    """Stands for an object that is not a tensor: takes every call that unpickling makes, keeps only its name."""

    __slots__ = ()
    full_name = ""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, item: object) -> None:
        """Takes what a pickle puts in, and forgets it."""

    extend = add = append


class _Dict(dict):
    """An OrderedDict without the attributes that the file gives it (torch keeps module versions there)."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


# Classes, not functions: a pickle can set the attributes of a function that it is given.
class _RebuiltTensor(Placeholder):
    __slots__ = ()

    def __new__(cls, storage, offset, shape, strides, *unused):
        if not isinstance(storage, Storage):
            return storage  # the placeholder of a kind of storage that numpy does not have
        if not all(type(number) is int for number in (offset, *shape, *strides)):
            raise CheckpointFormatError("a tensor whose shape is not made of integers")
        shape, strides = tuple(shape), tuple(strides)
        return StoredTensor(shape, functools.partial(_read_view, storage, offset, shape, strides))


class _RebuiltParameter(Placeholder):
    __slots__ = ()

    def __new__(cls, tensor, *unused):
        return tensor


_KNOWN = {
    "collections.OrderedDict": _Dict,
    "torch._utils._rebuild_tensor_v2": _RebuiltTensor,
    "torch._utils._rebuild_parameter": _RebuiltParameter,
    "torch._utils._rebuild_parameter_with_state": _RebuiltParameter,
}


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[object]:
    """The content of a file of torch.save, while it is open: containers whose tensors are `StoredTensor`s.

    What is neither a container, a number or a text nor a tensor is a `Placeholder`.

    Raises:
      CheckpointFormatError: no such file, not a file of torch.save, or a name in it that is refused.
    """
    with _open_archive(path) as archive:
        yield _content(archive)


def describe(value: object) -> str:
    """What stands in the place of something else, in words for an error message."""
    if isinstance(value, Placeholder):
        return value.full_name
    if isinstance(value, type) and issubclass(value, Placeholder):
        return value.full_name
    if isinstance(value, StoredTensor):
        return "a tensor"
    return "dict" if isinstance(value, dict) else type(value).__name__


def _open_archive(path):
    with damage_reported():
        try:
            return zipfile.ZipFile(path)
        except zipfile.BadZipFile:
            raise CheckpointFormatError(_why_no_archive(path)) from None
        except OSError as error:
            raise CheckpointFormatError(f"cannot be read: {error.strerror or error}") from None


def _why_no_archive(path) -> str:
    with open(path, "rb") as file:
        start = file.read(40)
    if not start:
        return "the file is empty"
    if start.startswith(_ZIP_MAGIC):
        return "the file is cut short or damaged (a zip archive without its end); copy or download it again"
    if start.startswith(_LEGACY_MAGIC):
        return "written in the format before torch 1.6; load it with torch and torch.save it again"
    is_text = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start)
    return "not a file of torch.save or safetensors" + (f" but text: {start.decode()!r}" if is_text else "")


def _content(archive):
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointFormatError("a zip archive without a data.pkl, so not a torch checkpoint")
    with damage_reported():
        return _Unpickler(archive, pickles[0].removesuffix("data.pkl")).load()


class _Unpickler(pickle.Unpickler):
    """Rebuilds plain containers and descriptions of tensors, and imports nothing."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        pickled = archive.read(root + "data.pkl")
        _check_sizes(pickled)
        super().__init__(io.BytesIO(pickled))
        self._archive, self._root = archive, root
        order_file = root + "byteorder"
        big = order_file in archive.namelist() and archive.read(order_file) == b"big"
        self._byte_order = ">" if big else "<"

    def find_class(self, module, name):
        # In one line and without control characters, because messages show it.
        full_name = f"{module}.{name}".encode("unicode_escape").decode()[:200]
        if full_name in _KNOWN:
            return _KNOWN[full_name]
        if not _is_inert(module, name):
            raise CheckpointFormatError(f"holds {full_name}, which is not a tensor; refusing to unpickle it")
        return type("Placeholder", (Placeholder,), {"__slots__": (), "full_name": full_name})

    def persistent_load(self, pid):
        kind, storage_type, key, _, count = pid
        if kind != "storage" or not issubclass(storage_type, Placeholder) or type(count) is not int or count < 0:
            raise CheckpointFormatError("unknown storage")
        dtype = _DTYPES.get(storage_type.full_name)
        if dtype is None:
            return storage_type()
        return Storage(self._archive, f"{self._root}data/{key}", dtype.newbyteorder(self._byte_order), count)


def _check_sizes(pickled: bytes):
    """The unpickler makes room for any length and memo index that a pickle names, before it finds out better."""
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name.endswith("PUT") and argument is not None and argument > len(pickled):
            raise CheckpointFormatError("damaged checkpoint (a memo index beyond its size)")


def _is_inert(module, name) -> bool:
    if module in ("builtins", "__builtin__"):
        return name in _INERT_BUILTINS
    return module.split(".")[0] in _INERT_PACKAGES or f"{module}.{name}" in _INERT_NAMES
