"""Models of the Llama family where they are kept: what is said of them, and their weights, straight onto a mesh.

Weights are mapped into memory and go from there to their devices, every device's own part at a time.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from kforcing_jax.architecture import Architecture
from kforcing_jax.data.gguf_files import is_gguf
from kforcing_jax.data.models import is_known, located
from kforcing_jax.data.places import expanded
from kforcing_jax.interop import llama_weights
from kforcing_jax.interop.config_json import CONFIG, Described, read_config
from kforcing_jax.interop.gguf_models import GgufModel, describe_gguf
from kforcing_jax.interop.llama_weights import EMBEDDING, OUTPUT, Weight, noise_encoder, weights_of
from kforcing_jax.interop.safetensor_folders import tensors_of
from kforcing_jax.interop.torch_zip import CheckpointFormatError
from kforcing_jax.models import ModelConfig
from kforcing_jax.noise import CdfOrder
from kforcing_jax.sharding import parameter_shardings

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
FIELDS = tuple(field.name for field in dataclasses.fields(Architecture))
# What a gated student is kept in, see `model_folders`.
ADAPTER = "adapter.safetensors"
_PREFIX = "model."
# Buffers, worked out from the configuration, that old checkpoints carry.
_BUFFERS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
_ROWS_AT_ONCE = 4096


class Source(Protocol):
    """Stored tensors by the names of `llama_weights`."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors, by name."""

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Rows of the first axis of a tensor."""


class _Folder:
    """The tensors of a folder."""

    def __init__(self, folder: Path):
        tensors = tensors_of(folder)
        if EMBEDDING.removeprefix(_PREFIX) in tensors:  # saved without its output layer
            tensors = {name if name == OUTPUT else _PREFIX + name: tensor for name, tensor in tensors.items()}
        self._tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFERS)}
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        unread = sorted({tensor.dtype for tensor in self._tensors.values() if not tensor.is_readable})
        if unread:
            raise CheckpointFormatError(f"numbers of type {', '.join(unread)} are not read, only floating ones")

    def rows(self, name: str, rows: slice) -> np.ndarray:
        return self._tensors[name].rows(rows)


def is_model(path: str | Path) -> bool:
    """Whether a path is a folder or file that this module reads, and not a checkpoint of another kind."""
    file = expanded(path)
    return is_known(path) or is_gguf(file) or file.is_dir()


def describe(path: str | Path) -> Described:
    """Architecture, number of ids and longest text of a folder or GGUF file. Raises CheckpointFormatError."""
    file = located(path)
    with reported(path):
        if is_gguf(file):
            return describe_gguf(file)
        if not file.is_dir():
            raise CheckpointFormatError("no such folder or GGUF file")
        if not (file / CONFIG).is_file():
            adapter = f", but {ADAPTER}: what a student adds to its teacher" if (file / ADAPTER).is_file() else ""
            raise CheckpointFormatError(f"the folder has no {CONFIG}{adapter}")
        return read_config(file / CONFIG)


def model_config(found: Described, note: Mapping[str, Any], dtype: str | None = None) -> ModelConfig:
    """The model that is described, with what `note` says of one of ours (`official.NOTES`).

    Raises:
      CheckpointFormatError: these do not fit each other.
    """
    fields: dict[str, Any] = {name: getattr(found.architecture, name) for name in FIELDS}
    fields["weights_dtype"] = note.get("weights_dtype", "float32")
    if dtype == "bfloat16":
        fields |= {"dtype": dtype, "weights_dtype": dtype, "precision": "default"}
    try:
        return ModelConfig(
            vocab_size=found.vocab_size,
            mask_id=note.get("mask_id"),
            adapter_rank=note.get("adapter_rank", 0),
            cdf_order=CdfOrder(note["cdf_order"]) if "cdf_order" in note else None,
            **fields,
        )
    except ValueError as error:
        raise CheckpointFormatError(str(error)) from None


def check(path: str | Path) -> None:
    """Raises what `load_params` would, but for numbers that are not finite. No weights are read."""
    found, source = describe(path), _open(path)
    with reported(path):
        _check_names(source, weights_of(found.architecture, found.vocab_size), found)


def load_params(path: str | Path, cfg: ModelConfig, *, mesh: Mesh | None = None, of_student: bool = False) -> dict:
    """The weights of a folder or GGUF file as those of a model of that configuration, on a mesh or the first device.

    Args:
      path: the folder or file.
      cfg: what the model is. Weights are in its `weights_dtype`, scales and the noise encoder of a student in f32.
      mesh: where they lie, split by `sharding.RULES`.
      of_student: whether there is a noise encoder too.

    Raises:
      CheckpointFormatError: tensors are missing, left over, damaged or of another shape.
    """
    source = _open(path)
    weights = weights_of(cfg, cfg.vocab_size) + (noise_encoder(cfg.d_model) if of_student else [])
    with reported(path):
        _check_names(source, weights, Described(cfg, cfg.vocab_size))
        rows = source.rows if cfg.cdf_order is None else _in_order(source.rows, cfg.cdf_order.tokens_V)
        return _read(weights, rows, cfg.num_layers, DTYPES[cfg.weights_dtype], mesh)


def digest(path: str | Path, weights_dtype: str = "float32") -> str:
    """SHA-256 of the weights of a teacher, by which its gated students know it: of those in a dtype, as f32.

    Raises like `load_params`.
    """
    dtype, found, source = DTYPES[weights_dtype], describe(path), _open(path)
    weights = weights_of(found.architecture, found.vocab_size)
    with reported(path):
        _check_names(source, weights, found)
        stored = (
            (name, source.rows(name, slice(None)).astype(_dtype_of(weight, dtype), copy=False))
            for weight in weights
            for name, _ in weight.stored(found.architecture.num_layers)
        )
        return llama_weights.digest(stored)


def _open(path) -> Source:
    file = located(path)
    with reported(path):
        return GgufModel(file) if is_gguf(file) else _Folder(file)


def _read(weights, rows, num_layers, dtype, mesh) -> dict:
    """Every device's part straight from where the tensors lie."""
    shapes = {
        weight.path: jax.ShapeDtypeStruct(weight.full_shape(num_layers), _dtype_of(weight, dtype)) for weight in weights
    }
    params = {}
    for weight, sharding in zip(weights, shardings_of(shapes, mesh), strict=True):
        shape = shapes[weight.path]
        part = functools.partial(weight.read, rows, full_shape=shape.shape, dtype=shape.dtype)
        params[weight.path] = jax.make_array_from_callback(shape.shape, sharding, part)
    return unflatten_dict(params)


def shardings_of(shapes: dict[tuple[str, ...], jax.ShapeDtypeStruct], mesh: Mesh | None) -> list[Sharding]:
    """Of leaves by their paths, in their order."""
    if mesh is None:
        return [SingleDeviceSharding(jax.local_devices()[0])] * len(shapes)
    shardings = flatten_dict(parameter_shardings(unflatten_dict(shapes), mesh))
    return [shardings[path] for path in shapes]


def _dtype_of(weight: Weight, dtype):
    return np.dtype(np.float32) if weight.path[-1] == "scale" or weight.path[0] == "noise_encoder" else dtype


def _in_order(rows, tokens_V):
    """Rows of the output layer in another order, those of all else as they are."""

    def ordered(name, part):
        return rows(name, slice(None))[tokens_V[part]] if name == OUTPUT else rows(name, part)

    return ordered


def _check_names(source: Source, weights: list[Weight], described: Described):
    """Raises CheckpointFormatError unless the tensors are those of such a model, no more and no less."""
    layers = described.architecture.num_layers
    expected = dict(stored for weight in weights for stored in weight.stored(layers))
    left_over = [name for name in source.shapes if name not in expected]
    if described.architecture.tied_embeddings and OUTPUT in left_over and _is_embedding(source):
        left_over.remove(OUTPUT)
    if any(name.startswith("noise_encoder.") for name in left_over):
        raise CheckpointFormatError("it holds a student, not an AR model; huggingface.load_student reads it")
    missing = [name for name in expected if name not in source.shapes]
    for what, names in (("missing", missing), ("left over", left_over)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointFormatError(f"tensors are {what} for {layers} such layers: {', '.join(names[:3])}{more}")
    for name, shape in expected.items():
        if source.shapes[name] != shape:
            raise CheckpointFormatError(f"tensor {name} has shape {source.shapes[name]}, expected {shape}")


def _is_embedding(source) -> bool:
    """Whether the output layer is the embedding once more, as some files have it where both are one."""
    shapes = {source.shapes.get(name) for name in (OUTPUT, EMBEDDING)}
    if len(shapes) > 1:
        return False
    return all(
        np.array_equal(*(source.rows(name, slice(first, first + _ROWS_AT_ONCE)) for name in (OUTPUT, EMBEDDING)))
        for first in range(0, shapes.pop()[0], _ROWS_AT_ONCE)
    )


@contextlib.contextmanager
def reported(path: str | Path) -> Iterator[None]:
    """Each CheckpointFormatError in this context begins with the path, and is one line."""
    try:
        yield
    except CheckpointFormatError as error:
        said = " ".join(str(error).split())
        raise CheckpointFormatError(said if said.startswith(str(path)) else f"{path}: {said}") from None
