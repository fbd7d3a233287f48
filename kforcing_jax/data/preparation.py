"""From a source to prepared data: a plan of shards, written in parallel, that survives an interruption.

Work goes on in a folder `<data>.partial`, which takes its final name when it is complete.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tqdm

from kforcing_jax.config import DataConfig
from kforcing_jax.data import lm1b, pretrained
from kforcing_jax.data.files import file_ranges, grouped, hold_out_last, matching_files
from kforcing_jax.data.packing import Rows
from kforcing_jax.data.pipeline import FORMAT, Corpus, load, made_from, verify
from kforcing_jax.data.shards import (
    Documents,
    FileDocuments,
    GivenDocuments,
    Lm1bDocuments,
    Shard,
    Task,
    run_all,
    token_dtype,
    write_rows,
)
from kforcing_jax.data.sources import load_documents, markov_chain, markov_rows
from kforcing_jax.data.tokenizers import (
    Tokenizer,
    check_vocabulary,
    is_trained,
    markov_tokenizer,
    train_tokenizer,
)
from kforcing_jax.data.whole_file import write_text
from kforcing_jax.errors import DataError, RunError

_SENTENCES_PER_SHARD = 500_000
_CHARACTERS_PER_SHARD = 64_000_000
# Of a streamed text, for the training of a vocabulary.
_CHARACTERS_FOR_TOKENIZER = 200_000_000

_Units = dict[str, Sequence[Documents]]


def prepare(config: DataConfig, seed: int, directory: str | Path, workers: int | None = None) -> Corpus:
    """The corpus of a config, prepared in `directory` unless it is there already.

    `workers` processes write shards, by default one per core. The directory appears when it is complete; what an
    interrupted call has finished is kept beside it, and used by the next one. A call waits for another that is at
    work on the same directory.

    Raises:
      ConfigError: no vocabulary can satisfy the config.
      DataError: the text cannot be read, or is too short for one row in each split.
      RunError: the directory holds data of another config or seed, is damaged, or cannot be written.
    """
    directory = Path(directory)
    if _is_to_be_filled(directory):
        check_vocabulary(config)
        with _one_at_a_time(directory):
            # Somebody else may have finished it meanwhile.
            if _is_to_be_filled(directory):
                _prepare(config, seed, directory, workers or os.cpu_count())
    return load(config, seed, directory)


def _is_to_be_filled(directory):
    """An empty folder may be somebody's mount point."""
    return not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))


@contextlib.contextmanager
def _one_at_a_time(directory):
    lock = directory.with_name(f"{directory.name}.lock")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(lock)
    except OSError as error:
        raise RunError(f"{directory} cannot be written: {error.strerror}") from None
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _locked(path):
    while True:
        file = path.open("w")
        with contextlib.suppress(OSError):  # not every mounted bucket has locks
            fcntl.flock(file, fcntl.LOCK_EX)
        # The one that had it has removed it: a third one may hold a new file of that name.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _prepare(config, seed, directory, workers):
    partial = directory.with_name(f"{directory.name}.partial")
    try:
        partial.mkdir(exist_ok=True)
        _continue(config, seed, partial, workers)
        verify(partial)
        partial.rename(directory)
        # Not before: until then an interrupted call goes on from these.
        for path in _notes(directory):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{directory} cannot be written: {error.strerror or error}") from None
    finally:
        # Without a finished shard there is nothing to go on from.
        if partial.exists() and not any(partial.glob("*-of-*.json")):
            shutil.rmtree(partial, ignore_errors=True)


def _notes(folder) -> list[Path]:
    """What only the preparation itself needs, and what a killed one has left."""
    return [*folder.glob("*-of-*.json"), *folder.glob("*.tmp"), folder / "plan.json"]


def _continue(config, seed, partial, workers):
    if config.source == "markov":
        tokenizer, rows = _markov(config, seed)
        tokenizer.save(partial / "tokenizer.json")
        shards = {split: [write_rows(_shard_path(partial, split, 0, 1), rows[split], 0)] for split in rows}
    else:
        tokenizer, units = _plan(config, seed)
        _check_same_plan(partial, tokenizer, units, config, seed)
        shards = _write_shards(config, partial, units, workers)
    _write_manifest(config, seed, partial, tokenizer, shards)


def _plan(config: DataConfig, seed: int) -> tuple[Tokenizer, _Units]:
    """The tokenizer, and what every shard of both splits is made from."""
    # A pre-trained vocabulary first: it is wrong, or not there, in seconds.
    tokenizer = None if is_trained(config) else pretrained.load_configured(config)
    if config.source == "lm1b":
        units = {"train": _sentences(config, "train"), "validation": _sentences(config, "test")}
    elif config.validation_documents:
        units = _streamed(config)
    else:
        units = _in_memory(config, seed)
    return tokenizer or train_tokenizer(config, _first_texts(units["train"])), units


def _sentences(config, split) -> list[Documents]:
    count = len(lm1b.open_split(config.path, split))
    starts = range(0, count, _SENTENCES_PER_SHARD)
    return [Lm1bDocuments(config.path, split, i, min(i + _SENTENCES_PER_SHARD, count)) for i in starts]


def _streamed(config) -> _Units:
    ranges = file_ranges(matching_files(config.path))
    train, validation = hold_out_last(ranges, config.document_separator, config.validation_documents)
    return {
        split: [FileDocuments(tuple(group), config.document_separator) for group in grouped(parts)]
        for split, parts in (("train", train), ("validation", validation))
    }


def _in_memory(config, seed) -> _Units:
    """Distinct documents in random order, a random part of them for validation."""
    documents = load_documents(config)
    if len(documents) < 2:
        raise DataError(
            f"data.path = {config.path!r} holds 1 document, and one is needed for training and one for validation; "
            f"check data.document_separator = {config.document_separator!r} or give more text"
        )
    order = np.random.default_rng([seed, 2]).permutation(len(documents))
    shuffled = [documents[i] for i in order]
    count = _num_validation(config.validation_fraction, len(documents))
    return {"train": _in_parts(shuffled[count:]), "validation": _in_parts(shuffled[:count])}


def _in_parts(documents) -> list[Documents]:
    ends = itertools.accumulate(map(len, documents))
    parts = itertools.groupby(zip(ends, documents, strict=True), lambda pair: pair[0] // _CHARACTERS_PER_SHARD)
    return [GivenDocuments(tuple(document for _, document in part)) for _, part in parts]


def _first_texts(units) -> Iterator[str]:
    read = 0
    for text in itertools.chain.from_iterable(unit.texts() for unit in units):
        yield text
        read += len(text)
        if read > _CHARACTERS_FOR_TOKENIZER:
            return


def _markov(config, seed) -> tuple[Tokenizer, dict[str, Rows]]:
    """The tokenizer and the rows of each split: every row is a sample path of its own."""
    tokenizer = markov_tokenizer(config.markov_states)
    rows_RxN = markov_rows(markov_chain(config, seed), seed, config.markov_rows, config.seq_len)
    rows_RxN = rows_RxN.astype(token_dtype(tokenizer))
    count = _num_validation(config.validation_fraction, len(rows_RxN))
    parts = {"train": rows_RxN[count:], "validation": rows_RxN[:count]}
    return tokenizer, {split: Rows(part_RxN, documents=len(part_RxN)) for split, part_RxN in parts.items()}


def _num_validation(fraction, available):
    return min(max(1, round(fraction * available)), available - 1)


def _check_same_plan(partial, tokenizer, units, config, seed):
    """Writes the plan down, or finds it as it was when the work began."""
    described = {split: [unit.describe() for unit in group] for split, group in units.items()}
    plan = {"made_from": made_from(config, seed), "units": described, "tokenizer": pretrained.digest(tokenizer.backend)}
    plan = json.loads(json.dumps(plan))
    path = partial / "plan.json"
    if not path.exists():
        tokenizer.save(partial / "tokenizer.json")
        write_text(path, json.dumps(plan))
        return
    before = json.loads(path.read_text())
    changed = [name for name, value in plan["made_from"].items() if before["made_from"].get(name) != value]
    changed += [] if before == plan else ["the text or the tokenizer"]
    if changed:
        was = before["made_from"].get(changed[0])
        raise RunError(
            f"{partial} was begun with another configuration: {changed[0]} changed"
            f"{'' if was is None else f' from {was!r}'}; delete the folder to begin again"
        )


def _write_shards(config, partial, units, workers) -> dict[str, list[Shard]]:
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
                    documents=unit,
                    tokenizer_path=partial / "tokenizer.json",
                    path=_shard_path(partial, split, index, len(group)),
                    packing=config.packing,
                    seq_len=config.seq_len,
                )
                for index, unit in enumerate(group)
            ]
            shards[split] = run_all(tasks, workers, report)
            _check_not_empty(config, partial, split, shards[split])
    return shards


def _shard_path(folder, split, index, count) -> Path:
    return folder / f"{split}-{index:05}-of-{count:05}.arrayrecord"


def _check_not_empty(config, partial, split, shards):
    if not any(shard.rows for shard in shards):
        # There is nothing in these shards to go on with.
        shutil.rmtree(partial)
        tokens, documents = sum(s.document_tokens for s in shards), sum(s.documents for s in shards)
        raise DataError(
            f"the {split} split has {tokens} tokens in {documents} documents, fewer than one row of "
            f"data.seq_len = {config.seq_len}; shorten it, change data.validation_fraction = "
            f"{config.validation_fraction} or give more text"
        )


def _write_manifest(config, seed, partial, tokenizer, shards):
    manifest = {
        "format": FORMAT,
        "made_from": made_from(config, seed),
        "dtype": token_dtype(tokenizer).name,
        "segmented": config.packing in ("segments", "padded"),
        **{split: _split_manifest(partial, split, written) for split, written in shards.items()},
    }
    write_text(partial / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def _split_manifest(partial, split, shards):
    paths = [_shard_path(partial, split, index, len(shards)) for index in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        if not shard.rows:
            path.unlink()
    kept = [(path, shard) for path, shard in zip(paths, shards, strict=True) if shard.rows]
    return {
        "rows": sum(shard.rows for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "useful_tokens": sum(shard.useful_tokens for shard in shards),
        "shards": [{"file": path.name} | dataclasses.asdict(shard) for path, shard in kept],
    }
