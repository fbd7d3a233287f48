"""How a command or a run takes a released model: with its tokenizer, as a student, as a teacher."""

from pathlib import Path
from typing import NamedTuple

from kforcing_jax.config import Config
from kforcing_jax.data.pretrained import load_pretrained
from kforcing_jax.data.tokenizers import Tokenizer, is_trained
from kforcing_jax.errors import ConfigError, DataError, RunError
from kforcing_jax.interop import official
from kforcing_jax.interop.official import RELEASES, Release
from kforcing_jax.models import CausalLM, PushForwardLM

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
    """A released model, ready to decode. `tokenizer`, `release` and the trained `window` are None when not known."""

    model: CausalLM | PushForwardLM
    params: dict
    tokenizer: Tokenizer | None
    release: Release | None
    window: int | None = None

    def tokens_per_pass(self, wanted: int | None) -> int:
        """`wanted`, by default the trained window. Raises ConfigError when that is smaller."""
        if isinstance(self.model, CausalLM):
            return 1
        if wanted and self.window and wanted > self.window:
            raise ConfigError(f"--k={wanted} exceeds the window that this student was trained with, {self.window}")
        return wanted or self.window or _RELEASED_WINDOW


def open_released(
    path: str | Path, tokenizer: str | None = None, weights: str = "state_dict", needs_tokenizer: bool = True
) -> Released:
    """A released file with its tokenizer: `tokenizer` (a name or path), or the one that its vocabulary size says.

    Unless `needs_tokenizer`, there is none when that one is not to be had.

    Raises:
      CheckpointFormatError: as `official.load`.
      DataError: the tokenizer is not to be had, or has another vocabulary than the checkpoint.
    """
    model, params = official.load(path, weights=weights)
    release = RELEASES.get(model.cfg.vocab_size)
    name = tokenizer or (release and release.tokenizer)
    window = official.trained_window(path)
    if name is None:
        return Released(model, params, None, None, window)
    try:
        loaded = load_pretrained(name)
    except DataError:
        if needs_tokenizer or tokenizer:
            raise
        return Released(model, params, None, release, window)
    if (loaded.vocab_size, loaded.mask_id) != (model.cfg.vocab_size, model.cfg.mask_id):
        raise DataError(
            f"tokenizer {name!r} has {loaded.vocab_size} ids, of which {loaded.mask_id} is the mask; {path} has "
            f"{model.cfg.vocab_size} and {model.cfg.mask_id}; give the one that it was trained with as --tokenizer"
        )
    return Released(model, params, loaded, release, window)


def open_teacher(path: str | Path, student: Released) -> Released:
    """The released AR model that a student's tokens are compared with.

    Raises:
      CheckpointFormatError: as `official.load`.
      DataError: it is not an AR model, or has another vocabulary than the student.
    """
    model, params = official.load(path)
    if not isinstance(model, CausalLM):
        raise DataError(f"--teacher={path} is a student; give the AR checkpoint that it was distilled from")
    if model.cfg.vocab_size != student.model.cfg.vocab_size:
        raise DataError(f"--teacher={path} has {model.cfg.vocab_size} ids, --checkpoint {student.model.cfg.vocab_size}")
    return Released(model, params, student.tokenizer, student.release)


def check_teacher_of(config: Config):
    """Raises what `load_for` would, as far as a configuration tells, before anything is prepared or trained."""
    path = config.stages["ar"].checkpoint
    if path:
        sizes = {name: getattr(config.model, name) for name in ("num_layers", "d_model", "num_heads")}
        if not is_trained(config.data):
            sizes["vocab_size"] = config.data.vocab_size
        _check_teacher(path, official.load(path)[0], sizes)


def load_for(path: str | Path, model: CausalLM) -> dict:
    """The parameters of a released file that is to be `model`.

    Raises:
      CheckpointFormatError: as `official.load`.
      RunError: the file holds another model; names the first field that differs.
    """
    loaded, params = official.load(path)
    _check_teacher(path, loaded, {name: getattr(model.cfg, name) for name in _FIELDS})
    return params


def _check_teacher(path, loaded, sizes):
    if not isinstance(loaded, CausalLM):
        raise RunError(f"stages.ar.checkpoint = {str(path)!r} is a student, the teacher of a curriculum is an AR model")
    for name, size in sizes.items():
        there = getattr(loaded.cfg, name)
        if there != size:
            raise RunError(f"stages.ar.checkpoint = {str(path)!r} has {name} = {there}, {_FIELDS[name]} says {size}")
