"""Folders in the layout of the Hugging Face hub, of teachers and students, as they are written.

A teacher, or an ordinary student:   config.json  model.safetensors (or shards with an index)  tokenizer.json ...
A gated student, without its base:   adapter.safetensors  tokenizer.json ...

Other code reads a student as the AR model of its text rows. What it does not look at says the rest: tensors
`noise_encoder.*`, and `kforcing_jax` in config.json or in the notes of adapter.safetensors, see `official.NOTES`.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from kforcing_jax.data.places import expanded
from kforcing_jax.data.tokenizers import MASK_NAME, ModelTokens, Tokenizer
from kforcing_jax.errors import ConfigError, RunError
from kforcing_jax.interop import official
from kforcing_jax.interop.config_json import CONFIG, config_fields, is_of_family
from kforcing_jax.interop.llama_weights import Weight, digest, digest_of_leaves, noise_encoder, weights_of
from kforcing_jax.interop.safetensor_folders import INDEX, WEIGHTS
from kforcing_jax.interop.stored_models import ADAPTER
from kforcing_jax.interop.tensor_files import NOTE
from kforcing_jax.interop.torch_zip import CheckpointFormatError
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.models.gated import base_params, own_params
from kforcing_jax.sharding import to_host

_LARGEST_FILE = 4 * 10**9


def save(
    folder: str | Path,
    model: CausalLM | PushForwardLM,
    params: dict,
    tokenizer: Tokenizer | None = None,
    largest_file: int = _LARGEST_FILE,
    chat_template: str | None = None,
    **note: object,
) -> None:
    """Writes a model of the Llama family, or a gated student of any backbone, into a new folder, whole or not at all.

    Args:
      folder: its parent is there, itself it is not, or is empty.
      tokenizer: that comes along, if there is one.
      largest_file: bytes from which on weights are split over several files.
      chat_template: of the tokenizer (Jinja), instead of the one that it came with.
      note: entries of `official.NOTES`; those that are None are left out. mask_id, cdf_order and, of gated students,
        adapter_rank, weights_dtype and base_digest are those of the model.

    Raises:
      ConfigError: something is in the folder.
      CheckpointFormatError: not a gated student, and the backbone is not of the Llama family.
      RunError: it cannot be written; nothing is left behind.
    """
    target = check_new_folder(folder)
    fields = {} if model.cfg.is_gated else _fields_of(model.cfg, note)
    note = _whole_note(model, params, note)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        if model.cfg.is_gated:
            _write_adapter(temporary / ADAPTER, model, params, note)
        else:
            _write_weights(temporary, model, params, largest_file)
            config = fields | _ids(tokenizer) | {"torch_dtype": "float32", NOTE: note}
            (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer:
            _as_of_model(tokenizer, model.cfg.vocab_size, chat_template).save(temporary / "tokenizer.json")
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_folder(folder: str | Path) -> Path:
    """The folder to write. Raises ConfigError when something is in it, or nothing can be written there."""
    path = expanded(folder).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{folder} is there, and is not an empty folder; name a new one, or take it away")
    if not path.parent.is_dir():
        raise ConfigError(f"{folder}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: the directory {path.parent} is not writable")
    return path


def weights_digest(model: CausalLM | PushForwardLM, params: dict) -> str:
    """Of a teacher's weights, or of those that a gated student has of its teacher; in whatever order of the CDF."""
    _, params = official.in_order(model, params, None)
    base = base_params(params)
    if not is_of_family(model.cfg):
        return digest_of_leaves(base)
    leaves = flatten_dict(base)
    weights = weights_of(model.cfg, model.cfg.vocab_size)
    return digest(tensor for weight in weights for tensor in weight.write(_whole(leaves[weight.path])))


def _fields_of(cfg, note) -> dict[str, Any]:
    try:
        return config_fields(cfg, cfg.vocab_size, int(note.get("seq_len") or 0))
    except CheckpointFormatError as error:
        others = "; write a .safetensors or .ckpt" if official.can_hold(cfg) else ", and no other has such a model"
        raise CheckpointFormatError(f"{error}{others}") from None


def _whole_note(model, params, note) -> dict[str, Any]:
    order = model.cfg.cdf_order
    note |= {"mask_id": model.cfg.mask_id, "cdf_order": order and order.tokens_V.tolist()}
    if model.cfg.is_gated:
        note |= {"adapter_rank": model.cfg.adapter_rank, "base_digest": weights_digest(model, params)}
    if model.cfg.weights_dtype != "float32":
        note["weights_dtype"] = model.cfg.weights_dtype
    note = {name: value for name, value in note.items() if value is not None}
    official.check_note(note)
    return note


def _write_weights(folder, model, params, largest_file):
    """A file, or as many as keep below a size; each tensor of them alone is in memory twice."""
    from safetensors.numpy import save_file

    _, params = official.in_order(model, params, None)
    leaves = flatten_dict(params)
    weights = weights_of(model.cfg, model.cfg.vocab_size)
    if isinstance(model, PushForwardLM):
        weights += noise_encoder(model.cfg.d_model)
    shards = list(_shards(weights, model.cfg.num_layers, largest_file))
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = [WEIGHTS] if len(shards) == 1 else names
    tensors = (tensor for weight in weights for tensor in weight.write(_whole(leaves[weight.path])))
    places: dict[str, str] = {}
    for file, shard in zip(names, shards, strict=True):
        save_file(dict(next(tensors) for _ in shard), folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        size = sum(leaf.size * 4 for leaf in leaves.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _whole(leaf) -> np.ndarray:
    """In f32, without a copy where it is that already."""
    return np.asarray(to_host(leaf) if isinstance(leaf, jax.Array) else leaf, np.float32)


def _shards(weights: list[Weight], num_layers, largest_file) -> Iterator[list[str]]:
    """Names of the tensors of every file."""
    names: list[str] = []
    size = 0
    for name, shape in (stored for weight in weights for stored in weight.stored(num_layers)):
        if names and size + 4 * math.prod(shape) > largest_file:
            yield names
            names, size = [], 0
        names.append(name)
        size += 4 * math.prod(shape)
    yield names


def _write_adapter(file, model, params, note):
    from safetensors.numpy import save_file

    _, params = official.in_order(model, params, None)
    # The library writes memory as it lies.
    own = {
        ".".join(path): np.ascontiguousarray(_whole(leaf)) for path, leaf in flatten_dict(own_params(params)).items()
    }
    save_file(own, file, metadata={NOTE: json.dumps(note)})


def _ids(tokenizer) -> dict[str, int]:
    if tokenizer is None or tokenizer.eos_id is None:
        return {}
    return {"eos_token_id": tokenizer.eos_id} | ({} if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id})


def _as_of_model(tokenizer: Tokenizer, vocab_size: int, chat_template: str | None) -> Tokenizer:
    """What it says of itself then stands beside it."""
    said = tokenizer.of_model or _said(tokenizer, vocab_size)
    return Tokenizer(tokenizer.backend, said._replace(chat_template=chat_template or said.chat_template))


def _said(tokenizer, vocab_size) -> ModelTokens:
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "unk_token": tokenizer.unknown_id,
        MASK_NAME: tokenizer.mask_id,
    }
    tokens = tuple((name, str(tokenizer.backend.id_to_token(i))) for name, i in ids.items() if i is not None)
    return ModelTokens(vocab_size, tokens, tokenizer.begins_documents)
