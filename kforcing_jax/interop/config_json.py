"""config.json of the Llama family on the Hugging Face hub, as an `Architecture`, and written from one.

Read are Llama, Mistral, Qwen2 and Qwen3, with the defaults of transformers' own classes for what a file leaves out.
What changes what a model computes and is not known here is refused by its name; see `Fields.refuse_unknown`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from kforcing_jax.architecture import LLAMA, Architecture
from kforcing_jax.interop.fields import Fields
from kforcing_jax.interop.rope import read_rope, rope_fields
from kforcing_jax.interop.tensor_files import NOTE
from kforcing_jax.interop.torch_zip import CheckpointFormatError

CONFIG = "config.json"

# Of training, tokenizers, generation and files; none of them changes what the model computes.
_IGNORED = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"),
    *("output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_bfloat16", "tf_legacy_loss"),
    *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix"),
    *("gradient_checkpointing", "max_window_layers", "is_llama_config", "transformers.js_config", "model_max_length"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "return_dict_in_generate"),
    *("output_scores", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens"),
    *("begin_suppress_tokens", "exponential_decay_length_penalty", "unsloth_version", "unsloth_fixed", "language"),
    *("tokenizer_model_max_length", "tokenizer_padding_side", "padding_side", "neftune_noise_alpha", "name"),
    *("chat_template", "license", "model_name"),
}
# What says something, but not with this value.
_NEUTRAL = {
    **dict.fromkeys(("pretraining_tp", "embedding_multiplier", "residual_multiplier", "logits_scaling"), 1),
    **dict.fromkeys(("logit_scale", "rope_percent", "rotary_pct"), 1),
    "is_causal": True,
    "is_decoder": True,
}


class _Family(NamedTuple):
    """What a `model_type` has of its own."""

    class_name: str
    kv_heads: int | None = None  # where the file does not say; None: all heads
    head_width: int | None = None  # None: d_model / num_heads
    biases: tuple[str, ...] = ()  # that the file may say
    fixed: Mapping[str, Any] = {}
    window: str = "none"  # none | always | optional


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", biases=("attention_bias", "mlp_bias")),
    "mistral": _Family("MistralForCausalLM", kv_heads=8, window="always"),
    "qwen2": _Family("Qwen2ForCausalLM", kv_heads=32, fixed={"qkv_bias": True}, window="optional"),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        kv_heads=32,
        head_width=128,
        biases=("attention_bias",),
        fixed={"qk_norm": True},
        window="optional",
    ),
}
_MISTRAL_WINDOW = 4096


class Described(NamedTuple):
    """What a description says of a model.

    `max_length` are the positions that it was made for, 0 if not said; `note` is what we have said of one of ours.
    """

    architecture: Architecture
    vocab_size: int
    max_length: int = 0
    note: Mapping[str, Any] = MappingProxyType({})


def read_config(path: Path) -> Described:
    """What a config.json says.

    Raises:
      CheckpointFormatError: it cannot be read, or says something that is not known here; names all of it in one line.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointFormatError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointFormatError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointFormatError(f"{path} should hold a JSON object, with model_type and so on")
    try:
        return described(content)
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{path}: {error}") from None


def described(content: dict) -> Described:
    """The same of the content. Raises CheckpointFormatError."""
    fields = Fields(content)
    kind = fields.take("model_type", str, "")
    if kind not in _FAMILIES:
        raise CheckpointFormatError(f"model_type = {kind!r} is not one of {', '.join(_FAMILIES)}")
    family = _FAMILIES[kind]
    sizes = _sizes(fields, family)
    max_length = fields.take("max_position_embeddings", int, 0)
    vocab_size = fields.take("vocab_size", int)
    _check_activation(fields)
    architecture = Architecture(
        **sizes,
        **(LLAMA | _biases(fields, family) | dict(family.fixed)),
        norm_epsilon=fields.take("rms_norm_eps", float, 1e-6),
        sliding_window=_window(fields, family, sizes["num_layers"]),
        tied_embeddings=fields.take("tie_word_embeddings", bool, False),
        rope=read_rope(fields, max_length),
    )
    if vocab_size < 1:
        fields.problem("vocab_size", f"= {vocab_size} should be at least 1")
    note = fields.take(NOTE, dict, {})
    fields.refuse_unknown(_IGNORED, _NEUTRAL)
    if not fields.problems:  # sizes that are missing stand for nothing
        fields.problems += architecture.problems()
    fields.refuse()
    return Described(architecture, vocab_size, max_length, note)


def _sizes(fields, family):
    heads, width = fields.take("num_attention_heads", int), fields.take("hidden_size", int)
    kv_heads = fields.take("num_key_value_heads", int, family.kv_heads or heads)
    head_width = fields.take("head_dim", int, family.head_width or 0)
    return {
        "num_layers": fields.take("num_hidden_layers", int),
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": 0 if kv_heads == heads else kv_heads,
        "d_head": 0 if head_width * heads == width else head_width,
        "d_mlp": fields.take("intermediate_size", int),
    }


def _check_activation(fields):
    name = fields.take("hidden_act", str, "silu")
    if name not in ("silu", "swish"):
        fields.problem("hidden_act", f"= {name!r} should be 'silu'")


def _biases(fields, family):
    said = {name: fields.take(name, bool, False) for name in family.biases}
    attention = said.get("attention_bias", False)
    biases = {"qkv_bias": attention, "attention_out_bias": attention}
    return biases | ({"mlp_bias": said["mlp_bias"]} if "mlp_bias" in said else {})


def _window(fields, family, num_layers) -> int:
    """Of all layers; a mix of layers becomes a problem."""
    if family.window == "none":
        return 0
    there = "sliding_window" in fields.values
    window = fields.take("sliding_window", int, 0 if there else _MISTRAL_WINDOW)
    if family.window == "optional" and not fields.take("use_sliding_window", bool, False):
        window = 0
    kinds = _kinds_of_layers(fields, family, window, num_layers)
    if kinds <= {"full_attention"}:
        return 0
    if kinds != {"sliding_attention"}:
        fields.problem("layer_types", f"is a mix of {', '.join(sorted(kinds))}: only models of like layers are known")
    elif window < 1:
        fields.problem("layer_types", "says sliding_attention, and sliding_window or use_sliding_window does not")
    return window


def _kinds_of_layers(fields, family, window, num_layers) -> set[str]:
    said = fields.values.get("layer_types")
    fields.take("layer_types", list, [])
    if isinstance(said, list) and said:
        return {str(kind) for kind in said}
    full = fields.take("max_window_layers", int, 28) if family.window == "optional" else 0
    kinds = {"sliding_attention"} if window and full < num_layers else set()
    return kinds | ({"full_attention"} if full > 0 or not window else set())


def config_fields(architecture: Architecture, vocab_size: int, max_length: int) -> dict:
    """The inverse of `described`: the content of a config.json. Raises CheckpointFormatError for other backbones."""
    kind = _family_of(architecture)
    a = architecture
    fields = {
        "architectures": [_FAMILIES[kind].class_name],
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": a.d_model,
        "intermediate_size": a.mlp_width,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": a.norm_epsilon,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": a.tied_embeddings,
        **rope_fields(a.rope),
    }
    biases = {"attention_bias": a.attention_out_bias, "mlp_bias": a.mlp_bias}
    fields |= {name: biases[name] for name in _FAMILIES[kind].biases}
    if kind == "mistral":
        fields["sliding_window"] = a.sliding_window or None
    elif a.sliding_window:
        fields |= {"use_sliding_window": True, "sliding_window": a.sliding_window, "max_window_layers": 0}
    return fields


def _family_of(a: Architecture) -> str:
    """The one that has all that a backbone has."""
    if problems := list(_not_of_the_family(a)):
        raise CheckpointFormatError(
            f"not a backbone of the Llama family ({'; '.join(problems)}), which this layout is for"
        )
    biases = (a.qkv_bias, a.attention_out_bias, a.mlp_bias)
    families = {
        "llama": not a.qk_norm and a.qkv_bias == a.attention_out_bias and not a.sliding_window,
        "mistral": not a.qk_norm and not any(biases),
        "qwen2": not a.qk_norm and biases == (True, False, False),
        "qwen3": a.qk_norm and a.qkv_bias == a.attention_out_bias and not a.mlp_bias,
    }
    found = next((name for name, fits in families.items() if fits), None)
    if found is None:
        said = f"qkv_bias, attention_out_bias, mlp_bias = {', '.join(map(str, biases))}, qk_norm = {a.qk_norm}"
        raise CheckpointFormatError(f"no family of {', '.join(families)} has {said} and such a window together")
    return found


def is_of_family(a: Architecture) -> bool:
    """Whether its norms, MLPs and output layer are those of the family."""
    return not any(_not_of_the_family(a))


def _not_of_the_family(a):
    for name in ("norm", "mlp", "output_bias"):
        if getattr(a, name) != LLAMA[name]:
            yield f"model.{name} = {getattr(a, name)!r}"
