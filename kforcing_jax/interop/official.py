"""Checkpoints in the layout of the released K-Forcing code: read into our parameters, and written from them.

A file holds {"state_dict": tensors by name}, or is that dict itself. Full training checkpoints hold more beside it:
optimizer states, which are never read, and an average of the weights (`ema`), which can be read instead. Ours say
under "kforcing_jax", where no other code looks, what the weights do not: the mask id, and the window of a student.
"""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kforcing_jax.interop import torch_zip
from kforcing_jax.interop.torch_zip import CheckpointFormatError, StoredTensor
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM
from kforcing_jax.models.layers import ROPE_BASE, rotary_frequencies

_WEIGHTS = ("state_dict", "ema")

_NOTE = "kforcing_jax"
_PREFIX = "backbone."
_FREQUENCIES = "rotary_emb.inv_freq"  # a buffer: in the state dict, but not a parameter


@dataclasses.dataclass(frozen=True)
class Release:
    """What is known of the models of one data set beyond their weights: ids, longest text, kept tokens of a prefix."""

    tokenizer: str
    mask_id: int
    eos_id: int
    seq_len: int
    prefix_length: int


# By vocabulary size: LM1B, with BERT's [MASK] and [SEP]; OpenWebText, with the mask added to GPT-2's vocabulary.
RELEASES = {
    30_522: Release("bert-base-uncased", mask_id=103, eos_id=102, seq_len=128, prefix_length=6),
    50_258: Release("gpt2", mask_id=50_257, eos_id=50_256, seq_len=1024, prefix_length=64),
}


def load(path: str | Path, mask_id: int | None = None, weights: str = "state_dict"):
    """Reads a released `.ckpt`: (model, params), a CausalLM or a PushForwardLM by what the file holds.

    Args:
      path: the checkpoint.
      mask_id: the id that is never drawn; by default what the file says, or `default_mask_id` of the vocabulary.
      weights: "state_dict", as the released inference code takes them, or "ema", the averaged ones of a full
        training checkpoint.

    Raises:
      CheckpointFormatError: not such a file, a tensor of the wrong shape, something that is not safe to read in it,
        or no averaged weights where they are asked for. One line that begins with the path.
    """
    with torch_zip.opened(path) as content:
        return from_state_dict(
            _model_tensors(content, weights), _noted(content, "mask_id") if mask_id is None else mask_id
        )


def trained_window(path: str | Path) -> int | None:
    """The window that a student of `save` was trained with; None where the file does not say. Raises like `load`."""
    with torch_zip.opened(path) as content:
        return _noted(content, "window")


def read_state_dict(path: str | Path, weights: str = "state_dict") -> dict[str, np.ndarray]:
    """The model's tensors by the names that they have in the file, as numpy arrays. Raises like `load`."""
    with torch_zip.opened(path) as content:
        return {name: tensor.read() for name, tensor in _model_tensors(content, weights).items()}


def from_state_dict(state: dict[str, np.ndarray | StoredTensor], mask_id: int | None = None):
    """Converts released tensors, with or without the `backbone.` prefix: (model, params). Raises like `load`."""
    tensors = _Tensors({name.removeprefix(_PREFIX): tensor for name, tensor in _of_backbone(state).items()})
    is_student = any(name.startswith("noise_encoder.") for name in tensors.by_name)
    model = (PushForwardLM if is_student else CausalLM)(_config(tensors, mask_id))
    before, block, after = _layout(model)
    params = {weight.path: jnp.asarray(weight.ours(tensors)) for weight in (*before, *after)}
    for weight in block:
        layers = [weight.ours(tensors, _block_prefix(i)) for i in range(model.cfg.num_layers)]
        params[weight.path] = jnp.asarray(np.stack(layers))  # as nn.scan keeps them
    return model, unflatten_dict(params)


def to_state_dict(model: CausalLM | PushForwardLM, params: dict) -> dict[str, np.ndarray]:
    """The inverse of `from_state_dict`: f32 tensors with the names, the order and the shapes of the released files."""
    before, block, after = _layout(model)
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten_dict(params).items()}
    state = {weight.name: weight.released(leaves[weight.path]) for weight in before}
    state[_FREQUENCIES] = _torch_frequencies(model.cfg.head_width)
    for i, weight in itertools.product(range(model.cfg.num_layers), block):
        state[_block_prefix(i) + weight.name] = weight.released(leaves[weight.path][i])
    state |= {weight.name: weight.released(leaves[weight.path]) for weight in after}
    return {_PREFIX + name: np.ascontiguousarray(tensor) for name, tensor in state.items()}


def save(path: str | Path, model: CausalLM | PushForwardLM, params: dict, window: int | None = None):
    """Writes a `.ckpt` that the released code loads, as does `load`. It is there whole or not at all.

    `window` is the number of tokens that a student was trained to emit in a pass, to be kept with it.

    Raises:
      OSError: it cannot be written.
    """
    mask_id = model.cfg.mask_id
    note = {"mask_id": mask_id} if mask_id != default_mask_id(model.cfg.vocab_size) else {}
    note |= {"window": window} if window else {}
    torch_zip.write(path, {"state_dict": to_state_dict(model, params)} | ({_NOTE: note} if note else {}))


def default_mask_id(vocab_size: int) -> int:
    """That of the release with this vocabulary (103 for BERT's, 50,257 for GPT-2's), otherwise the last id."""
    return RELEASES[vocab_size].mask_id if vocab_size in RELEASES else vocab_size - 1


def _noted(content, name) -> int | None:
    note = content.get(_NOTE) if isinstance(content, dict) else None
    value = note.get(name) if isinstance(note, dict) else None
    return value if type(value) is int else None


def _model_tensors(content, weights) -> dict[str, StoredTensor]:
    """The tensors of the model in a file, by name, not read yet."""
    if weights not in _WEIGHTS:
        raise ValueError(f"weights = {weights!r} is not one of {', '.join(_WEIGHTS)}")
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state:
        raise _no_state_dict("it" if state is content else '"state_dict"', state)
    state = _of_backbone(state)
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise _no_state_dict("a name", name)
        if not isinstance(tensor, StoredTensor):
            raise _no_state_dict(name, tensor)
    return _averaged(state, content.get("ema")) if weights == "ema" else state


def _no_state_dict(what, value):
    found = "empty" if value == {} else torch_zip.describe(value)
    return CheckpointFormatError(f'no "state_dict" of tensors in this checkpoint ({what} is {found})')


def _of_backbone(state):
    """Full checkpoints may hold other modules (a noise schedule, a teacher) beside the model."""
    backbone = {name: value for name, value in state.items() if isinstance(name, str) and name.startswith(_PREFIX)}
    return backbone or state


def _averaged(state, ema):
    """The state dict with the averaged weights in it, which are listed in its order."""
    shadows = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadows, list):
        raise CheckpointFormatError('no averaged weights ("ema") in this checkpoint; take those of its "state_dict"')
    names = [name for name in state if name.removeprefix(_PREFIX) != _FREQUENCIES]
    if len(shadows) != len(names):
        raise CheckpointFormatError(f"ema has {len(shadows)} weights, the model {len(names)}")
    for name, shadow in zip(names, shadows, strict=True):
        if not isinstance(shadow, StoredTensor):
            raise CheckpointFormatError(f"ema has {torch_zip.describe(shadow)} for {name}, expected a tensor")
        if shadow.shape != state[name].shape:
            raise CheckpointFormatError(f"ema has shape {shadow.shape} for {name}, expected {state[name].shape}")
    return state | dict(zip(names, shadows, strict=True))


def _config(tensors, mask_id) -> ModelConfig:
    vocab_size, d_model = tensors.shape("vocab_embed.embedding", 2)
    try:
        return ModelConfig(
            vocab_size=vocab_size,
            mask_id=default_mask_id(vocab_size) if mask_id is None else mask_id,
            num_layers=_count_layers(tensors),
            d_model=d_model,
            num_heads=d_model // _head_width(tensors, d_model),
        )
    except CheckpointFormatError:
        raise
    except ValueError as error:
        raise CheckpointFormatError(str(error)) from None


def _head_width(tensors, d_model):
    """The rotary frequencies are the only trace of the number of heads."""
    (pairs,) = tensors.shape(_FREQUENCIES, 1)
    if pairs == 0 or d_model == 0 or d_model % (2 * pairs):
        raise CheckpointFormatError(
            f"{_FREQUENCIES} has {pairs} entries, which is not half a head width that divides {d_model}"
        )
    expected = rotary_frequencies(2 * pairs)
    # As far as bfloat16 holds them.
    if not np.allclose(tensors.get(_FREQUENCIES, (pairs,)), expected, rtol=2**-7):
        raise CheckpointFormatError(f"{_FREQUENCIES} is not that of base {ROPE_BASE:g}")
    return 2 * pairs


def _torch_frequencies(head_width):
    """1 / base^(i / C) in f32 as torch gives it, to the last bit for the usual head widths.

    XLA's and numpy's own f32 powers differ in that bit, and so does any other order of the operations.
    """
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    return np.float32(1) / (ROPE_BASE ** exponents.astype(np.float64)).astype(np.float32)


def _count_layers(tensors):
    numbers = {name.split(".")[1] for name in tensors.by_name if name.startswith("blocks.")}
    if not numbers or numbers != {str(i) for i in range(len(numbers))}:
        found = ", ".join(sorted(numbers))
        raise CheckpointFormatError(f"blocks are numbered [{found}], expected 0, 1, ... without a gap")
    return len(numbers)


def _block_prefix(layer):
    return f"blocks.{layer}."


class _Weight(NamedTuple):
    """A weight in both layouts. torch keeps a product's matrix as (out, in), Flax as (*in, *out)."""

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]  # ours, of one layer
    inputs: int = 0  # the leading axes that are inputs of a product; 0 for what is not a matrix of one

    def ours(self, tensors, prefix="") -> np.ndarray:
        tensor = tensors.get(prefix + self.name, self._released_shape())
        return tensor.T.reshape(self.shape) if self.inputs else tensor

    def released(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.reshape(self._released_shape()[::-1]).T if self.inputs else leaf

    def _released_shape(self):
        if not self.inputs:
            return self.shape
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])


def _layout(model) -> tuple[list[_Weight], list[_Weight], list[_Weight]]:
    """The weights before the blocks, of one block, and after the blocks, in the order of the released files."""
    cfg = model.cfg
    vocab, d, h, c = cfg.vocab_size, cfg.d_model, cfg.num_heads, cfg.head_width
    blocks = ("backbone", "blocks")
    before = [_Weight("vocab_embed.embedding", ("backbone", "embedding", "embedding"), (vocab, d))]
    block = [
        _Weight("norm1.weight", (*blocks, "attn_norm", "scale"), (d,)),
        _Weight("attn_qkv.weight", (*blocks, "attn_qkv", "kernel"), (d, 3, h, c), inputs=1),
        _Weight("attn_out.weight", (*blocks, "attn_out", "kernel"), (h, c, d), inputs=2),
        _Weight("norm2.weight", (*blocks, "mlp_norm", "scale"), (d,)),
        *_dense("mlp.0", (*blocks, "mlp_in"), d, 4 * d),
        *_dense("mlp.2", (*blocks, "mlp_out"), 4 * d, d),
    ]
    after = [
        *(_noise_encoder(d) if isinstance(model, PushForwardLM) else ()),
        _Weight("output_layer.norm_final.weight", ("backbone", "final_norm", "scale"), (d,)),
        *_dense("output_layer.linear", ("backbone", "output"), d, vocab),
    ]
    return before, block, after


def _noise_encoder(d):
    return [
        *_dense("noise_encoder.combined_proj", ("noise_encoder", "project"), 2 * d, d),
        _Weight("noise_encoder.norm.weight", ("noise_encoder", "norm", "scale"), (d,)),
        _Weight("noise_encoder.norm.bias", ("noise_encoder", "norm", "bias"), (d,)),
        *_dense("noise_encoder.mlp.0", ("noise_encoder", "mlp_in"), d, 4 * d),
        *_dense("noise_encoder.mlp.2", ("noise_encoder", "mlp_out"), 4 * d, d),
    ]


def _dense(name, path, inputs, outputs):
    return (
        _Weight(name + ".weight", (*path, "kernel"), (inputs, outputs), inputs=1),
        _Weight(name + ".bias", (*path, "bias"), (outputs,)),
    )


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """Released tensors by name, checked for presence and shape before they are read."""

    by_name: dict[str, np.ndarray | StoredTensor]

    def shape(self, name, rank):
        if name not in self.by_name:
            raise CheckpointFormatError(f"tensor {name} is missing")
        shape = self.by_name[name].shape
        if len(shape) != rank:
            raise CheckpointFormatError(f"tensor {name} has shape {shape}, expected {rank} axes")
        return shape

    def get(self, name, shape) -> np.ndarray:
        """The tensor in f32."""
        if self.shape(name, len(shape)) != shape:
            raise CheckpointFormatError(f"tensor {name} has shape {self.by_name[name].shape}, expected {shape}")
        tensor = self.by_name[name]
        values = np.asarray(tensor.read() if isinstance(tensor, StoredTensor) else tensor, np.float32)
        if not np.isfinite(values).all():
            raise CheckpointFormatError(f"tensor {name} holds values that are not finite; the file is of no use")
        return values
