"""The run directory: whose it is, and where its parts are. `training.checkpoints` has the models in it.

config.json  data/  stages/<name>/checkpoints/  metrics.jsonl  summary.json  report.html
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from kforcing_jax.config import Config, parse, stage_name, successors
from kforcing_jax.data.pipeline import Corpus, load
from kforcing_jax.data.places import expanded
from kforcing_jax.data.preparation import prepare
from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.data.whole_file import write_text
from kforcing_jax.errors import ConfigError, RunError

_LOG = logging.getLogger("kforcing_jax")

# Fields that change what is reported or where it runs, but not what is trained.
_FREE = ("evaluation", "logging", "mesh")
# Other data is noticed by what stages keep of theirs, see training.records.
_FREE_FIELDS = ("data.prepared", "data.reader_processes")
# Directories that this process has locked, and how many times.
_LOCKED: dict[Path, int] = {}


class Workdir:
    """A run directory and the configuration that it belongs to.

    `Workdir(path)` opens the directory of an earlier run.

    Raises:
      RunError: there is no run in the directory, or its config.json is damaged; the path is a URL.
    """

    def __init__(self, path: str | Path, config: Config | None = None):
        self.path = _local(path)
        self.config = _config_of_run(self.path) if config is None else config

    @classmethod
    def at(cls, path: str | Path, config: Config) -> "Workdir":
        """The directory of a run, as it is, for a look at it. Raises RunError when the path is a URL."""
        return cls(path, config)

    @classmethod
    def claim(cls, path: str | Path, config: Config) -> "Workdir":
        """Opens the directory for a run of `config`, creating it when it is new.

        `evaluation`, `logging` and `mesh` may change at any time, the `steps` of a stage until one that came from its
        end has a checkpoint, its other fields until it has one too, and the rest until the data is prepared; new
        stages may join. Once something is trained, only `keep_config` writes what has changed, when data and stages
        are known to fit.

        Raises:
          RunError: the directory belongs to another configuration; names the first field that differs. Or another
            process trains there, or it cannot be written.
        """
        workdir = cls.at(path, config)
        with workdir.locked():
            if workdir._config_path.exists():
                _check_same_run(workdir.path, _read_config(workdir._config_path), config)
            if not _trained_stages(workdir.path):
                workdir.keep_config()
        return workdir

    @classmethod
    def open(cls, path: str | Path) -> "Workdir":
        """`Workdir(path)`, by a name. Raises RunError when there is no run."""
        return cls(path)

    @property
    def _config_path(self) -> Path:
        return self.path / "config.json"

    def keep_config(self) -> None:
        """Writes config.json. Raises RunError when it cannot be written."""
        try:
            write_json(self._config_path, dataclasses.asdict(self.config))
        except OSError as error:
            raise _not_writable(self.path, error) from None

    @property
    def metrics_path(self) -> Path:
        """Of metrics.jsonl: what stages report while they train."""
        return self.path / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        """Of summary.json: what was measured of stages."""
        return self.path / "summary.json"

    def summary(self) -> dict:
        """What summary.json holds; nothing before the first stage has ended, or where the file is damaged."""
        try:
            summary = json.loads(self.summary_path.read_text(encoding="utf-8"))
            if not all(isinstance(stage, dict) for stage in summary["stages"].values()):
                raise TypeError("its stages are no objects")
            return summary
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            _LOG.warning(f"{self.summary_path} is damaged ({error}); it is written anew")
        return {"stages": {}}

    @contextlib.contextmanager
    def changed_summary(self) -> Iterator[dict]:
        """The summary, to be changed in place and written at the end. Other processes wait meanwhile.

        Raises:
          RunError: it cannot be written.
        """
        try:
            with contextlib.ExitStack() as stack:
                if jax.process_index() == 0:
                    file = stack.enter_context((self.path / ".summary.lock").open("a"))
                    with contextlib.suppress(OSError):  # not every mounted bucket has locks
                        fcntl.flock(file, fcntl.LOCK_EX)
                summary = self.summary()
                yield summary
                write_json(self.summary_path, summary)
        except OSError as error:
            raise _not_writable(self.summary_path, error) from None

    def is_writable(self) -> bool:
        """Whether files can be made in the directory."""
        return os.access(self.path, os.W_OK | os.X_OK)

    def checkpoints_path(self, stage: str) -> Path:
        """The folder of a stage's checkpoints, each of them called by its step."""
        return self.path / "stages" / stage / "checkpoints"

    def source(self, stage: str) -> "tuple[Workdir, str] | None":
        """The run and its stage that `init_from` of a stage names, RUN or RUN/STAGE; None without.

        Raises:
          RunError: there is no such run, or it is this one.
        """
        text = self.config.stages[stage].init_from
        if not text:
            return None
        whole = _local(text)
        field = f"stages.{stage}.init_from = {text!r}"
        if (whole / "config.json").exists():
            run, named = whole, stage
        elif (whole.parent / "config.json").exists():
            run, named = whole.parent, whole.name
        else:
            raise RunError(f"{field}: neither {whole} nor {whole.parent} is a run directory (no config.json)")
        if run.resolve() == self.path.resolve():
            raise RunError(
                f"{field} is this run; name another one, or leave it out: students start from their teachers"
            )
        return Workdir(run), stage_name(named)

    @property
    def data_path(self) -> Path:
        """Where the prepared data is, or will be."""
        return expanded(self.config.data.prepared) if self.config.data.prepared else self.path / "data"

    def corpus(self) -> Corpus:
        """The prepared data, prepared now if it is not there.

        Raises:
          RunError: there is no prepared data in `data.prepared`, or none for several processes.
        """
        if not (self.data_path / "manifest.json").exists():
            there = "holds no prepared data" if self.data_path.exists() else "is not there"
            if self.config.data.prepared:
                raise RunError(
                    f"data.prepared = {self.config.data.prepared!r} {there}; run python -m kforcing_jax.prepare with "
                    "the same flags"
                )
            if jax.process_count() > 1:
                raise RunError(
                    f"{self.data_path} {there}, and a run of several processes does not prepare it; run python -m "
                    "kforcing_jax.prepare with the same configuration and work directory first"
                )
        return prepare(self.config.data, self.config.seed, self.data_path)

    def prepared(self) -> Corpus:
        """The prepared data as it is, whatever has become of the text since. Raises RunError when there is none."""
        return load(self.config.data, self.config.seed, self.data_path)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the prepared data. Raises RunError when there is none."""
        path = self.data_path / "tokenizer.json"
        if not path.exists():
            raise RunError(f"{path} is missing; run kforcing_jax.main on this directory first")
        return Tokenizer.load(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training here meanwhile; within it, this process may lock again.

        The directory is made if it is not there. Of several processes of a run, the first one locks.

        Raises:
          RunError: another process trains here, or the directory cannot be written.
        """
        key = self.path.absolute()
        if jax.process_index():
            yield
            return
        with contextlib.ExitStack() as stack:
            if not _LOCKED.get(key):
                stack.enter_context(_lock_file(self.path))
            _LOCKED[key] = _LOCKED.get(key, 0) + 1
            try:
                yield
            finally:
                _LOCKED[key] -= 1


def _lock_file(folder: Path):
    """An open file whose lock keeps others out until it is closed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")  # not "w": a refused run changes nothing here
    except FileExistsError:
        raise RunError(f"{folder} is a file; a work directory is a folder, use another one") from None
    except OSError as error:
        raise _not_writable(folder, error) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(
            f"{folder} is in use: another process trains there; wait for it, or use another work directory"
        ) from None
    except OSError:
        pass  # not every mounted bucket has locks
    return file


def _not_writable(path, error) -> RunError:
    return RunError(f"{path} cannot be written: {error.strerror or error}")


def _local(path) -> Path:
    if "://" in str(path):
        raise RunError(
            f"the work directory {path} is a URL; mount the bucket (gcsfuse, see docs/cloud.md) and give the path of "
            "the mount"
        )
    return expanded(path)


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all; of several processes, the first one does. Raises OSError."""
    if jax.process_index():
        return
    write_text(path, json.dumps(content, indent=2) + "\n")


def _config_of_run(path: Path) -> Config:
    if not (path / "config.json").exists():
        raise RunError(f"{path} is not a run directory (no config.json); train one with kforcing_jax.main")
    try:
        return parse(_read_config(path / "config.json"))
    except ConfigError as error:
        raise RunError(f"{path / 'config.json'}: {error}") from None


def _read_config(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        return content
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}); restore it or use another work directory") from None


def complete_steps(directory: Path) -> list[int]:
    """Steps of complete checkpoints, the newest first: orbax gives a directory this name when all is in it."""
    return sorted((int(child.name) for child in directory.glob("*") if child.name.isdecimal()), reverse=True)


def _check_same_run(path, before, config):
    with contextlib.suppress(ConfigError):
        before = dataclasses.asdict(parse(before))  # what was not a field yet had the value of its default
    before, now = _flatten(before), _flatten(dataclasses.asdict(config))
    # What the whole run shares comes first: another config altogether is to be seen as one.
    for name, value in sorted(before.items(), key=lambda field: field[0].startswith("stages.")):
        if now.get(name) == value:
            continue
        stage = name.split(".")[1] if name.startswith("stages.") else None
        if stage and stage not in config.stages:
            _check_may_leave(path, stage)
        elif stage and name.endswith(".steps"):
            _check_steps(path, stage, value, config)
        elif shaped := _shaped_by(name, path, config):
            raise RunError(
                f"{path} belongs to a different config: {name} = {value!r} there, {now.get(name)!r} here; use another "
                f"work directory, set the field back, or delete what came from it ({', '.join(shaped)})"
                + (f"; of a stage that has begun only stages.{stage}.steps may change" if stage else "")
            )


def _check_may_leave(path, stage):
    """Later fields of a trained stage could not be compared with those that it was trained with."""
    if stage in _trained_stages(path):
        raise RunError(
            f"{path} has trained stages.{stage}, which is not in this config; leave it in, for what is finished is not "
            f"trained again, or delete {path / 'stages' / stage}"
        )


def _check_steps(path, stage, before, config):
    """The end of a stage may move while nothing has come from it, to where there is something to go on from."""
    if config.stages[stage].checkpoint:
        return  # it has no steps
    steps, field = config.stages[stage].last_step, f"stages.{stage}.steps"
    trained = [name for name in successors(config, stage) if name in _trained_stages(path)]
    if trained:
        folders = ", ".join(str(path / "stages" / name) for name in trained)
        raise RunError(
            f"{field} = {before} in {path}, {steps} here: {', '.join(trained)} came from {stage} at step {before}; set "
            f"it back, or delete what would have to be trained again ({folders})"
        )
    there = complete_steps(path / "stages" / stage / "checkpoints")
    if there and steps < min(there):
        raise RunError(
            f"{field} = {steps}: stage {stage} of {path} has no checkpoint so early, only at steps "
            f"{', '.join(map(str, sorted(there)))}; give one of these or more, or delete {path / 'stages' / stage}"
        )


def _shaped_by(field, path, config) -> list[str]:
    """What is in the directory already and came from this field: a stage shapes those that come from it too."""
    group, _, rest = field.partition(".")
    trained = _trained_stages(path)
    if group == "stages":
        stage = rest.split(".")[0]
        trained = [name for name in trained if name in (stage, *successors(config, stage))]
    elif group in _FREE or field in _FREE_FIELDS:
        return []
    data = ["data"] if group != "stages" and (path / "data" / "manifest.json").exists() else []
    return data + [f"stages/{name}" for name in trained]


def _trained_stages(path) -> list[str]:
    """Stages that have a checkpoint."""
    return sorted(stage.name for stage in (path / "stages").glob("*") if complete_steps(stage / "checkpoints"))


def _flatten(tree, path=""):
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        name: value
        for key, child in tree.items()
        for name, value in _flatten(child, f"{path}.{key}".strip(".")).items()
    }
