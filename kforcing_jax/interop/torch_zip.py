"""Files of torch.save, read and written without torch, and without running what a file says.

Such a file is a zip archive: a pickle that describes nested containers and tensors, and one raw file per storage. The
pickle is read by an unpickler that imports nothing. It knows tensors; names of packages that training checkpoints are
full of (configs, tokenizers, paths) become placeholders that do nothing; every other name is refused. So opening a file
from a stranger cannot run anything. Storages are read when their tensor is asked for, and only then.
"""

import contextlib
import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from kforcing_jax.data.whole_file import whole_file
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
_STORAGES = {dtype: name for name, dtype in _DTYPES.items()}

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

_ROOT = "archive/"
_ALIGNMENT = 64
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP_MAGIC = b"PK\x03\x04"


class CheckpointFormatError(UserError, ValueError):
    """The file is not such a checkpoint, or holds something that is not safe to read."""


class Storage(NamedTuple):
    """A raw file of an open archive: `count` numbers in a row."""

    archive: zipfile.ZipFile
    name: str
    dtype: np.dtype  # of the file, byte order included
    count: int

    def read(self) -> np.ndarray:
        size = self.count * self.dtype.itemsize
        with self.archive.open(self.name) as file:
            raw = file.read(size)
        if len(raw) < size:
            raise CheckpointFormatError(f"storage {self.name.rpartition('/')[2]} is cut short")
        return np.frombuffer(raw, self.dtype, self.count)


class StoredTensor(NamedTuple):
    """A tensor of an open archive: a view of a storage, which is read when the tensor is."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers, as torch counts

    def read(self) -> np.ndarray:
        """A copy of the tensor. Raises CheckpointFormatError when it is damaged or reaches outside its storage."""
        with _damage_reported():
            self._check_bounds()
            storage = self.storage.read()
            strides = [stride * storage.itemsize for stride in self.strides]
            view = np.lib.stride_tricks.as_strided(storage[self.offset :], self.shape, strides, writeable=False)
            return view.astype(storage.dtype.newbyteorder("="), order="C")

    def _check_bounds(self):
        """The numbers come from the file, and as_strided trusts them."""
        steps = [(size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)]
        is_inside = 0 <= self.offset <= self.offset + sum(steps) < self.storage.count
        if min(self.shape, default=1) > 0 and not (is_inside and min(self.strides, default=0) >= 0):
            raise CheckpointFormatError(f"a tensor of shape {self.shape} reaches outside its storage")


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

    def append(self, item):
        pass

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
        return StoredTensor(storage, offset, tuple(shape), tuple(strides))


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
      CheckpointFormatError: no such file, not a file of torch.save, or a name in it that is refused. Its message, and
        that of any CheckpointFormatError raised while the file is open, begins with the path.
    """
    try:
        with _open_archive(path) as archive:
            yield _content(archive)
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{path}: {' '.join(str(error).split())}") from None


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
    with _damage_reported():
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
    expected = "not a torch zip checkpoint (expected a file written by torch.save"
    is_text = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start)
    return expected + (f", found text: {start.decode()!r})" if is_text else ")")


def _content(archive):
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointFormatError("a zip archive without a data.pkl, so not a torch checkpoint")
    with _damage_reported():
        return _Unpickler(archive, pickles[0].removesuffix("data.pkl")).load()


@contextlib.contextmanager
def _damage_reported():
    """A damaged pickle or storage can raise anything."""
    try:
        yield
    except (CheckpointFormatError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointFormatError(f"damaged checkpoint ({type(error).__name__}: {error})") from None


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
        if operation.name.endswith("PUT") and argument > len(pickled):
            raise CheckpointFormatError("damaged checkpoint (a memo index beyond its size)")


def _is_inert(module, name) -> bool:
    if module in ("builtins", "__builtin__"):
        return name in _INERT_BUILTINS
    return module.split(".")[0] in _INERT_PACKAGES or f"{module}.{name}" in _INERT_NAMES


def write(path: str | Path, content: dict):
    """Writes nested dicts of arrays, texts and integers as torch.save does: `torch.load(weights_only=True)` reads it.

    Storages are little-endian, uncompressed and aligned to 64 bytes. The file appears under its name when it is whole.

    Raises:
      OSError: it cannot be written; nothing is left behind.
      TypeError: content of another kind.
    """
    with whole_file(Path(path)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _write_content(archive, content)


def _write_content(archive, content):
    arrays = []
    _add(archive, "data.pkl", b"\x80\x02" + _pickled(content, arrays) + b".")
    _add(archive, ".format_version", b"1")
    _add(archive, ".storage_alignment", str(_ALIGNMENT).encode())
    _add(archive, "byteorder", b"little")
    for i, array in enumerate(arrays):
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        _add(archive, f"data/{i}", little.reshape(-1).view(np.uint8))
    _add(archive, "version", b"3\n")


def _add(archive, name, data):
    """Adds a file whose data begins at a multiple of the alignment, as torch pads it: by an extra field "FB"."""
    info = zipfile.ZipInfo(_ROOT + name)
    info.file_size = len(data)
    # The field of sizes beyond 32 bits, which zipfile adds by this rule.
    long_sizes = 20 if len(data) * 1.05 > zipfile.ZIP64_LIMIT else 0
    begin = archive.fp.tell() + zipfile.sizeFileHeader + len(info.filename) + long_sizes + 4
    padding = -begin % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + padding * b"Z"
    with archive.open(info, "w") as file:
        file.write(data)


def _pickled(value, arrays) -> bytes:
    """The operations of a pickle that give `value`; its arrays are appended to `arrays`, a storage each."""
    if isinstance(value, dict):
        items = [_pickled(key, arrays) + _pickled(item, arrays) for key, item in value.items()]
        return b"}(" + b"".join(items) + b"u"
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return _pickled_tensor(value, str(len(arrays) - 1))
    if type(value) in (str, int):
        return _plain(value)
    raise TypeError(f"cannot write {type(value).__name__} into a checkpoint")


def _pickled_tensor(array, key) -> bytes:
    storage_type = _STORAGES.get(array.dtype.newbyteorder("="))
    if storage_type is None:
        raise TypeError(f"cannot write an array of {array.dtype} into a checkpoint")
    strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    storage = _tuple(_plain("storage"), _name(storage_type), _plain(key), _plain("cpu"), _plain(array.size)) + b"Q"
    hooks = _name("collections.OrderedDict") + b")R"
    view = _tuple(storage, _plain(0), _plain(array.shape), _plain(strides), _plain(False), hooks)
    return _name("torch._utils._rebuild_tensor_v2") + view + b"R"


def _plain(value) -> bytes:
    """The operations of a text, number or tuple of numbers, without the pickle's header and end."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _name(full_name) -> bytes:
    module, _, attribute = full_name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _tuple(*parts) -> bytes:
    return b"(" + b"".join(parts) + b"t"
