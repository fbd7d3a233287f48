"""Students out of folders that `model_folders` writes: of the Llama family, and gated ones of any backbone."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from kforcing_jax.data.places import expanded
from kforcing_jax.interop import official
from kforcing_jax.interop.config_json import CONFIG, Described
from kforcing_jax.interop.llama_weights import digest_of_leaves
from kforcing_jax.interop.official import check_note
from kforcing_jax.interop.safetensor_folders import Tensor, read_header
from kforcing_jax.interop.stored_models import (
    ADAPTER,
    describe,
    digest,
    is_model,
    load_params,
    model_config,
    reported,
    shardings_of,
)
from kforcing_jax.interop.tensor_files import NOTE
from kforcing_jax.interop.torch_zip import CheckpointFormatError
from kforcing_jax.models import CausalLM, PushForwardLM, init_params
from kforcing_jax.models.gated import in_weights_dtype, own_params, with_own


def holds_student(path: str | Path) -> bool:
    """Whether a folder holds a student of ours, and not an AR model. Raises CheckpointFormatError."""
    folder = expanded(path)
    if not folder.is_dir():
        return False
    return (folder / ADAPTER).is_file() or ((folder / CONFIG).is_file() and "window" in describe(path).note)


def read_note(path: str | Path) -> dict[str, Any]:
    """What a folder says of the student in it, entries of `official.NOTES`. Raises CheckpointFormatError."""
    adapter = expanded(path) / ADAPTER
    with reported(path):
        note = _note_of(adapter) if adapter.is_file() else dict(describe(path).note)
        check_note(note)
    return note


def load_student(
    path: str | Path, base: str | Path | None = None, *, dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[PushForwardLM, dict]:
    """Reads a student: (model, params).

    Args:
      path: its folder.
      base: of a gated student, whose folder has only what noise rows add: the folder, GGUF file or released checkpoint
        of its teacher, by default the one that it names.
      dtype, mesh: as of `huggingface.load`; what noise rows add is f32 in any case.

    Raises:
      CheckpointFormatError: it is no student, is damaged, or the base is another one than it was trained on.
    """
    note = read_note(path)
    if not (expanded(path) / ADAPTER).is_file():
        if "window" not in note:
            raise CheckpointFormatError(f"{path}: it holds an AR model, not a student; huggingface.load reads it")
        cfg = model_config(describe(path), note, dtype)
        return PushForwardLM(cfg), load_params(path, cfg, mesh=mesh, of_student=True)
    with reported(path):
        base = base or note.get("base")
        if base is None:
            raise CheckpointFormatError("it adds to a teacher that it does not name; give that as the base")
        if is_model(base):
            cfg = model_config(describe(base), note, dtype)
            found = digest(base, note.get("weights_dtype", "float32"))
        else:
            teacher, text = _released_teacher(base)
            cfg = model_config(Described(teacher.cfg, teacher.cfg.vocab_size), note, dtype)
            found = digest_of_leaves(in_weights_dtype(note.get("weights_dtype", "float32"), text))
        if found != note.get("base_digest"):
            raise CheckpointFormatError(
                f"it was trained on another base than {base} (weights {str(note.get('base_digest'))[:8]}; those of "
                f"{base} are {found[:8]})"
            )
        own = _own(expanded(path) / ADAPTER, cfg, mesh)
    params = load_params(base, cfg, mesh=mesh) if is_model(base) else _placed(teacher, text, cfg, mesh)
    return PushForwardLM(cfg), with_own(params, own)


def _released_teacher(base) -> tuple[CausalLM, dict]:
    """In vocabulary order."""
    model, params = official.load(base)
    if not isinstance(model, CausalLM):
        raise CheckpointFormatError(f"the base {base} is a student, and no AR model")
    model, params = official.in_order(model, params, None)
    return CausalLM(model.cfg), params


def _placed(teacher, params, cfg, mesh) -> dict:
    """A teacher's weights as those of a model that has them."""
    leaves = flatten_dict(in_weights_dtype(cfg.weights_dtype, official.in_order(teacher, params, cfg.cdf_order)[1]))
    return unflatten_dict(
        {
            path: jax.device_put(leaf, sharding)
            for (path, leaf), sharding in zip(leaves.items(), shardings_of(leaves, mesh), strict=True)
        }
    )


def _note_of(adapter) -> dict[str, Any]:
    said = read_header(adapter)[1].get(NOTE, "{}")
    try:
        note = json.loads(said)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointFormatError(f"{adapter} is damaged ({error})") from None
    if not isinstance(note, dict) or "adapter_rank" not in note:
        raise CheckpointFormatError(f"{adapter} does not say what it adds to which teacher")
    return note


def _own(adapter, cfg, mesh) -> dict:
    """What the teacher does not have."""
    tensors = read_header(adapter)[0]
    model = PushForwardLM(cfg)
    shapes = flatten_dict(own_params(jax.eval_shape(lambda: init_params(model, jax.random.key(0)))))
    expected = {".".join(path): leaf.shape for path, leaf in shapes.items()}
    there = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = [name for name in expected | there if expected.get(name) != there.get(name)]
    if wrong:
        raise CheckpointFormatError(
            f"{ADAPTER}: {wrong[0]} is {there.get(wrong[0], 'missing')}, expected {expected.get(wrong[0], 'none')}"
        )
    unread = sorted({tensor.dtype for tensor in tensors.values() if not tensor.is_readable})
    if unread:
        raise CheckpointFormatError(f"{ADAPTER}: numbers of type {', '.join(unread)} are not read, only floating ones")
    leaves = {path: _in_order(path, tensors[".".join(path)], cfg) for path in shapes}
    placed = [
        jax.device_put(leaf, sharding)
        for leaf, sharding in zip(leaves.values(), shardings_of(shapes, mesh), strict=True)
    ]
    return unflatten_dict(dict(zip(leaves, placed, strict=True)))


def _in_order(path, tensor: Tensor, cfg) -> np.ndarray:
    leaf = np.array(tensor.rows(), np.float32)
    if not np.isfinite(leaf).all():
        raise CheckpointFormatError(f"{ADAPTER}: {'.'.join(path)} holds values that are not finite; it is of no use")
    is_of_tokens = "output_delta" in path and path[-1] != "down" and cfg.cdf_order is not None
    return leaf[..., cfg.cdf_order.tokens_V] if is_of_tokens else leaf
