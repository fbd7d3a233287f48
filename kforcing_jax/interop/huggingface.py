"""Models of the Llama family, from a folder as on the Hugging Face hub or from a GGUF file, and folders with ours.

    model, params = huggingface.load("SmolLM2-135M")        # config.json, *.safetensors, tokenizer.json
    model, params = huggingface.load("model.Q8_0.gguf")

Read are Llama, Mistral, Qwen2 and Qwen3. A path may also be the name of a model in `data.models.KNOWN_MODELS`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from kforcing_jax.architecture import Architecture
from kforcing_jax.data.model_tokenizers import chat_template, load_model_tokenizer
from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.interop.model_folders import save
from kforcing_jax.interop.official import check_note
from kforcing_jax.interop.stored_models import (
    DTYPES,
    FIELDS,
    check,
    describe,
    is_model,
    load_params,
    model_config,
    reported,
)
from kforcing_jax.interop.students import holds_student, load_student, read_note
from kforcing_jax.interop.torch_zip import CheckpointFormatError
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.noise import CdfOrder

__all__ = [
    "FIELDS",
    "architecture",
    "chat_template",
    "check",
    "describe",
    "is_model",
    "load",
    "load_any",
    "load_params",
    "load_student",
    "read_note",
    "save",
    "tokenizer",
]


def architecture(path: str | Path) -> tuple[Architecture, int]:
    """(architecture, number of ids) of a folder or GGUF file. Raises like `load`; no weights are read."""
    found = describe(path)
    return found.architecture, found.vocab_size


def load(
    path: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None, cdf_order: CdfOrder | None = None
) -> tuple[CausalLM, dict]:
    """Reads the model of a folder or GGUF file: (model, params).

    Args:
      path: a folder with config.json and safetensors files, or a .gguf.
      dtype: of the weights and of what is computed with them, float32 (by default) or bfloat16; scales of
        normalisations are f32 in any case.
      mesh: where the weights lie, split by `sharding.RULES`; by default all on the first device.
      cdf_order: how tokens lie on [0, 1); by default as the folder says, or in the order of their ids.

    Raises:
      CheckpointFormatError: it cannot be read, is damaged, or says or holds something that is not known here; one line
        that begins with the path.
      ValueError: another dtype.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
    found = describe(path)
    with reported(path):
        check_note(found.note)
        cfg = model_config(found, found.note, dtype)
    if cdf_order is not None:
        cfg = dataclasses.replace(cfg, cdf_order=cdf_order)
    return CausalLM(cfg), load_params(path, cfg, mesh=mesh)


def load_any(
    path: str | Path, base: str | Path | None = None, **settings: Any
) -> tuple[CausalLM | PushForwardLM, dict, dict]:
    """`load` or `load_student` by what there is, and what is said of it (entries of `official.NOTES`).

    Raises:
      CheckpointFormatError: as these, or a base is given where there is nothing to add to one.
    """
    if holds_student(path):
        note = read_note(path)
        if base and "adapter_rank" not in note:
            raise CheckpointFormatError(f"{path}: it has all weights of its own, a base ({base}) has no effect")
        return *load_student(path, base, **settings), note
    if base:
        raise CheckpointFormatError(f"{path}: it is an AR model, a base ({base}) has no effect")
    found = describe(path)
    length = {"seq_len": found.max_length} if found.max_length else {}
    return *load(path, **settings), length | dict(found.note)


def tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that comes along with a model, which has no mask. Raises DataError as `load_model_tokenizer`."""
    return load_model_tokenizer(path)
