"""From a source to prepared data: a plan of shards, written in parallel in the folder where they stay.

manifest.json is written last: where it is, the data is complete. Until then a plan and a lock say whose work the folder
is, and a note beside every finished shard lets an interrupted call go on.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
from pathlib import Path

import tqdm

from kforcing_jax.config import DataConfig
from kforcing_jax.data import pretrained
from kforcing_jax.data.chat_template import TEMPLATE, template_files
from kforcing_jax.data.choices import PACKINGS
from kforcing_jax.data.paths import difference, fingerprints
from kforcing_jax.data.pipeline import (
    FORMAT,
    MUCH_UNKNOWN,
    SPLITS,
    Corpus,
    check_shards,
    load,
    made_from,
    read_manifest,
    unknown_share,
)
from kforcing_jax.data.shards import Shard, Task, run_all
from kforcing_jax.data.tokenizers import SETTINGS, Tokenizer, is_trained, train_tokenizer
from kforcing_jax.data.units import Units, first_texts, reader
from kforcing_jax.data.whole_file import write_text
from kforcing_jax.errors import DataError, RunError

_LOCK, _PLAN = "preparing.lock", "preparing.json"
# A fresh disk has this folder.
_NOBODYS = ("lost+found",)
_log = logging.getLogger("kforcing_jax")


def prepare(config: DataConfig, seed: int, directory: str | Path, workers: int | None = None) -> Corpus:
    """The corpus of a config, prepared in `directory` unless it is there already.

    `workers` processes write shards, by default one per core. What an interrupted call has finished stays in the
    directory, and is used by the next one. A call waits for another that is at work on the same directory.

    Raises:
      DataError: the text cannot be read, or is too short for one row in each split.
      RunError: the directory holds something else, data of another config or seed, or of files that have changed; is
        damaged, or cannot be written.
    """
    directory = Path(directory)
    try:
        if not is_prepared(directory):
            _check_ours(directory)
            with _one_at_a_time(directory):
                # Somebody else may have finished it meanwhile.
                if not is_prepared(directory):
                    _prepare(config, seed, directory, workers or os.cpu_count())
                _tidy(directory)
        elif (directory / _LOCK).exists():
            # After one that was killed at the very end; a copy that is read-only may keep it.
            with contextlib.suppress(OSError):
                _tidy(directory)
    except OSError as error:
        raise RunError(f"{directory} cannot be written: {error.strerror or error}") from None
    corpus = load(config, seed, directory)
    _check_unchanged(config, seed, directory)
    return corpus


def is_prepared(directory: Path) -> bool:
    """Whether a folder holds prepared data, complete."""
    return (directory / "manifest.json").exists()


def _check_ours(directory):
    """Empty folders (mount points) are filled and our own unfinished ones go on; no other is touched."""
    if not directory.is_dir():
        return
    inside = {path.name for path in directory.iterdir()} - set(_NOBODYS)
    if inside and not inside & {_LOCK, _PLAN}:
        raise RunError(
            f"{directory} holds no prepared data (no manifest.json) but {min(inside)}, so it is left alone; give an "
            "empty folder, or one that does not exist"
        )


@contextlib.contextmanager
def _one_at_a_time(directory):
    is_new = not directory.exists()
    with _locked(directory / _LOCK):
        try:
            yield
        finally:
            if not is_prepared(directory) and not any(directory.glob("*-of-*.json")):
                # Without a finished shard there is nothing to go on from.
                _remove(_leftovers(directory))
            (directory / _LOCK).unlink(missing_ok=True)
            if is_new:
                with contextlib.suppress(OSError):  # not empty
                    directory.rmdir()


def _locked(path):
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        with contextlib.suppress(OSError):  # not every mounted bucket has locks
            fcntl.flock(file, fcntl.LOCK_EX)
        # The one that had it has removed it: a third one may hold a new file of that name.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _prepare(config, seed, directory, workers):
    tokenizer, units = _plan(config, seed, directory)
    shards = _write_shards(config, directory, units, workers)
    manifest = _manifest(config, seed, directory, tokenizer, shards)
    for split in SPLITS:
        check_shards(directory, manifest[split], thorough=True)
        share = unknown_share(manifest[split])
        if share > MUCH_UNKNOWN:
            _log.warning(
                "%.1f%% of the tokens of the %s split are outside the vocabulary of data.tokenizer = %r: nothing can "
                "be learnt of them; raise data.vocab_size = %d, take another tokenizer or give more text",
                *(100 * share, split, config.tokenizer, config.vocab_size),
            )
    write_text(directory / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def _leftovers(directory) -> list[Path]:
    """What only the preparation itself needs, what a killed one has left, and shards that have no rows."""
    kept = {"manifest.json", "tokenizer.json", SETTINGS, TEMPLATE} if is_prepared(directory) else set()
    if kept:
        manifest = read_manifest(directory)
        kept |= {shard["file"] for split in SPLITS for shard in manifest[split]["shards"]}
    ours = ("*-of-*.json", "*-of-*.arrayrecord", "*.tmp", _PLAN, "tokenizer.json", SETTINGS, TEMPLATE)
    return [path for pattern in ours for path in directory.glob(pattern) if path.name not in kept]


def _tidy(directory):
    _remove([*_leftovers(directory), directory / _LOCK])


def _remove(paths):
    for path in paths:
        path.unlink(missing_ok=True)


def _plan(config: DataConfig, seed: int, directory: Path) -> tuple[Tokenizer, Units]:
    """The tokenizer, and what every shard of both splits is made from; written down, or found as it was."""
    source = reader(config, seed)
    # A pre-trained vocabulary first: it is wrong, or not there, in seconds.
    tokenizer, units = source.tokenizer(), source.units()
    tokenizer = tokenizer or train_tokenizer(config, first_texts(units["train"]))
    path = directory / _PLAN
    before = json.loads(path.read_text()) if path.exists() else {}
    plan = {
        "made_from": made_from(config, seed),
        "units": {split: len(group) for split, group in units.items()},
        "tokenizer": tokenizer.digest,
        "origin": _origin(config, seed, before.get("origin")),
    }
    if before:
        _check_same_plan(before, plan, directory)
    else:
        tokenizer.save(directory / "tokenizer.json")
        source.save_beside(directory, tokenizer)
        write_text(path, json.dumps(plan))
    return tokenizer, units


def _origin(config, seed, known=None) -> dict[str, dict[str, list]]:
    """What the files of the text, and of a tokenizer that has files, are; by the field that names them.

    Of a field that is not in `known` nothing is asked, where that is given.
    """
    fields = {
        "data.path": lambda: reader(config, seed).files(),
        "data.tokenizer": lambda: [] if is_trained(config) else pretrained.local_files(config.tokenizer),
    }
    if config.chat_template:
        fields["data.chat_template"] = lambda: template_files(config.chat_template)
    known = dict.fromkeys(fields) if known is None else known
    return {name: fingerprints(fields[name](), known[name]) for name in fields if name in known}


def _check_same_plan(before, plan, directory):
    changed = [
        f"{name} changed from {before['made_from'].get(name)!r}"
        for name, value in plan["made_from"].items()
        if before["made_from"].get(name) != value
    ]
    changed += filter(None, (difference(before["origin"][name], plan["origin"][name]) for name in plan["origin"]))
    changed += [f"the {name} changed" for name in ("units", "tokenizer") if before[name] != plan[name]]
    if changed:
        raise RunError(
            f"{directory} was begun with another text or configuration: {changed[0]}; delete the folder to begin again"
        )


def _check_unchanged(config, seed, directory):
    """Raises RunError when files that the rows were made from are here, and are no longer what they were."""
    manifest, fields = read_manifest(directory), made_from(config, seed)
    # Another path is said to be another place of the same.
    made = manifest["made_from"]
    same = {name: before for name, before in manifest["origin"].items() if made.get(name) == fields.get(name)}
    try:
        now = _origin(config, seed, same)
    except DataError:
        return  # they are not here, and nothing needs them
    for name, before in same.items():
        what = now[name] and difference(before, now[name])
        if what:
            raise RunError(
                f"{directory} was prepared from another {name}: {what}; delete the folder and prepare it again, or put "
                "back what was there"
            )


def _write_shards(config, directory, units, workers) -> dict[str, list[Shard]]:
    shards = {}
    with tqdm.tqdm(total=sum(map(len, units.values())), unit="shard", desc="preparing", mininterval=1) as bar:
        tokens = 0

        def report(shard):
            nonlocal tokens
            tokens += shard.document_tokens
            bar.set_postfix_str(f"{tokens:,} tokens")
            bar.update()

        # Validation is little, and may turn out to be empty.
        for split, group in sorted(units.items(), reverse=True):
            tasks = [
                Task(
                    unit=unit,
                    tokenizer_path=directory / "tokenizer.json",
                    path=_shard_path(directory, split, index, len(group)),
                    packing=config.packing,
                    seq_len=config.seq_len,
                )
                for index, unit in enumerate(group)
            ]
            shards[split] = run_all(tasks, workers, report)
            _check_not_empty(config, directory, split, shards[split])
    return shards


def _shard_path(folder, split, index, count) -> Path:
    return folder / f"{split}-{index:05}-of-{count:05}.arrayrecord"


def _check_not_empty(config, directory, split, shards):
    if not any(shard.rows for shard in shards):
        # There is nothing in these shards to go on with.
        _remove(_leftovers(directory))
        tokens, documents = sum(s.document_tokens for s in shards), sum(s.documents for s in shards)
        raise DataError(
            f"the {split} split has {tokens} tokens in {documents} documents, fewer than one row of "
            f"data.seq_len = {config.seq_len}; shorten it, change data.validation_fraction = "
            f"{config.validation_fraction} or give more text"
        )


def _manifest(config, seed, directory, tokenizer, shards) -> dict:
    return {
        "format": FORMAT,
        "made_from": made_from(config, seed),
        "origin": json.loads((directory / _PLAN).read_text())["origin"],
        "dtype": tokenizer.dtype.name,
        "segmented": PACKINGS[config.packing].segmented,
        **({"answers": True} if config.loss_on == "answers" else {}),
        **{split: _split_manifest(directory, split, written) for split, written in shards.items()},
    }


def _split_manifest(directory, split, shards):
    paths = [_shard_path(directory, split, index, len(shards)) for index in range(len(shards))]
    sums = ("rows", "documents", "document_tokens", "unknown_tokens", "useful_tokens", "skipped")
    files = [{"file": path.name} | dataclasses.asdict(s) for path, s in zip(paths, shards, strict=True) if s.rows]
    return {name: sum(getattr(shard, name) for shard in shards) for name in sums} | {"shards": files}
