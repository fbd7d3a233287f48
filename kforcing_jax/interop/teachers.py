"""A teacher that is there already, of the Llama family: what a configuration takes over from it."""

import dataclasses
from pathlib import Path
from typing import Any

from kforcing_jax.architecture import Architecture, Rope
from kforcing_jax.config import BackboneConfig, Config, DataConfig
from kforcing_jax.data.choices import source
from kforcing_jax.data.model_tokenizers import has_model, load_model_tokenizer
from kforcing_jax.data.models import is_known
from kforcing_jax.data.places import expanded
from kforcing_jax.errors import ConfigError, DataError, RunError
from kforcing_jax.interop import huggingface
from kforcing_jax.workdir import Workdir

_FIELD = "stages.ar.checkpoint"


def with_teacher(config: Config, run: str | Path | None = None) -> Config:
    """The configuration with the architecture, vocabulary and tokenizer of its `stages.ar.checkpoint`.

    Only of a folder or GGUF file of the Llama family; with another checkpoint, or none, it is as it was.

    Args:
      config: fields at their defaults are filled in, others have to be the teacher's.
      run: the run directory, which says the same where it has the teacher already, and its folder is gone.

    Raises:
      CheckpointFormatError: the teacher is not one that is read.
      ConfigError: fields say something else than the teacher; names all of them.
    """
    path = config.stages["ar"].checkpoint
    if not path:
        return config
    if not is_known(path) and not expanded(path).exists():
        return _as_before(config, run)
    if not huggingface.is_model(path):
        return config
    found = huggingface.describe(path)
    problems = [
        *_contradictions(config.model, found.architecture),
        *_other_vocabulary(config.data, path, found.vocab_size),
    ]
    if problems:
        raise ConfigError(
            f"{_FIELD} = {path!r} is another model: {'; '.join(problems)}; leave these fields out, or set them so"
        )
    return _filled(config, found.architecture, found.vocab_size, path)


def _as_before(config, run) -> Config:
    """The same from the configuration of a run that began with the same teacher."""
    try:
        before = Workdir(run).config if run else None
    except RunError:
        before = None
    path = config.stages["ar"].checkpoint
    if before is None or before.stages["ar"].checkpoint != path or not _names_model(before.data.tokenizer, path):
        return config  # what is wrong is said by whoever opens it
    return _filled(config, before.model, before.data.vocab_size, path)


def _filled(config, architecture: Architecture, vocab_size, path) -> Config:
    fields = {field.name: getattr(architecture, field.name) for field in dataclasses.fields(Architecture)}
    data: dict[str, Any] = {"vocab_size": vocab_size}
    if config.data.tokenizer == DataConfig.tokenizer:
        data["tokenizer"] = _as_tokenizer(path)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **fields),
        data=dataclasses.replace(config.data, **data),
    )


def _contradictions(model: BackboneConfig, teacher: Architecture):
    """Fields of a model that are neither at their default nor as the teacher has them, one by one."""
    default = BackboneConfig()
    # What 0 stands for.
    meant = {"num_kv_heads": "kv_heads", "d_head": "head_width", "d_mlp": "mlp_width"}
    for field in dataclasses.fields(Architecture):
        name = field.name
        if name == "rope":
            yield from _differences("model.rope.", model.rope, teacher.rope, default.rope)
        elif name not in meant or getattr(model, name) != getattr(teacher, meant[name]):
            yield from _difference("model.", name, model, teacher, default)


def _differences(prefix, ours: Rope, theirs: Rope, default: Rope):
    for field in dataclasses.fields(Rope):
        yield from _difference(prefix, field.name, ours, theirs, default)


def _difference(prefix, name, ours, theirs, default):
    here, there = getattr(ours, name), getattr(theirs, name)
    if here not in (there, getattr(default, name)):
        yield f"{prefix}{name} = {here!r} should be {there!r}"


def _other_vocabulary(data: DataConfig, path: str, vocab_size: int):
    if "tokenizer" not in source(data.source).fields:
        yield f"data.source = {data.source!r} has a vocabulary of its own, and should be text"
    if data.vocab_size not in (vocab_size, DataConfig.vocab_size):
        yield f"data.vocab_size = {data.vocab_size} should be {vocab_size}"
    is_taken = data.tokenizer == DataConfig.tokenizer or _names_model(data.tokenizer, path)
    if not is_taken and not _is_same_tokenizer(data.tokenizer, path):
        yield f"data.tokenizer = {data.tokenizer!r} should be {_as_tokenizer(path)!r}"


def _is_same_tokenizer(name, path) -> bool:
    """Of another path; where the teacher comes without one, any of a model is taken."""
    if not has_model(name):
        return False
    try:
        theirs = load_model_tokenizer(path)
    except DataError:
        return True
    return load_model_tokenizer(name).digest == theirs.digest


def _names_model(tokenizer: str, path: str) -> bool:
    return tokenizer in (path, _as_tokenizer(path))


def _as_tokenizer(path: str) -> str:
    """A path as `data.tokenizer` takes it: with a slash, since names have none."""
    return path if "/" in path else f"./{path}"
