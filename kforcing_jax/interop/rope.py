"""Rotary scaling as Hugging Face's config.json has it: `rope_theta` with `rope_scaling`, or `rope_parameters`."""

import math

from kforcing_jax.architecture import ROPE_SCALINGS, Rope
from kforcing_jax.interop.fields import Fields

_BASE = 10_000.0
# Notes of how a model was made.
_IGNORED = ("finetuned", "original_rope_theta")
_NEUTRAL = {"factor": 1}
_WITH_LENGTH = ("llama3", "yarn")


def read_rope(config: Fields, max_length: int) -> Rope:
    """The rotary positions of a config.json. What is wrong or not known becomes a problem of the fields.

    Args:
      config: all fields.
      max_length: `max_position_embeddings`, from which some are worked out; 0 where it is not known.
    """
    base = config.take("rope_theta", float, _BASE)
    scaling, parameters = config.take("rope_scaling", dict, {}), config.take("rope_parameters", dict, {})
    name = "rope_scaling" if scaling else "rope_parameters"
    fields = Fields(scaling or parameters, config.problems, f"{name}.")
    base = fields.take("rope_theta", float, base)
    old_name = fields.take("type", str, "default")
    kind = fields.take("rope_type", str, old_name)
    share = fields.take("partial_rotary_factor", float, config.take("partial_rotary_factor", float, 1.0))
    if share != 1:
        fields.problem("partial_rotary_factor", f"= {share:g}: only whole heads that are rotated are known here")
    if kind not in ROPE_SCALINGS:
        fields.problem("rope_type", f"= {kind!r} is not one of {', '.join(ROPE_SCALINGS)}")
        return Rope()
    rope = Rope(base=base, scaling=kind, **_OF_KIND[kind](fields, *_lengths(config, fields, max_length)))
    fields.refuse_unknown(_IGNORED, _NEUTRAL)
    return rope


def _lengths(config, fields, max_length):
    """(before, after) scaling. That beside the group comes first; without any of them nothing was stretched."""
    inside = fields.take("original_max_position_embeddings", int, max_length)
    return config.take("original_max_position_embeddings", int, inside), max_length


def _default(fields, length, max_length):
    del fields, length, max_length
    return {}


def _linear(fields, length, max_length):
    del length, max_length
    return {"factor": fields.take("factor", float)}


def _llama3(fields, length, max_length):
    del max_length
    names = ("factor", "low_freq_factor", "high_freq_factor")
    return {name: fields.take(name, float) for name in names} | {"original_length": length}


def _yarn(fields, length, max_length):
    factor = fields.take("factor", float, max_length / max(length, 1))
    return {
        "factor": factor,
        "original_length": length,
        "beta_fast": fields.take("beta_fast", float, 0.0) or 32.0,
        "beta_slow": fields.take("beta_slow", float, 0.0) or 1.0,
        "truncate": fields.take("truncate", bool, True),
        "attention_factor": _attention_factor(fields, factor),
    }


def _attention_factor(fields, factor):
    """What cosines and sines are multiplied by; as the paper has it (Peng et al., 2023, equation 22) by default."""
    ours, all_channels = fields.take("mscale", float, 0.0), fields.take("mscale_all_dim", float, 0.0)
    by_default = _temperature(factor)
    if ours and all_channels:
        by_default = _temperature(factor, ours) / _temperature(factor, all_channels)
    return fields.take("attention_factor", float, by_default)


def _temperature(factor, scale=1.0):
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


_OF_KIND = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}


def rope_fields(rope: Rope) -> dict:
    """The inverse of `read_rope`: fields of a config.json that old and new readers take."""
    scaling: dict = {"rope_type": rope.scaling}
    if rope.scaling != "default":
        scaling["factor"] = rope.factor
    if rope.scaling in _WITH_LENGTH:
        scaling["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        names = ("beta_fast", "beta_slow", "truncate", "attention_factor")
        scaling |= {name: getattr(rope, name) for name in names}
    group = {"rope_theta": rope.base} | scaling
    old = {} if rope.scaling == "default" else {"rope_scaling": scaling}
    return {"rope_theta": rope.base, "rope_parameters": group} | old
