"""Models of the Llama family, from a folder as on the Hugging Face hub or from a GGUF file, as teachers.

    model, params = huggingface.load("SmolLM2-135M")        # config.json, *.safetensors, tokenizer.json
    model, params = huggingface.load("model.Q8_0.gguf")

Weights are mapped into memory and go from there to their devices, every device's own part at a time.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, SingleDeviceSharding

from kforcing_jax.architecture import Architecture
from kforcing_jax.data.gguf_files import is_gguf
from kforcing_jax.data.model_tokenizers import chat_template, load_model_tokenizer
from kforcing_jax.data.models import is_known, located
from kforcing_jax.data.places import expanded
from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.interop.config_json import CONFIG, Described, read_config
from kforcing_jax.interop.gguf_models import GgufModel, describe_gguf
from kforcing_jax.interop.llama_weights import EMBEDDING, OUTPUT, Weight, weights_of
from kforcing_jax.interop.safetensor_folders import tensors_of
from kforcing_jax.interop.torch_zip import CheckpointFormatError
from kforcing_jax.models import CausalLM, ModelConfig
from kforcing_jax.noise import CdfOrder
from kforcing_jax.sharding import parameter_shardings

__all__ = ["architecture", "chat_template", "describe", "is_model", "load", "load_params", "tokenizer"]

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_PREFIX = "model."
# Buffers, worked out from the configuration, that old checkpoints carry.
_BUFFERS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


class Source(Protocol):
    """Stored tensors by the names of `llama_weights`."""

    shapes: Mapping[str, tuple[int, ...]]

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Rows of the first axis of a tensor."""


class _Folder:
    """The tensors of a folder."""

    def __init__(self, folder: Path):
        tensors = tensors_of(folder)
        if EMBEDDING.removeprefix(_PREFIX) in tensors:  # saved without its output layer
            tensors = {_PREFIX + name: tensor for name, tensor in tensors.items()}
        self._tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFERS)}
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def rows(self, name: str, rows: slice) -> np.ndarray:
        return self._tensors[name].rows(rows)


def is_model(path: str | Path) -> bool:
    """Whether a path is a folder or file that this module reads, and not a checkpoint of another kind."""
    file = expanded(path)
    return is_known(path) or is_gguf(file) or file.is_dir()


def architecture(path: str | Path) -> tuple[Architecture, int]:
    """(architecture, number of ids) of a folder or GGUF file. Raises like `load`; no weights are read."""
    found = describe(path)
    return found.architecture, found.vocab_size


def describe(path: str | Path) -> Described:
    """Architecture, number of ids and longest text of a folder or GGUF file. Raises like `load`."""
    file = located(path)
    with _reported(path):
        if is_gguf(file):
            return describe_gguf(file)
        if not file.is_dir():
            raise CheckpointFormatError("no such folder or GGUF file")
        if not (file / CONFIG).is_file():
            raise CheckpointFormatError(f"the folder has no {CONFIG}")
        return read_config(file / CONFIG)


def load(
    path: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None, cdf_order: CdfOrder | None = None
) -> tuple[CausalLM, dict]:
    """Reads the model of a folder or GGUF file: (model, params).

    Args:
      path: a folder with config.json and safetensors files, or a .gguf.
      dtype: of the weights and of what is computed with them, float32 (by default) or bfloat16; scales of
        normalisations are f32 in any case.
      mesh: where the weights lie, split by `sharding.RULES`; by default all on the first device.
      cdf_order: how tokens lie on [0, 1); by default in the order of their ids.

    Raises:
      CheckpointFormatError: it cannot be read, is damaged, or says or holds something that is not known here; one line
        that begins with the path.
      ValueError: another dtype.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
    found = describe(path)
    computed = {"dtype": dtype, "precision": "default"} if dtype == "bfloat16" else {}
    fields = {field.name: getattr(found.architecture, field.name) for field in dataclasses.fields(Architecture)}
    cfg = ModelConfig(vocab_size=found.vocab_size, mask_id=None, cdf_order=cdf_order, **fields, **computed)
    return CausalLM(cfg), load_params(path, cfg, dtype=dtype, mesh=mesh)


def load_params(path: str | Path, cfg: ModelConfig, *, dtype: str | None = None, mesh: Mesh | None = None) -> dict:
    """The weights of a folder or GGUF file as those of a model of that configuration. Raises like `load`."""
    file = located(path)
    with _reported(path):
        source: Source = GgufModel(file) if is_gguf(file) else _Folder(file)
        return read_params(source, cfg, DTYPES[dtype or "float32"], mesh)


def tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that comes along with a model, which has no mask. Raises DataError as `load_model_tokenizer`."""
    return load_model_tokenizer(path)


def read_params(source: Source, cfg: ModelConfig, dtype: np.dtype, mesh: Mesh | None) -> dict:
    """The parameters of a model of that configuration, every device's part straight from where the tensors lie."""
    weights = weights_of(cfg, cfg.vocab_size)
    _check_names(source, weights, cfg)
    rows = source.rows if cfg.cdf_order is None else _in_order(source.rows, cfg.cdf_order.tokens_V)
    kinds = {weight.path: np.dtype(np.float32) if weight.path[-1] == "scale" else dtype for weight in weights}
    shapes = {
        weight.path: jax.ShapeDtypeStruct(weight.full_shape(cfg.num_layers), kinds[weight.path]) for weight in weights
    }
    if mesh is None:
        shardings = dict.fromkeys(shapes, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        shardings = flatten_dict(parameter_shardings(unflatten_dict(shapes), mesh))
    params = {}
    for weight in weights:
        shape, kind = shapes[weight.path].shape, kinds[weight.path]
        part = functools.partial(weight.read, rows, full_shape=shape, dtype=kind)
        params[weight.path] = jax.make_array_from_callback(shape, shardings[weight.path], part)
    return unflatten_dict(params)


def _in_order(rows, tokens_V):
    """Rows of the output layer in another order, those of all else as they are."""

    def ordered(name, part):
        return rows(name, slice(None))[tokens_V[part]] if name == OUTPUT else rows(name, part)

    return ordered


def _check_names(source: Source, weights: list[Weight], cfg: ModelConfig):
    """Raises CheckpointFormatError unless the tensors are those of such a model, no more and no less."""
    expected = dict(stored for weight in weights for stored in weight.stored(cfg.num_layers))
    left_over = [name for name in source.shapes if name not in expected]
    if cfg.tied_embeddings and OUTPUT in left_over and _is_embedding(source):
        left_over.remove(OUTPUT)
    for what, names in (
        ("missing", [name for name in expected if name not in source.shapes]),
        ("left over", left_over),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointFormatError(
                f"tensors are {what} for {cfg.num_layers} layers as config.json or the file says: "
                f"{', '.join(names[:3])}{more}"
            )
    for name, shape in expected.items():
        if source.shapes[name] != shape:
            raise CheckpointFormatError(f"tensor {name} has shape {source.shapes[name]}, expected {shape}")


def _is_embedding(source) -> bool:
    """Whether the output layer is the embedding once more, as some files have it where both are one."""
    shapes = {source.shapes.get(name) for name in (OUTPUT, EMBEDDING)}
    if len(shapes) > 1:
        return False
    step = 4096
    return all(
        np.array_equal(*(source.rows(name, slice(first, first + step)) for name in (OUTPUT, EMBEDDING)))
        for first in range(0, shapes.pop()[0], step)
    )


@contextlib.contextmanager
def _reported(path):
    """Errors in this context begin with the path, and are one line."""
    try:
        yield
    except CheckpointFormatError as error:
        said = " ".join(str(error).split())
        raise CheckpointFormatError(said if said.startswith(str(path)) else f"{path}: {said}") from None
