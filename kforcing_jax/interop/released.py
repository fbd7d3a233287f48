"""How a command or a run takes a released model: with its tokenizer, as a student, as a teacher."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from kforcing_jax.config import Config
from kforcing_jax.data.pretrained import digest, load_pretrained
from kforcing_jax.data.tokenizers import Tokenizer, is_trained
from kforcing_jax.errors import ConfigError, DataError, RunError
from kforcing_jax.interop import huggingface, official
from kforcing_jax.interop.official import RELEASES, Release
from kforcing_jax.interop.torch_zip import CheckpointFormatError
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM
from kforcing_jax.sharding import parameter_shardings

# Tokens per pass of a student whose file does not say: 4 is what was released.
_RELEASED_WINDOW = 4

# What says these sizes of the model that a released teacher is to be.
_FIELDS = {
    "vocab_size": "the tokenizer of the data",
    "num_layers": "model.num_layers",
    "d_model": "model.d_model",
    "num_heads": "model.num_heads",
}


class Released(NamedTuple):
    """A released model, ready to decode, and what its file says of it (`official.NOTES`).

    `tokenizer` and `release` are None when not known, as are what the file and the release would say.
    """

    model: CausalLM | PushForwardLM
    params: dict
    tokenizer: Tokenizer | None
    release: Release | None
    note: Mapping = MappingProxyType({})

    @property
    def window(self) -> int | None:
        """Tokens of a pass that a student was trained with."""
        return self.note.get("window")

    @property
    def tau_range(self) -> tuple[float, float] | None:
        """The temperatures that a student was trained with."""
        return (self.note["tau_min"], self.note["tau_max"]) if {"tau_min", "tau_max"} <= self.note.keys() else None

    @property
    def top_p(self) -> float:
        """Of the nucleus that a student's tokens are from; 1 where nothing says so."""
        return self.note.get("top_p", 1.0)

    @property
    def usual_tau(self) -> float:
        """1, or the temperature nearest to it that a student knows."""
        low, high = self.tau_range or (1.0, 1.0)
        return min(max(1.0, low), high)

    @property
    def seq_len(self) -> int | None:
        """The longest text."""
        return self._said("seq_len")

    @property
    def prefix_length(self) -> int | None:
        """Tokens of a prefix that are kept."""
        return self._said("prefix_length")

    @property
    def eos_id(self) -> int | None:
        """What ends a text."""
        return self.tokenizer.eos_id if self.tokenizer else self._said("eos_id")

    def tokens_per_pass(self, wanted: int | None) -> int:
        """`wanted`, by default the trained window. Raises ConfigError when that is smaller."""
        if isinstance(self.model, CausalLM):
            return 1
        if wanted and self.window and wanted > self.window:
            raise ConfigError(f"k = {wanted} exceeds the window that this student was trained with, {self.window}")
        return wanted or self.window or _RELEASED_WINDOW

    def _said(self, name):
        return self.note.get(name, getattr(self.release, name, None))


def open_released(
    path: str | Path,
    tokenizer: str | None = None,
    weights: str = "state_dict",
    needs_tokenizer: bool = True,
    base: str | None = None,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> Released:
    """A released file with its tokenizer: `tokenizer` (a name or path), or the one that its vocabulary size says.

    Or a folder or GGUF file of the Llama family, with the tokenizer that came along; `base` is the teacher of a gated
    student in a folder, by default the one that it names. `dtype` is that of its weights, and `mesh` where they lie;
    released files are f32 on the first device. Unless `needs_tokenizer`, there is no tokenizer when that one is not to
    be had.

    Raises:
      CheckpointFormatError: as `official.load` and `huggingface.load`.
      DataError: the tokenizer is not to be had, or has another vocabulary than the checkpoint.
    """
    if huggingface.is_model(path):
        return _open_model(path, tokenizer, weights, needs_tokenizer, base, {"dtype": dtype, "mesh": mesh})
    if base:
        raise CheckpointFormatError(f"{path}: a base ({base}) is for a folder of a gated student; leave that out")
    model, params = official.load(path, weights=weights)
    note = official.read_note(path)
    release = RELEASES.get(model.cfg.vocab_size)
    name = tokenizer or (release.tokenizer if release else None)
    if name is None:
        return Released(model, params, None, None, note)
    try:
        loaded = load_pretrained(name)
        _check_vocabulary(path, name, loaded, model.cfg, note)
    except DataError:
        if needs_tokenizer or tokenizer:
            raise
        return Released(model, params, None, release, note)
    return Released(model, params, loaded, release, note)


def _open_model(path, tokenizer, weights, needs_tokenizer, base, settings) -> Released:
    if weights != "state_dict":
        raise CheckpointFormatError(f"{path}: no averaged weights ({weights}) in a folder or GGUF file; leave that out")
    model, params, note = _load_any(path, base, **settings)
    loaded = None
    try:
        loaded = load_pretrained(tokenizer) if tokenizer else huggingface.tokenizer(path)
    except DataError:
        if needs_tokenizer or tokenizer:
            raise
    if loaded and tokenizer:
        _check_vocabulary(path, tokenizer, loaded, model.cfg, note)
    return Released(model, params, loaded, None, note)


def _load_any(path, base=None, **settings):
    """Products of f32 numbers, those of the output layer, are as exact as without a dtype of the weights."""
    model, params, note = huggingface.load_any(path, base, **settings)
    return type(model)(dataclasses.replace(model.cfg, precision=ModelConfig.precision)), params, note


def _check_vocabulary(path, name, tokenizer, cfg, note):
    if (tokenizer.vocab_size, tokenizer.mask_id) != (cfg.vocab_size, cfg.mask_id):
        raise DataError(
            f"tokenizer {name!r} has {tokenizer.vocab_size} ids, of which {tokenizer.mask_id} is the mask; {path} has "
            f"{cfg.vocab_size} and {cfg.mask_id}; give the tokenizer that it was trained with"
        )
    if note.get("vocabulary", digest(tokenizer.backend)) != digest(tokenizer.backend):
        raise DataError(
            f"tokenizer {name!r} has other tokens than {path} was trained with, or the same in another order; "
            "give the tokenizer that it was trained with"
        )


def open_teacher(
    path: str | Path, student: Released, *, dtype: str | None = None, mesh: Mesh | None = None
) -> Released:
    """The released AR model that a student's tokens are compared with, in the student's order of tokens on [0, 1).

    `dtype` and `mesh` are as of `open_released`.

    Raises:
      CheckpointFormatError: as `official.load` and `huggingface.load`.
      DataError: it is not an AR model, or has another vocabulary than the student.
    """
    if huggingface.is_model(path):
        model, params, note = _load_any(path, dtype=dtype, mesh=mesh)
    else:
        (model, params), note = official.load(path), official.read_note(path)
    if not isinstance(model, CausalLM):
        raise DataError(f"teacher {path} is a student; give the AR checkpoint that the student was distilled from")
    if model.cfg.vocab_size != student.model.cfg.vocab_size:
        raise DataError(f"teacher {path} has {model.cfg.vocab_size} ids, its student {student.model.cfg.vocab_size}")
    if len({each["vocabulary"] for each in (note, student.note) if "vocabulary" in each}) > 1:
        raise DataError(f"teacher {path} was trained with another vocabulary than the student, of the same size")
    model, params = official.in_order(model, params, student.model.cfg.cdf_order)
    return Released(model, params, student.tokenizer, student.release, note)


def check_teacher_of(config: Config) -> None:
    """Raises what `load_for` would, as far as a configuration tells, before anything is prepared or trained."""
    path = config.stages["ar"].checkpoint
    if path and huggingface.is_model(path):
        huggingface.check(path)  # its sizes are those of the configuration, see `teachers`
    elif path:
        sizes = {name: getattr(config.model, name) for name in ("num_layers", "d_model", "num_heads")}
        if not is_trained(config.data):
            sizes["vocab_size"] = config.data.vocab_size
        _check_teacher(path, official.load(path)[0], sizes)


def load_for(path: str | Path, model: CausalLM, tokenizer: Tokenizer | None = None, mesh: Mesh | None = None) -> dict:
    """The parameters of a released file, folder or GGUF file that is to be `model`, on texts of `tokenizer`.

    They lie on the mesh, by default on the first device.

    Raises:
      CheckpointFormatError: as `official.load` and `huggingface.load`.
      RunError: it holds another model (names the first field that differs), or says another vocabulary.
    """
    if huggingface.is_model(path):
        _check_same_model(path, model, tokenizer)
        return huggingface.load_params(path, model.cfg, mesh=mesh)
    params = _of_released_file(path, model, tokenizer)
    return params if mesh is None else jax.device_put(params, parameter_shardings(params, mesh))


def _check_same_model(path, model, tokenizer):
    found = huggingface.describe(path)
    there = {name: getattr(found.architecture, name) for name in huggingface.FIELDS}
    there |= {"vocab_size": found.vocab_size, "mask_id": found.note.get("mask_id")}
    for name, value in there.items():
        if getattr(model.cfg, name) != value:
            raise RunError(
                f"stages.ar.checkpoint = {str(path)!r} has {name} = {value}, the configuration says "
                f"{getattr(model.cfg, name)}"
            )
    try:
        theirs = huggingface.tokenizer(path)
    except DataError:  # it comes without one
        return
    if tokenizer and tokenizer.digest != theirs.digest:
        raise RunError(
            f"stages.ar.checkpoint = {str(path)!r} has another vocabulary than the data ({theirs.digest[:8]}; that of "
            f"the data is {tokenizer.digest[:8]}); set data.tokenizer to its path, and prepare the data anew"
        )


def _of_released_file(path, model, tokenizer) -> dict:
    loaded, params = official.load(path)
    _check_teacher(path, loaded, {name: getattr(model.cfg, name) for name in _FIELDS})
    said = official.read_note(path)
    ours = {"mask_id": model.cfg.mask_id} | ({"vocabulary": digest(tokenizer.backend)} if tokenizer else {})
    for name, value in ours.items():
        if said.get(name, value) != value:
            raise RunError(
                f"stages.ar.checkpoint = {str(path)!r} has {name} = {said[name]}, the tokenizer of the data {value}"
            )
    return official.in_order(loaded, params, model.cfg.cdf_order)[1]


def _check_teacher(path, loaded, sizes):
    if not isinstance(loaded, CausalLM):
        raise RunError(f"stages.ar.checkpoint = {str(path)!r} is a student, the teacher of a curriculum is an AR model")
    for name, size in sizes.items():
        there = getattr(loaded.cfg, name)
        if there != size:
            raise RunError(f"stages.ar.checkpoint = {str(path)!r} has {name} = {there}, {_FIELDS[name]} says {size}")
