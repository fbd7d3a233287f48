"""Checkpoints in the layout of the released K-Forcing code: read into our parameters, and written from them.

A file holds {"state_dict": tensors by name}, or is that dict itself. Full training checkpoints hold more beside it:
optimizer states, which are never read, and an average of the weights (`ema`), which can be read instead. Ours say
beside the weights, where no other code looks, what these do not: see `NOTES`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kforcing_jax.architecture import Architecture, Rope
from kforcing_jax.config import WEIGHTS_DTYPES
from kforcing_jax.interop import tensor_files
from kforcing_jax.interop.config_json import is_of_family
from kforcing_jax.interop.torch_zip import CheckpointFormatError, StoredTensor, describe
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM
from kforcing_jax.models.rotary import rotary_frequencies
from kforcing_jax.noise import CdfOrder

_WEIGHTS = ("state_dict", "ema")

_PREFIX = "backbone."
# What wrappers put into names: DataParallel, torch.compile, Lightning, FSDP, activation checkpointing.
_WRAPPERS = {
    *("module", "_orig_mod", "model", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
}
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


def _is_count(value) -> bool:
    return type(value) is int and value >= 0


def _is_temperature(value) -> bool:
    return type(value) is float and 0 < value < math.inf


def _is_share(value) -> bool:
    return type(value) is float and 0 < value <= 1


def _is_order(value) -> bool:
    return isinstance(value, list) and all(map(_is_count, value)) and sorted(value) == list(range(len(value)))


# What a file of ours may say of its model beside the weights: whether a value is one, and what it should be.
NOTES: dict[str, tuple[Callable[[object], bool], str]] = {
    "mask_id": (_is_count, "an id"),
    "eos_id": (_is_count, "an id"),
    "vocabulary": (lambda value: isinstance(value, str), "the digest of a vocabulary"),
    "seq_len": (_is_count, "the longest text in tokens"),
    "prefix_length": (_is_count, "a number of tokens"),
    "window": (_is_count, "the tokens of a pass"),
    "tau_min": (_is_temperature, "a temperature"),
    "tau_max": (_is_temperature, "a temperature"),
    "top_p": (_is_share, "a probability above 0"),
    "adapter_rank": (lambda value: type(value) is int, "the rank of what noise rows add"),
    "weights_dtype": (lambda value: value in WEIGHTS_DTYPES, "the dtype of the teacher's weights"),
    "base": (lambda value: isinstance(value, str), "the name or path of the teacher"),
    "base_digest": (lambda value: isinstance(value, str), "the digest of the teacher's weights"),
    "cdf_order": (_is_order, "every id once, in the order in which they lie on [0, 1)"),
}


def load(
    path: str | Path, mask_id: int | None = None, weights: str = "state_dict"
) -> tuple[CausalLM | PushForwardLM, dict]:
    """Reads a released `.ckpt`, or a `.safetensors`: (model, params), a CausalLM or a PushForwardLM by what it holds.

    Args:
      path: the checkpoint.
      mask_id: the id that is never drawn; by default what the file says, or `default_mask_id` of the vocabulary.
      weights: "state_dict", as the released inference code takes them, or "ema", the averaged ones of a full
        training checkpoint.

    Raises:
      CheckpointFormatError: not such a file, a tensor of the wrong shape, something that is not safe to read in it,
        or no averaged weights where they are asked for. One line that begins with the path.
    """
    with tensor_files.opened(path) as content:
        note = _note(content)
        tensors = _model_tensors(content, weights)
        model, params = from_state_dict(tensors, note.get("mask_id") if mask_id is None else mask_id)
        if "cdf_order" not in note:
            return model, params
        if len(note["cdf_order"]) != model.cfg.vocab_size:
            raise CheckpointFormatError(
                f"cdf_order has {len(note['cdf_order'])} ids, its vocabulary {model.cfg.vocab_size}"
            )
        return in_order(model, params, CdfOrder(note["cdf_order"]))


def read_note(path: str | Path) -> dict:
    """The entries of `NOTES` that a file has; none in files of others. Raises like `load`."""
    with tensor_files.opened(path) as content:
        return _note(content)


def in_order(
    model: CausalLM | PushForwardLM, params: dict, order: CdfOrder | None
) -> tuple[CausalLM | PushForwardLM, dict]:
    """(model, params) of the same function with another `cdf_order`, which moves the columns of the output layer.

    A student computes the same, and decodes as it was trained, only in its own order.
    """
    tokens_V = np.arange(model.cfg.vocab_size) if order is None else order.tokens_V
    columns_V = model.cfg.column_of(tokens_V)
    backbone = params["backbone"]
    # With tied embeddings there is no output layer: these are in vocabulary order in any case.
    moved = {name: _with_columns(backbone[name], columns_V) for name in ("output", "output_delta") if name in backbone}
    model = type(model)(dataclasses.replace(model.cfg, cdf_order=order))
    return model, params | {"backbone": backbone | moved}


def _with_columns(leaves, columns_V):
    """The inner matrix of a delta is of no column."""
    return {name: leaf if name == "down" else leaf[..., columns_V] for name, leaf in leaves.items()}


def from_state_dict(
    state: Mapping[str, np.ndarray | StoredTensor], mask_id: int | None = None
) -> tuple[CausalLM | PushForwardLM, dict]:
    """Converts released tensors, with or without the `backbone.` prefix: (model, params) in vocabulary order, f32.

    Raises like `load`.
    """
    tensors = _Tensors({name.removeprefix(_PREFIX): tensor for name, tensor in _of_model(state).items()})
    is_student = any(name.startswith("noise_encoder.") for name in tensors.by_name)
    model = (PushForwardLM if is_student else CausalLM)(_config(tensors, mask_id))
    before, block, after = _layout(model)
    params = {weight.path: jnp.asarray(weight.ours(tensors)) for weight in (*before, *after)}
    for weight in block:
        layers = [weight.ours(tensors, _block_prefix(i)) for i in range(model.cfg.num_layers)]
        params[weight.path] = jnp.asarray(np.stack(layers))  # as nn.scan keeps them
    return model, unflatten_dict(params)


def to_state_dict(model: CausalLM | PushForwardLM, params: dict) -> dict[str, np.ndarray]:
    """The inverse of `from_state_dict`: f32 tensors with the names, the order and the shapes of the released files.

    Raises:
      CheckpointFormatError: the model has pieces that the released code does not have.
    """
    _check_pieces(model.cfg)
    model, params = in_order(model, params, None)
    before, block, after = _layout(model)
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten_dict(params).items()}
    state = {weight.name: weight.released(leaves[weight.path]) for weight in before}
    state[_FREQUENCIES] = _torch_frequencies(model.cfg.head_width)
    for i, weight in itertools.product(range(model.cfg.num_layers), block):
        state[_block_prefix(i) + weight.name] = weight.released(leaves[weight.path][i])
    state |= {weight.name: weight.released(leaves[weight.path]) for weight in after}
    return {_PREFIX + name: tensor for name, tensor in state.items()}


def can_hold(cfg: ModelConfig) -> bool:
    """Whether these files have all pieces of a model."""
    return not _other_pieces(cfg)


def _check_pieces(cfg: ModelConfig):
    if wrong := _other_pieces(cfg):
        folder = cfg.is_gated or is_of_family(cfg)
        raise CheckpointFormatError(
            f"a .ckpt or .safetensors of the released layout has no {', '.join(wrong)}"
            f"{'; write a folder, in the layout of Hugging Face' if folder else ', and no other layout has all of it'}"
        )


def _other_pieces(cfg: ModelConfig) -> list[str]:
    ours = ModelConfig(
        vocab_size=cfg.vocab_size, mask_id=0, num_layers=1, d_model=cfg.d_model, num_heads=cfg.d_model // cfg.head_width
    )
    names = [field.name for field in dataclasses.fields(Architecture) if field.name not in ("num_layers", "d_model")]
    meant = {"num_kv_heads": "kv_heads", "d_head": "head_width", "d_mlp": "mlp_width"}
    return [
        f"model.{name} = {getattr(cfg, name)!r}"
        for name in (*names, "adapter_rank")
        if getattr(cfg, meant.get(name, name)) != getattr(ours, meant.get(name, name))
    ]


def save(path: str | Path, model: CausalLM | PushForwardLM, params: dict, **note: object) -> None:
    """Writes a `.ckpt` (or `.pt`) that the released code loads, or a `.safetensors`; `load` reads both.

    `note` has entries of `NOTES`; those that are None are left out. mask_id and cdf_order are those of the model.

    Raises:
      ConfigError: another ending, or one that needs torch, which is not installed.
      RunError: it cannot be written; nothing is left behind.
      ValueError: an entry that is not in `NOTES`, or not what it should be.
    """
    order = model.cfg.cdf_order
    note |= {"mask_id": model.cfg.mask_id, "cdf_order": order and order.tokens_V.tolist()}
    note = {name: value for name, value in note.items() if value is not None}
    check_note(note)
    tensor_files.write(path, to_state_dict(model, params), note)


def default_mask_id(vocab_size: int) -> int:
    """That of the release with this vocabulary (103 for BERT's, 50,257 for GPT-2's), otherwise the last id."""
    return RELEASES[vocab_size].mask_id if vocab_size in RELEASES else vocab_size - 1


def _note(content) -> dict:
    note = content.get(tensor_files.NOTE, {}) if isinstance(content, dict) else {}
    if not isinstance(note, dict):
        raise CheckpointFormatError(f"its entry {tensor_files.NOTE} is {describe(note)}, expected dict")
    check_note(note)
    return dict(note)


def check_note(note: Mapping[str, object]) -> None:
    """Raises CheckpointFormatError for an entry that is not in `NOTES`, or not what it should be."""
    for name, value in note.items():
        if name not in NOTES:
            raise CheckpointFormatError(f"{tensor_files.NOTE} has an entry {name!r}; known are {', '.join(NOTES)}")
        is_right, expected = NOTES[name]
        if not is_right(value):
            raise CheckpointFormatError(f"{tensor_files.NOTE} says {name} = {value!r:.50}, expected {expected}")


def _model_tensors(content, weights) -> dict[str, StoredTensor]:
    """The tensors of the model in a file, by name, not read yet."""
    if weights not in _WEIGHTS:
        raise ValueError(f"weights = {weights!r} is not one of {', '.join(_WEIGHTS)}")
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state:
        raise _no_state_dict("it" if state is content else '"state_dict"', state)
    state = _of_model(state)
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise _no_state_dict("a name", name)
        if not isinstance(tensor, StoredTensor):
            raise _no_state_dict(name, tensor)
    return _averaged(state, content.get("ema")) if weights == "ema" else state


def _no_state_dict(what, value):
    found = "empty" if value == {} else describe(value)
    return CheckpointFormatError(f'no "state_dict" of tensors in this checkpoint ({what} is {found})')


def _of_model(state) -> dict:
    """The model's tensors by their names without wrappers; full checkpoints may hold other modules beside it."""
    named = {}
    for name, value in state.items():
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS) if isinstance(name, str) else name
        if plain in named:
            raise CheckpointFormatError(f"two tensors are called {plain}, but for what wrappers add")
        named[plain] = value
    backbone = {name: value for name, value in named.items() if isinstance(name, str) and name.startswith(_PREFIX)}
    return backbone or named


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
            raise CheckpointFormatError(f"ema has {describe(shadow)} for {name}, expected a tensor")
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
    expected = rotary_frequencies(Rope(), 2 * pairs)
    # As far as bfloat16 holds them.
    if not np.allclose(tensors.get(_FREQUENCIES, (pairs,)), expected, rtol=2**-7):
        raise CheckpointFormatError(f"{_FREQUENCIES} is not that of base {Rope().base:g}")
    return 2 * pairs


def _torch_frequencies(head_width):
    """1 / base^(i / C) in f32 as torch gives it, to the last bit for the usual head widths.

    XLA's and numpy's own f32 powers differ in that bit, and so does any other order of the operations.
    """
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    return np.float32(1) / (Rope().base ** exponents.astype(np.float64)).astype(np.float32)


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
            there = ", ".join(ascii(each)[1:-1][:80] for each in list(self.by_name)[:3])
            is_of_hub = any(".self_attn." in each for each in self.by_name)
            hint = "; for a model of the Llama family, name its folder, with config.json" if is_of_hub else ""
            raise CheckpointFormatError(f"tensor {name} is missing; of {len(self.by_name)} the first are {there}{hint}")
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
