"""config.json of the Llama family on the Hugging Face hub, as an `Architecture`, and written from one.

Read are Llama, Mistral, Qwen2 and Qwen3. A file has to say the sizes: vocab_size, hidden_size, intermediate_size,
num_hidden_layers and num_attention_heads. What else it leaves out is as in transformers' own classes.
What changes what a model computes and is not known here is refused by its name; see `Fields.refuse_unknown`.
"""

import json
import re
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
    *("chat_template", "license", "model_name", "attn_implementation", "loss_type"),
    *("max_sequence_length", "max_seq_length", "seq_length"),
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
    max_length: int
    kv_heads: int | None = None  # where the file does not say; None: all heads
    head_width: int | None = None  # None: d_model / num_heads
    biases: tuple[str, ...] = ()  # that the file may say
    fixed: Mapping[str, Any] = {}
    window: str = "none"  # none | always | optional


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", 2048, biases=("attention_bias", "mlp_bias")),
    "mistral": _Family("MistralForCausalLM", 131_072, kv_heads=8, window="always"),
    "qwen2": _Family("Qwen2ForCausalLM", 32_768, kv_heads=32, fixed={"qkv_bias": True}, window="optional"),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        32_768,
        kv_heads=32,
        head_width=128,
        biases=("attention_bias",),
        fixed={"qk_norm": True},
        window="optional",
    ),
}
_MISTRAL_WINDOW = 4096
# What fields of ours are called in a file.
_NAMES = {
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "d_mlp": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "rope.base": "rope_theta",
    "rope.original_length": "original_max_position_embeddings",
}


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
    except (ValueError, RecursionError) as error:
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
        said = content.get("model_type")
        raise CheckpointFormatError(f"model_type = {said!r:.60} is not one of {', '.join(_FAMILIES)}")
    family = _FAMILIES[kind]
    sizes = _sizes(fields, family)
    max_length = fields.take_length("max_position_embeddings", family.max_length)
    vocab_size = fields.take_size("vocab_size")
    _check_activation(fields)
    architecture = Architecture(
        **sizes,
        **(LLAMA | _biases(fields, family) | dict(family.fixed)),
        norm_epsilon=fields.take("rms_norm_eps", float, 1e-6),
        sliding_window=_window(fields, family, sizes["num_layers"]),
        tied_embeddings=fields.take("tie_word_embeddings", bool, False),
        rope=read_rope(fields, max_length),
    )
    note = fields.take(NOTE, dict, {})
    _refuse_quantised(fields)
    fields.refuse_unknown(_IGNORED, _NEUTRAL)
    if not fields.problems:  # sizes that are missing stand for nothing
        fields.problems += map(_by_names_of_the_file, architecture.problems())
    fields.refuse()
    return Described(architecture, vocab_size, max_length, note)


def _sizes(fields, family):
    heads, width = fields.take_size("num_attention_heads"), fields.take_size("hidden_size")
    # One that is null is that of all heads, in every family.
    by_default = heads if "num_key_value_heads" in fields.values else family.kv_heads or heads
    kv_heads = fields.take_size("num_key_value_heads", by_default)
    head_width = fields.take_size("head_dim", family.head_width or 0)
    return {
        "num_layers": fields.take_size("num_hidden_layers"),
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": 0 if kv_heads == heads else kv_heads,
        "d_head": 0 if head_width * heads == width else head_width,
        "d_mlp": fields.take_size("intermediate_size"),
    }


def _by_names_of_the_file(problem: str) -> str:
    def name(found):
        return _NAMES.get(found[1], found[1].removeprefix("rope."))

    return re.sub(r"\bmodel\.([a-z_]+(?:\.[a-z_]+)?)", name, problem)


def _check_activation(fields):
    name = fields.take("hidden_act", str, "silu")
    if name not in ("silu", "swish"):
        fields.problem("hidden_act", f"= {name!r} should be 'silu'")


def _refuse_quantised(fields):
    for name in ("quantization_config", "compression_config"):
        if said := fields.take(name, dict, {}):
            method = said.get("quant_method", "of some kind")
            fields.problem(name, f"({method}): quantised weights are not read, only floating ones, and GGUF files")


def _biases(fields, family):
    said = {name: fields.take(name, bool, False) for name in family.biases}
    attention = said.get("attention_bias", False)
    biases = {"qkv_bias": attention, "attention_out_bias": attention}
    return biases | ({"mlp_bias": said["mlp_bias"]} if "mlp_bias" in said else {})


def _window(fields, family, num_layers) -> int:
    """Of all layers; a mix of layers becomes a problem."""
    window = _said_window(fields, family)
    full = fields.take("max_window_layers", int, 28) if family.window == "optional" else 0
    kinds = {"sliding_attention"} if window and full < num_layers else set()
    kinds |= {"full_attention"} if full > 0 or not window else set()
    said = {str(kind) for kind in fields.take("layer_types", list, [])} or kinds
    if len(said) > 1:
        fields.problem("layer_types", f"is a mix of {', '.join(sorted(said))}: only models of like layers are known")
    elif said == {"sliding_attention"} and window < 1:
        fields.problem("layer_types", "says sliding_attention, and nothing else that there is a window")
    elif said != kinds and (family.window != "optional" or not said <= {"full_attention", "sliding_attention"}):
        fields.problem("layer_types", f"says {', '.join(said)}, and sliding_window = {window or None}")
    return window if said == {"sliding_attention"} else 0


def _said_window(fields, family) -> int:
    """Before it is clear which layers have it; 0: none."""
    if family.window == "none":
        return 0
    by_default = 0 if "sliding_window" in fields.values else _MISTRAL_WINDOW
    if family.window == "optional" and not fields.take("use_sliding_window", bool, False):
        fields.take("sliding_window", int, 0)
        return 0
    return fields.take_length("sliding_window", by_default)


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
