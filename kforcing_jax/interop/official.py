"""Reading checkpoints in the layout of the released K-Forcing code, without torch and without unpickling code.

A released `.ckpt` is a zip archive: a pickle that describes tensors, and one raw file per storage. The pickle is
read by an unpickler that knows three harmless constructors and refuses every other name, so opening a file from
a stranger cannot run anything.
"""

import collections
import dataclasses
import io
import pickle
import zipfile
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM
from kforcing_jax.models.transformer import ROPE_BASE, rotary_frequencies

_PREFIX = "backbone."
_MASK_IDS = {30_522: 103, 50_258: 50_257}  # bert-base-uncased [MASK]; the id added to GPT-2's vocabulary
_STORAGE_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class CheckpointFormatError(ValueError):
    """The file is not a released checkpoint, or holds something that is not safe to read."""


def load(path: str | Path, mask_id: int | None = None):
    """Reads a released `.ckpt`: (model, params), a CausalLM or a PushForwardLM by what the file holds.

    Args:
      path: the checkpoint.
      mask_id: the id that is never drawn. By default 103 for 30,522 ids (BERT), 50,257 for 50,258 (GPT-2 with
        a mask), otherwise the last id.

    Raises:
      CheckpointFormatError: not such a file, a tensor of the wrong shape, or an object other than tensors in it.
    """
    try:
        return from_state_dict(read_state_dict(path), mask_id)
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{path}: {error}") from None


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a torch zip checkpoint by name, as numpy arrays."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise CheckpointFormatError("not a torch zip checkpoint (expected a file written by torch.save)") from None
    with archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointFormatError("a zip archive without a data.pkl, so not a torch checkpoint")
        content = _load_pickle(archive, pickles[0])
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, np.ndarray) for name, value in state.items()
    ):
        raise CheckpointFormatError('no "state_dict" of tensors in this checkpoint')
    return dict(state)


def from_state_dict(state: dict[str, np.ndarray], mask_id: int | None = None):
    """Converts released tensors, with or without the `backbone.` prefix: (model, params)."""
    tensors = _Tensors({name.removeprefix(_PREFIX): value for name, value in state.items()})
    vocab_size, d_model = tensors.shape("vocab_embed.embedding", 2)
    head_width = _head_width(tensors, d_model)
    try:
        cfg = ModelConfig(
            vocab_size=vocab_size,
            mask_id=_MASK_IDS.get(vocab_size, vocab_size - 1) if mask_id is None else mask_id,
            num_layers=_count_layers(tensors),
            d_model=d_model,
            num_heads=d_model // head_width,
        )
    except ValueError as error:
        raise CheckpointFormatError(str(error)) from None
    params = {"backbone": _backbone(tensors, cfg)}
    if any(name.startswith("noise_encoder.") for name in tensors.by_name):
        return PushForwardLM(cfg), params | {"noise_encoder": _noise_encoder(tensors, d_model)}
    return CausalLM(cfg), params


def _backbone(tensors, cfg):
    vocab, d, h, c = cfg.vocab_size, cfg.d_model, cfg.num_heads, cfg.head_width

    def block(i):
        name = f"blocks.{i}."
        return {
            "attn_norm": {"scale": tensors.get(name + "norm1.weight", (d,))},
            "attn_qkv": {"kernel": tensors.kernel(name + "attn_qkv.weight", d, 3 * d).reshape(d, 3, h, c)},
            "attn_out": {"kernel": tensors.kernel(name + "attn_out.weight", d, d).reshape(h, c, d)},
            "mlp_norm": {"scale": tensors.get(name + "norm2.weight", (d,))},
            "mlp_in": tensors.dense(name + "mlp.0", d, 4 * d),
            "mlp_out": tensors.dense(name + "mlp.2", 4 * d, d),
        }

    return {
        "embedding": {"embedding": tensors.get("vocab_embed.embedding", (vocab, d))},
        "blocks": _stack([block(i) for i in range(cfg.num_layers)]),
        "final_norm": {"scale": tensors.get("output_layer.norm_final.weight", (d,))},
        "output": tensors.dense("output_layer.linear", d, vocab),
    }


def _noise_encoder(tensors, d):
    return {
        "project": tensors.dense("noise_encoder.combined_proj", 2 * d, d),
        "norm": {
            "scale": tensors.get("noise_encoder.norm.weight", (d,)),
            "bias": tensors.get("noise_encoder.norm.bias", (d,)),
        },
        "mlp_in": tensors.dense("noise_encoder.mlp.0", d, 4 * d),
        "mlp_out": tensors.dense("noise_encoder.mlp.2", 4 * d, d),
    }


def _head_width(tensors, d_model):
    """The rotary frequencies are the only trace of the number of heads."""
    (pairs,) = tensors.shape("rotary_emb.inv_freq", 1)
    if pairs == 0 or d_model % (2 * pairs):
        raise CheckpointFormatError(
            f"rotary_emb.inv_freq has {pairs} entries, which is not half a head width that divides {d_model}"
        )
    expected = rotary_frequencies(2 * pairs)
    if not np.allclose(tensors.by_name["rotary_emb.inv_freq"], expected, rtol=1e-3):
        raise CheckpointFormatError(f"rotary_emb.inv_freq is not that of base {ROPE_BASE:g}")
    return 2 * pairs


def _count_layers(tensors):
    layers = {int(name.split(".")[1]) for name in tensors.by_name if name.startswith("blocks.")}
    if layers != set(range(len(layers))) or not layers:
        raise CheckpointFormatError(f"blocks are numbered {sorted(layers)}, expected 0, 1, ... without a gap")
    return len(layers)


def _stack(layers):
    """One tree whose leaves carry a leading layer axis, as `nn.scan` keeps them."""
    first = layers[0]
    if isinstance(first, dict):
        return {key: _stack([layer[key] for layer in layers]) for key in first}
    return jnp.stack(layers)


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """Released tensors by name, checked for presence and shape when they are taken."""

    by_name: dict[str, np.ndarray]

    def shape(self, name, rank):
        if name not in self.by_name:
            raise CheckpointFormatError(f"tensor {name} is missing")
        shape = self.by_name[name].shape
        if len(shape) != rank:
            raise CheckpointFormatError(f"tensor {name} has shape {shape}, expected {rank} axes")
        return shape

    def get(self, name, shape):
        if self.shape(name, len(shape)) != shape:
            raise CheckpointFormatError(f"tensor {name} has shape {self.by_name[name].shape}, expected {shape}")
        return jnp.asarray(self.by_name[name], jnp.float32)

    def kernel(self, name, inputs, outputs):
        """torch keeps (out, in), Flax (in, out)."""
        return self.get(name, (outputs, inputs)).T

    def dense(self, name, inputs, outputs):
        return {"kernel": self.kernel(name + ".weight", inputs, outputs), "bias": self.get(name + ".bias", (outputs,))}


def _load_pickle(archive, name):
    try:
        return _TensorUnpickler(archive, name).load()
    except (CheckpointFormatError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle or storage can raise anything
        raise CheckpointFormatError(f"damaged checkpoint ({type(error).__name__}: {error})") from None


class _TensorUnpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers, and refuses every other object."""

    def __init__(self, archive: zipfile.ZipFile, pickle_name: str):
        super().__init__(io.BytesIO(archive.read(pickle_name)))
        self._archive = archive
        self._root = pickle_name.removesuffix("data.pkl")
        order_file = self._root + "byteorder"
        big = order_file in archive.namelist() and archive.read(order_file) == b"big"
        self._byte_order = ">" if big else "<"

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise CheckpointFormatError(f"holds {module}.{name}, which is not a tensor; refusing to unpickle it")

    def persistent_load(self, pid):
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise CheckpointFormatError(f"unknown storage {pid!r}")
        raw = self._archive.read(f"{self._root}data/{key}")
        if len(raw) < count * dtype.itemsize:
            raise CheckpointFormatError(f"storage {key} is cut short")
        return np.frombuffer(raw, dtype.newbyteorder(self._byte_order), count)


def _rebuild_tensor(storage, offset, shape, strides, *unused):
    """A view of a storage, copied; bounds are checked because the numbers come from the file."""
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min(shape, default=1) > 0 and not (0 <= offset <= last < storage.size and min(strides, default=0) >= 0):
        raise CheckpointFormatError(f"a tensor of shape {tuple(shape)} reaches outside its storage")
    strides = [stride * storage.itemsize for stride in strides]
    view = np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False)
    return np.array(view.astype(storage.dtype.newbyteorder("=")))
