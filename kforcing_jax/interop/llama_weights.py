"""One table of names: the weights of the Llama family on the Hugging Face hub, and where they are in our parameters.

torch keeps a product's matrix as (out, in), Flax as (*in, *out). Queries, keys and values are matrices of their own
there; here those of equal numbers of heads lie in one, stacked on the first axis of its outputs.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from kforcing_jax.architecture import Architecture
from kforcing_jax.interop.torch_zip import CheckpointFormatError

# (name, rows of the first axis) -> these rows of a stored tensor, of any floating type.
Rows = Callable[[str, slice], np.ndarray]

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_BLOCKS = ("backbone", "blocks")
# Arrays that begin at a multiple of so many bytes become arrays of a CPU device as they are, without a copy.
_ALIGNMENT = 64
_ROWS_AT_ONCE = 1024


class Weight(NamedTuple):
    """A leaf of our parameters, and the tensors that it is made of."""

    path: tuple[str, ...]
    names: tuple[str, ...]  # of its tensors, with {} for the number of the layer
    shape: tuple[int, ...]  # ours, of one layer and one tensor
    stored_shape: tuple[int, ...]
    inputs: int = 0  # leading axes that are inputs of a product; 0 for what is no matrix of one

    @property
    def in_layers(self) -> bool:
        """Whether every layer has one, so that the leaf has a leading axis L."""
        return "{}" in self.names[0]

    def full_shape(self, num_layers: int) -> tuple[int, ...]:
        """Of the leaf."""
        layers = (num_layers,) if self.in_layers else ()
        parts = (len(self.names),) if len(self.names) > 1 else ()
        return (*layers, *self.shape[: self.inputs], *parts, *self.shape[self.inputs :])

    def stored(self, num_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of its tensors, of all layers."""
        for layer in range(num_layers if self.in_layers else 1):
            yield from ((name.format(layer), self.stored_shape) for name in self.names)

    def read(self, rows: Rows, index: tuple[slice, ...], full_shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The part of the leaf at an index, from no more rows of the tensors than it needs.

        Raises:
          CheckpointFormatError: a number in it is not finite.
        """
        ranges = [range(size)[part] for part, size in zip(index, full_shape, strict=True)]
        leaf = aligned_array([len(each) for each in ranges], dtype)
        layers = ranges.pop(0) if self.in_layers else range(1)
        parts = ranges.pop(self.inputs) if len(self.names) > 1 else range(1)
        ins, outs = ranges[: self.inputs], ranges[self.inputs :]
        whole = leaf.reshape(len(layers), *map(len, ins), len(parts), *map(len, outs))
        for i, layer in enumerate(layers):
            for j, part in enumerate(parts):
                at: Any = (i, *[slice(None)] * self.inputs, j)
                name, target = self.names[part].format(layer), whole[at]
                with np.errstate(over="ignore"):  # looked for next
                    target[...] = self._one(rows, name, ins, outs)
                if not np.isfinite(target).all():
                    raise CheckpointFormatError(f"tensor {name} holds values that are not finite; it is of no use")
        return leaf

    def _one(self, rows, name, ins, outs):
        """The part (*ins, *outs) of one tensor."""
        first, *others = outs
        per_row = self.stored_shape[0] // self.shape[self.inputs]
        read = rows(name, slice(first.start * per_row, first.stop * per_row))
        read = read.reshape(len(first), *self.shape[self.inputs + 1 :], *self.shape[: self.inputs])
        read = read[(slice(None), *(slice(each.start, each.stop) for each in (*others, *ins)))]
        return np.moveaxis(read, range(len(outs), read.ndim), range(self.inputs))

    def write(self, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The inverse of `read`: names and arrays of the tensors, one after the other."""
        layers = leaf if self.in_layers else leaf[None]
        for layer, one in enumerate(layers):
            parts = np.moveaxis(one, self.inputs, 0) if len(self.names) > 1 else one[None]
            for name, part in zip(self.names, parts, strict=True):
                outs_first = np.moveaxis(part, range(self.inputs), range(part.ndim - self.inputs, part.ndim))
                yield name.format(layer), np.ascontiguousarray(outs_first.reshape(self.stored_shape))


def weights_of(a: Architecture, vocab_size: int) -> list[Weight]:
    """All weights of a Llama-like model, in the order of their tensors in a file."""
    d, heads, kv_heads, c, f = a.d_model, a.num_heads, a.kv_heads, a.head_width, a.mlp_width
    attn, mlp = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
    qkv = [f"{attn}{name}_proj" for name in "qkv"]
    joined = [("attn_qkv", qkv, heads)]
    split = [("attn_q", qkv[:1], heads), ("attn_kv", qkv[1:], kv_heads)]
    block = [_scale("model.layers.{}.input_layernorm", (*_BLOCKS, "attn_norm"), d)]
    for name, tensors, count in joined if kv_heads == heads else split:
        block += _dense((*_BLOCKS, name), tensors, (d,), (count, c), a.qkv_bias)
    block += _dense((*_BLOCKS, "attn_out"), [f"{attn}o_proj"], (heads, c), (d,), a.attention_out_bias)
    if a.qk_norm:
        block += [_scale(f"{attn}{name}_norm", (*_BLOCKS, f"attn_{name}_norm"), c) for name in "qk"]
    block += [_scale("model.layers.{}.post_attention_layernorm", (*_BLOCKS, "mlp_norm"), d)]
    for name, tensor, ins, outs in (("gate", "gate", d, f), ("in", "up", d, f), ("out", "down", f, d)):
        block += _dense((*_BLOCKS, f"mlp_{name}"), [f"{mlp}{tensor}_proj"], (ins,), (outs,), a.mlp_bias)
    embedding = Weight(("backbone", "embedding", "embedding"), (EMBEDDING,), (vocab_size, d), (vocab_size, d))
    after = [_scale("model.norm", ("backbone", "final_norm"), d)]
    if not a.tied_embeddings:
        after += _dense(("backbone", "output"), ["lm_head"], (d,), (vocab_size,), False)
    return [embedding, *block, *after]


def noise_encoder(d: int) -> list[Weight]:
    """What a student has besides, by the names of the released code."""
    module, path = "noise_encoder", ("noise_encoder",)
    return [
        *_dense((*path, "project"), [f"{module}.combined_proj"], (2 * d,), (d,), True),
        _scale(f"{module}.norm", (*path, "norm"), d),
        Weight((*path, "norm", "bias"), (f"{module}.norm.bias",), (d,), (d,)),
        *_dense((*path, "mlp_in"), [f"{module}.mlp.0"], (d,), (4 * d,), True),
        *_dense((*path, "mlp_out"), [f"{module}.mlp.2"], (4 * d,), (d,), True),
    ]


def _scale(name, path, size):
    return Weight((*path, "scale"), (f"{name}.weight",), (size,), (size,))


def _dense(path, names, ins, outs, has_bias):
    flat = math.prod(outs)
    kernel = tuple(f"{name}.weight" for name in names)
    weights = [Weight((*path, "kernel"), kernel, (*ins, *outs), (flat, math.prod(ins)), inputs=len(ins))]
    if has_bias:
        weights.append(Weight((*path, "bias"), tuple(f"{name}.bias" for name in names), outs, (flat,)))
    return weights


def digest(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """SHA-256 of named tensors as f32, by which a student knows its teacher."""
    whole = hashlib.sha256()
    for name, tensor in tensors:
        whole.update(name.encode())
        for first in range(0, len(tensor), _ROWS_AT_ONCE):
            whole.update(np.ascontiguousarray(tensor[first : first + _ROWS_AT_ONCE], np.float32).data)
    return whole.hexdigest()


def digest_of_leaves(params: Mapping[str, Any]) -> str:
    """The same of the parameters of a backbone that is not of the family, by their own names, in vocabulary order."""
    leaves = flatten_dict(params)
    return digest((".".join(path), np.asarray(leaves[path])) for path in sorted(leaves))


def aligned_array(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An array, of anything, that a CPU device can take as it is."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
