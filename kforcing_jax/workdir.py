"""The run directory: whose it is, and where its parts are. `training.checkpoints` has the models in it.

config.json  data/  stages/<name>/checkpoints/  metrics.jsonl  summary.json  report.html
"""

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from kforcing_jax.config import Config, parse
from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.data.preparation import prepare
from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.data.whole_file import write_text
from kforcing_jax.errors import ConfigError, RunError

# Fields that change what is reported or where it runs, but not what is trained.
_FREE = ("evaluation", "logging", "mesh")
_FREE_FIELDS = ("data.prepared", "data.reader_processes")


class Workdir:
    """A run directory and the configuration that it belongs to."""

    def __init__(self, path: Path, config: Config):
        self.path, self.config = path, config

    @classmethod
    def at(cls, path: str | Path, config: Config) -> "Workdir":
        """The directory of a run, as it is, for a look at it. Raises RunError when the path is a URL."""
        return cls(_local(path), config)

    @classmethod
    def claim(cls, path: str | Path, config: Config) -> "Workdir":
        """Opens the directory for a run of `config`, creating it when it is new.

        `evaluation`, `logging` and `mesh` may change at any time, a stage until it has a checkpoint, and the rest until
        the data is prepared; new stages may join.

        Raises:
          RunError: the directory belongs to another configuration; names the first field that differs.
        """
        path = _local(path)
        fields = dataclasses.asdict(config)
        if (path / "config.json").exists():
            _check_same_run(path, _read_config(path), fields)
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / "config.json", fields)
        except OSError as error:
            raise RunError(f"--workdir={path} cannot be written: {error.strerror}") from None
        return cls(path, config)

    @classmethod
    def open(cls, path: str | Path) -> "Workdir":
        """Opens the directory of an earlier run. Raises RunError when there is none."""
        path = _local(path)
        if not (path / "config.json").exists():
            raise RunError(f"{path} is not a run directory (no config.json); train one with kforcing_jax.main")
        try:
            return cls(path, parse(_read_config(path)))
        except ConfigError as error:
            raise RunError(f"{path / 'config.json'}: {error}") from None

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    def summary(self) -> dict:
        """What summary.json holds; an empty one before the first stage has ended."""
        if not self.summary_path.exists():
            return {"stages": {}}
        return json.loads(self.summary_path.read_text())

    def write_summary(self, summary: dict):
        write_json(self.summary_path, summary)

    def checkpoints_path(self, stage: str) -> Path:
        return self.path / "stages" / stage / "checkpoints"

    @property
    def data_path(self) -> Path:
        """Where the prepared data is, or will be."""
        return Path(self.config.data.prepared).expanduser() if self.config.data.prepared else self.path / "data"

    def corpus(self) -> Corpus:
        """The prepared data, prepared now (by the first process) if it is not there.

        Raises:
          RunError: there is no prepared data in `data.prepared`.
        """
        if self.config.data.prepared and not (self.data_path / "manifest.json").exists():
            there = "holds no prepared data" if self.data_path.exists() else "is not there"
            raise RunError(
                f"data.prepared = {self.config.data.prepared!r} {there}; run python -m kforcing_jax.prepare with the "
                "same flags"
            )

        def prepared():
            return prepare(self.config.data, self.config.seed, self.data_path)

        if jax.process_count() == 1:
            return prepared()
        if jax.process_index() == 0:
            prepared()
        multihost_utils.sync_global_devices("data")
        return prepared()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the prepared data. Raises RunError when there is none."""
        path = self.data_path / "tokenizer.json"
        if not path.exists():
            raise RunError(f"{path} is missing; run kforcing_jax.main on this directory first")
        return Tokenizer.load(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training here meanwhile. Raises RunError when one does already."""
        if jax.process_index():
            yield
            return
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"--workdir={self.path} is in use: another process trains there; wait for it, or give another one"
                ) from None
            except OSError:
                pass  # not every mounted bucket has locks
            yield


def _local(path) -> Path:
    if "://" in str(path):
        raise RunError(
            f"--workdir={path} is a URL; mount the bucket (gcsfuse, see docs/cloud.md) and give the path of the mount"
        )
    return Path(path)


def write_json(path: Path, content):
    """Writes a file whole or not at all; of several processes, the first one does."""
    if jax.process_index():
        return
    write_text(path, json.dumps(content, indent=2) + "\n")


def _read_config(path):
    try:
        return json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise RunError(
            f"{path / 'config.json'} is damaged ({error}); restore it or use another work directory"
        ) from None


def _check_same_run(path, before, now):
    before, now = _flatten(before), _flatten(now)
    for name, value in before.items():
        if now.get(name) != value and _is_settled(path, name):
            raise RunError(
                f"{path} belongs to a different config: {name} = {value!r} there, {now.get(name)!r} here; "
                "use another --workdir, or set the field back"
            )


def _is_settled(path, field) -> bool:
    """Whether the directory already holds something that this field has shaped."""
    group, _, rest = field.partition(".")
    if group == "stages":
        return _has_checkpoint(path / "stages" / rest.split(".")[0])
    if group in _FREE or field in _FREE_FIELDS:
        return False
    return (path / "data").exists() or any(map(_has_checkpoint, (path / "stages").glob("*")))


def _has_checkpoint(stage: Path) -> bool:
    return any(child.name.isdecimal() for child in (stage / "checkpoints").glob("*"))


def _flatten(tree, path=""):
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        name: value
        for key, child in tree.items()
        for name, value in _flatten(child, f"{path}.{key}".strip(".")).items()
    }
