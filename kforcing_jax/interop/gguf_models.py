"""Models in GGUF files: their metadata as an `Architecture`, and their tensors by the names of the hub.

Rows of queries and keys of architecture `llama` are kept so that neighbouring channels are rotated together; here, as
on the hub, channel c and c + C / 2 are. `qwen2` and `qwen3` are kept as they are on the hub.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kforcing_jax.architecture import LLAMA, Architecture, Rope
from kforcing_jax.data.gguf_files import GgufFile, GgufTensor, read_gguf
from kforcing_jax.errors import DataError
from kforcing_jax.interop.config_json import Described
from kforcing_jax.interop.fields import Fields
from kforcing_jax.interop.torch_zip import CheckpointFormatError

_ROPE_FACTORS = "rope_freqs.weight"
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Of Llama 3: its length, and the turns in it above which frequencies stay.
_LENGTH, _HIGH = 8192, 4.0
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_INTERLEAVED = re.compile(r"\.self_attn\.[qk]_proj\.(weight|bias)$")
# What architectures say that changes nothing here, or is looked at elsewhere.
_IGNORED = ("tensor_data_layout", "rope.scaling.finetuned")
_NEUTRAL = {
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": -1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
}


class _Family(NamedTuple):
    interleaved: bool = False
    qk_norm: bool = False


_FAMILIES = {"llama": _Family(interleaved=True), "qwen2": _Family(), "qwen3": _Family(qk_norm=True)}


class GgufModel:
    """The tensors of a file by the names of the hub.

    Raises:
      CheckpointFormatError: the file cannot be read, is of another architecture, or has types that are not read.
    """

    def __init__(self, path: Path):
        self._file = _opened(path)
        self._family, _ = _family_of(self._file)
        self._tensors = {_hub_name(name): tensor for name, tensor in self._file.tensors.items()}
        unread = sorted({tensor.kind.name for tensor in self._tensors.values() if not tensor.is_readable})
        if unread:
            raise CheckpointFormatError(f"tensors of type {', '.join(unread)} are not read")
        self._tensors.pop(_ROPE_FACTORS, None)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        described = describe_gguf(path)
        self._head_width = described.architecture.head_width

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Rows of the first axis; of queries and keys whole heads."""
        read = self._tensors[name].rows(rows)
        if not (self._family.interleaved and _INTERLEAVED.search(name)):
            return read
        by_pair = read.reshape(-1, self._head_width // 2, 2, *read.shape[1:])
        return by_pair.swapaxes(1, 2).reshape(read.shape)


def describe_gguf(path: Path) -> Described:
    """What a file says of its model. Raises CheckpointFormatError, which names all that is not known here."""
    file = _opened(path)
    family, kind = _family_of(file)
    prefix = f"{kind}."
    said = {name.removeprefix(prefix): value for name, value in file.values.items() if name.startswith(prefix)}
    fields = Fields(said, prefix=prefix)
    heads, width = fields.take_size("attention.head_count"), fields.take_size("embedding_length")
    head_width = fields.take_size("attention.key_length", width // max(heads, 1))
    kv_heads = fields.take_size("attention.head_count_kv", heads)
    embedding = file.tensors.get("token_embd.weight")
    max_length = fields.take("context_length", int, 0)
    architecture = Architecture(
        **LLAMA | _biases(file.tensors),
        num_layers=fields.take_size("block_count"),
        d_model=width,
        num_heads=heads,
        num_kv_heads=0 if kv_heads == heads else kv_heads,
        d_head=0 if head_width * heads == width else head_width,
        d_mlp=fields.take_size("feed_forward_length"),
        norm_epsilon=fields.take("attention.layer_norm_rms_epsilon", float),
        qk_norm=family.qk_norm,
        sliding_window=fields.take("attention.sliding_window", int, 0),
        tied_embeddings="output.weight" not in file.tensors,
        rope=_rope(fields, file.tensors.get(_ROPE_FACTORS), head_width, max_length),
    )
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.take(name, int, head_width) != head_width:
            fields.problem(name, f"= {said[name]} should be the width of a head, {head_width}")
    vocab_size = fields.take("vocab_size", int, embedding.shape[0] if embedding else 1)
    fields.refuse_unknown(_IGNORED, _NEUTRAL)
    if not fields.problems:
        fields.problems += architecture.problems()
    fields.refuse()
    return Described(architecture, vocab_size, max_length)


def _opened(path) -> GgufFile:
    try:
        return read_gguf(path)
    except DataError as error:
        raise CheckpointFormatError(str(error).removeprefix(f"{path}: ").removeprefix(f"{path} ")) from None


def _family_of(file) -> tuple[_Family, str]:
    kind = file.values.get("general.architecture")
    if kind not in _FAMILIES:
        raise CheckpointFormatError(f"general.architecture = {kind!r} is not one of {', '.join(_FAMILIES)}")
    return _FAMILIES[kind], kind


def _hub_name(name: str) -> str:
    """That of a tensor on the hub; its own if it is none of the family."""
    found = _NAME.fullmatch(name)
    if not found or found[2] not in _NAMES:
        return name
    layer = "" if found[1] is None else f"model.layers.{found[1]}."
    return f"{layer}{_NAMES[found[2]]}.{found[3]}"


def _biases(tensors):
    names = {"qkv_bias": "attn_q", "attention_out_bias": "attn_output", "mlp_bias": "ffn_down"}
    return {field: f"blk.0.{name}.bias" in tensors for field, name in names.items()}


def _rope(fields, factors: GgufTensor | None, head_width: int, max_length: int) -> Rope:
    base = fields.take("rope.freq_base", float, 10_000.0)
    kind = fields.take("rope.scaling.type", str, "none")
    factor = fields.take("rope.scaling.factor", float, fields.take("rope.scale_linear", float, 1.0))
    length = fields.take("rope.scaling.original_context_length", int, max_length)
    if factors is not None:
        return _from_factors(fields, factors.rows().astype(np.float64).ravel(), base, head_width)
    if kind == "none" and factor == 1:
        return Rope(base=base)
    if kind in ("linear", "none"):
        return Rope(base=base, scaling="linear", factor=factor)
    if kind == "yarn":
        betas = {
            "beta_fast": fields.take("rope.scaling.yarn_beta_fast", float, 32.0),
            "beta_slow": fields.take("rope.scaling.yarn_beta_slow", float, 1.0),
        }
        attention = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        return Rope(
            base=base, scaling="yarn", factor=factor, original_length=length, attention_factor=attention, **betas
        )
    fields.problem("rope.scaling.type", f"= {kind!r} is not one of none, linear, yarn")
    return Rope(base=base)


def _from_factors(fields, divisors_C: np.ndarray, base: float, head_width: int) -> Rope:
    """Llama 3's scaling out of what it divides each frequency by, which is all that files keep of it.

    Between its bounds, 1 / divisor is linear in the frequency; of the bounds only their ratio to the length matters.
    """
    plain = Rope(base=base)
    if len(divisors_C) != head_width // 2:
        fields.problems.append(f"{_ROPE_FACTORS} has {len(divisors_C)} entries, expected {head_width // 2}")
        return plain
    if np.allclose(divisors_C, 1):
        return plain
    factor = float(divisors_C.max())
    frequencies_C = base ** (-np.arange(0, head_width, 2) / head_width)
    kept_C = (1 / divisors_C - 1 / factor) / (1 - 1 / factor)
    for length, high in _bounds(frequencies_C, kept_C):
        rope = Rope(base=base, scaling="llama3", factor=factor, original_length=length, high_freq_factor=high)
        turns_C = length * frequencies_C / (2 * math.pi)
        again_C = np.clip((turns_C - 1) / (high - 1), 0, 1)
        if np.allclose(again_C + (1 - again_C) / factor, 1 / divisors_C, rtol=1e-3):
            return rope
    fields.problems.append(f"{_ROPE_FACTORS} is not a scaling as Llama 3's, and others are not read")
    return plain


def _bounds(frequencies_C: np.ndarray, kept_C: np.ndarray) -> Iterator[tuple[int, float]]:
    """(length, turns above which frequencies stay) that may give these shares, the likeliest first.

    Narrow heads have few frequencies between the bounds. With two of them there is one line through them, with less
    there are many, which compute the same: Llama's own bounds are tried first.
    """
    between = (kept_C > 1e-4) & (kept_C < 1 - 1e-4)
    turn = 2 * math.pi
    if between.sum() >= 2:
        slope, offset = np.polyfit(frequencies_C[between], kept_C[between], 1)
        if offset < 0 < slope:
            high = 1 - 1 / offset
            yield max(round(turn * slope * (high - 1)), 1), float(round(high, 4))
        return
    divided = frequencies_C[kept_C <= 1e-4].max()
    whole = frequencies_C[kept_C >= 1 - 1e-4].min(initial=math.inf)
    if between.any():
        frequency, share = frequencies_C[between][0], kept_C[between][0]
        yield max(round(turn * (1 + (_HIGH - 1) * share) / frequency), 1), _HIGH
        lowest = max(divided, (frequency - share * whole) / (1 - share))
        length = max(round(2 * turn / (lowest + frequency)), 1)
        yield length, float(1 + (length * frequency / turn - 1) / share)
    elif whole < math.inf:
        yield _LENGTH, _HIGH
        yield max(round(turn * math.sqrt(_HIGH / (whole * divided))), 1), _HIGH
        ratio = math.sqrt(whole / divided)
        yield max(round(turn / (divided * math.sqrt(ratio))), 1), ratio
