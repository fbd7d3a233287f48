"""Files with the layout of torch.save, made without torch, and the tensors of a released model."""

import pickle
import zipfile
from typing import NamedTuple

import numpy as np


class Tensor(NamedTuple):
    """A tensor as a torch checkpoint describes it: a view of a numbered storage."""

    storage: str
    count: int
    offset: int
    shape: tuple
    strides: tuple
    kind: str = "FloatStorage"


class Parameter(NamedTuple):
    """A tensor in the wrapping of torch.nn.Parameter, by the constructor of that name."""

    tensor: Tensor
    constructor: str


class Object(NamedTuple):
    """What a pickle makes of a name: called with nothing, then given a state, items and list items."""

    module: str
    name: str


def global_name(module, name):
    return b"c" + f"{module}\n{name}\n".encode()


def pickled(value):
    """The operations that torch.save writes for a value."""
    if isinstance(value, Tensor):
        return _pickled_tensor(value)
    if isinstance(value, Parameter):
        more = [_plain({})] if value.constructor.endswith("with_state") else []
        args = _tuple(_pickled_tensor(value.tensor), _plain(True), _plain({}), *more)
        return global_name("torch._utils", value.constructor) + args + b"R"
    if isinstance(value, Object):
        made = global_name(value.module, value.name) + b")R"
        return made + b"}b" + b"(I1\nI2\nu" + b"(I1\ne" + b"I1\na"
    if isinstance(value, dict):
        return b"}(" + b"".join(pickled(key) + pickled(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(pickled, value)) + b"e"
    return _plain(value)


def _pickled_tensor(value):
    storage = _tuple(
        _plain("storage"), global_name("torch", value.kind), *map(_plain, (value.storage, "cpu", value.count))
    )
    args = [storage + b"Q", *map(_plain, (value.offset, value.shape, value.strides, False))]
    hooks = global_name("collections", "OrderedDict") + b")R"
    return global_name("torch._utils", "_rebuild_tensor_v2") + _tuple(*args, hooks) + b"R"


def _plain(value):
    """Pickle operations that push a value, without the header and the stop."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _tuple(*parts):
    return b"(" + b"".join(parts) + b"t"


def write_archive(path, files, storages=None, byteorder="little"):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"archive/{name}", data)
        archive.writestr("archive/byteorder", byteorder)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def write_checkpoint(path, content, storages=None, byteorder="little"):
    """An archive whose pickle describes `content`."""
    return write_archive(path, {"data.pkl": b"\x80\x02" + pickled(content) + b"."}, storages, byteorder)


def described(arrays, first_storage=0):
    """(descriptions, storages) of arrays, by name, for `write_checkpoint`."""
    keys = {name: str(i) for i, name in enumerate(arrays, first_storage)}
    tensors = {name: contiguous(keys[name], array) for name, array in arrays.items()}
    return tensors, {keys[name]: array.tobytes() for name, array in arrays.items()}


def contiguous(storage, array):
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Tensor(storage, array.size, 0, array.shape, strides)


def released_tensors(vocab=7, d=4, heads=1, layers=2, student=True, prefix="backbone."):
    """A random state dict with the names, the order and the shapes of the released models."""
    shapes = {"vocab_embed.embedding": (vocab, d), "rotary_emb.inv_freq": (d // heads // 2,)}
    for i in range(layers):
        block = f"blocks.{i}."
        shapes |= {block + "norm1.weight": (d,)}
        shapes |= {block + "attn_qkv.weight": (3 * d, d), block + "attn_out.weight": (d, d)}
        shapes |= {block + "norm2.weight": (d,)}
        shapes |= {block + "mlp.0.weight": (4 * d, d), block + "mlp.0.bias": (4 * d,)}
        shapes |= {block + "mlp.2.weight": (d, 4 * d), block + "mlp.2.bias": (d,)}
    if student:
        encoder = "noise_encoder."
        shapes |= {encoder + "combined_proj.weight": (d, 2 * d), encoder + "combined_proj.bias": (d,)}
        shapes |= {encoder + "norm.weight": (d,), encoder + "norm.bias": (d,)}
        shapes |= {encoder + "mlp.0.weight": (4 * d, d), encoder + "mlp.0.bias": (4 * d,)}
        shapes |= {encoder + "mlp.2.weight": (d, 4 * d), encoder + "mlp.2.bias": (d,)}
    shapes |= {"output_layer.norm_final.weight": (d,)}
    shapes |= {"output_layer.linear.weight": (vocab, d), "output_layer.linear.bias": (vocab,)}
    rng = np.random.default_rng(0)
    tensors = {prefix + name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    half = d // heads // 2
    tensors[prefix + "rotary_emb.inv_freq"] = (10_000.0 ** (-np.arange(half) / half)).astype(np.float32)
    return tensors
