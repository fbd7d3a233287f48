"""Files of named tensors, of torch or of safetensors: read by what they hold, written by what they are called."""

import contextlib
import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kforcing_jax.data.places import expanded
from kforcing_jax.data.whole_file import whole_file
from kforcing_jax.errors import ConfigError, RunError
from kforcing_jax.interop import torch_zip
from kforcing_jax.interop.torch_zip import CheckpointFormatError, StoredTensor, damage_reported

# Beside the tensors, where no other code looks: what they do not say.
NOTE = "kforcing_jax"


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[object]:
    """The content of a file while it is open: {"state_dict": `StoredTensor`s by name, NOTE: {...}}.

    A file of torch.save may hold anything else as well, or instead.

    Raises:
      CheckpointFormatError: as `torch_zip.opened`. Its message, and that of any CheckpointFormatError raised while the
        file is open, is one line that begins with the path.
    """
    file = expanded(path)
    try:
        with (_opened_safetensors if _is_safetensors(file) else torch_zip.opened)(file) as content:
            yield content
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{path}: {' '.join(str(error).split())}") from None


def check_writable_format(path: str | Path) -> None:
    """Raises ConfigError when the ending of a path is not that of a format that can be written here."""
    ending = Path(path).suffix
    if ending not in _WRITERS:
        raise ConfigError(f"{path} should end in one of {', '.join(_WRITERS)}, which says the format")
    if ending != ".safetensors" and not importlib.util.find_spec("torch"):
        raise ConfigError(
            f"{path}: a {ending} is written by torch; pip install 'kforcing-jax[torch]', or name a .safetensors"
        )


def write(path: str | Path, state: dict[str, np.ndarray], note: dict) -> None:
    """Writes tensors by name, and a note that JSON can hold. The file is there whole or not at all.

    Raises:
      ConfigError: as `check_writable_format`.
      RunError: it cannot be written.
    """
    check_writable_format(path)
    path = expanded(path)
    try:
        with whole_file(path) as temporary:
            _WRITERS[path.suffix](temporary, {name: np.ascontiguousarray(array) for name, array in state.items()}, note)
    except RunError:
        raise
    except Exception as error:  # torch and safetensors have their own for a full disk
        raise RunError(f"{path} cannot be written: {_reason(error)}") from None


def _is_safetensors(path) -> bool:
    """The header's length in 8 bytes, then the header, which is JSON."""
    try:
        with open(path, "rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False  # said by who opens it next


@contextlib.contextmanager
def _opened_safetensors(path):
    import safetensors

    with contextlib.ExitStack() as stack:
        with damage_reported():
            file = stack.enter_context(safetensors.safe_open(path, framework="np"))
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            note = json.loads((file.metadata() or {}).get(NOTE, "{}"))
        yield {"state_dict": {name: _stored(file, name, shape) for name, shape in shapes.items()}, NOTE: note}


def _stored(file, name, shape) -> StoredTensor:
    def read():
        with damage_reported():
            return file.get_tensor(name)

    return StoredTensor(shape, read)


def _write_safetensors(path, state, note):
    from safetensors.numpy import save_file

    save_file(state, path, metadata={NOTE: json.dumps(note)})


def _write_torch(path, state, note):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # arrays of JAX are read-only
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    # Opened here, because torch does not say why it could not write.
    with open(path, "wb") as file:
        torch.save({"state_dict": tensors, NOTE: note}, file)


_WRITERS = {".ckpt": _write_torch, ".pt": _write_torch, ".safetensors": _write_safetensors}


def _reason(error) -> str:
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    return getattr(error, "strerror", None) or " ".join(str(error).split())
