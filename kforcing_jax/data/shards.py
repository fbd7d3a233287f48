"""Shards of prepared rows: documents in, one ArrayRecord file of packed rows out, in this process or in several.

Nothing here imports JAX: worker processes start in a second.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from kforcing_jax.data.packing import Rows
from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.data.units import Unit
from kforcing_jax.data.whole_file import whole_file, write_text
from kforcing_jax.errors import RunError

# Groups of one record: random access then reads nothing but the row. Token ids hardly compress, and slowly.
_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Shard:
    """What is known of a finished shard; the counts are those of `Rows`."""

    rows: int
    documents: int
    document_tokens: int
    unknown_tokens: int
    useful_tokens: int
    skipped: int
    bytes: int
    sha256: str  # of its rows, one after the other


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard to be written: the rows of `unit` by the tokenizer at `tokenizer_path`, into `path`."""

    unit: Unit
    tokenizer_path: Path
    path: Path
    packing: str
    seq_len: int

    @property
    def done_path(self) -> Path:
        """The note beside a finished shard."""
        return self.path.with_suffix(".json")

    def finished(self) -> Shard | None:
        """The shard, if it was written before and is still whole."""
        try:
            shard = Shard(**json.loads(self.done_path.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return shard if _size(self.path) == shard.bytes else None

    def run(self) -> Shard:
        """Writes the shard, under its name only when it is complete.

        Raises:
          DataError: the text cannot be read.
          RunError: the shard cannot be written.
        """
        shard = write_rows(self.path, self.unit.rows(self._tokenizer(), self.packing, self.seq_len))
        write_text(self.done_path, json.dumps(dataclasses.asdict(shard)))
        return shard

    def _tokenizer(self):
        return _load(self.tokenizer_path, self.tokenizer_path.stat().st_mtime_ns)


def run_all(tasks: Sequence[Task], workers: int, report: Callable[[Shard], None]) -> list[Shard]:
    """The shards of all tasks in order; `report` hears of each as it is finished. Finished ones are not written again.

    Raises:
      DataError: as reading the documents does.
      RunError: a worker process died.
    """
    shards = {index: shard for index, task in enumerate(tasks) if (shard := task.finished())}
    for shard in shards.values():
        report(shard)
    waiting = [index for index in range(len(tasks)) if index not in shards]
    run = _run_here if min(workers, len(waiting)) <= 1 else functools.partial(_run_in_processes, workers)
    for index, shard in run({index: tasks[index] for index in waiting}):
        shards[index] = shard
        report(shard)
    return [shards[index] for index in range(len(tasks))]


def write_rows(path: Path, rows: Rows) -> Shard:
    """Writes rows to `path`, whole or not at all. Raises RunError when they cannot be written."""
    digest = hashlib.sha256()
    try:
        with whole_file(path) as temporary:
            _write(temporary, rows, digest)
    except Exception as error:  # the writer raises whatever its C++ status maps to
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise RunError(f"{path} cannot be written: {reason}") from None
    return Shard(
        rows=len(rows.tokens_RxN),
        documents=rows.documents,
        document_tokens=rows.document_tokens,
        unknown_tokens=rows.unknown_tokens,
        useful_tokens=rows.useful_tokens,
        skipped=rows.skipped,
        bytes=path.stat().st_size,
        sha256=digest.hexdigest(),
    )


def _write(path, rows, digest):
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), _OPTIONS)
    for row, tokens_N in enumerate(rows.tokens_RxN):
        segments = b"" if rows.segments_RxN is None else rows.segments_RxN[row].tobytes()
        answers = b"" if rows.answers_RxN is None else np.packbits(rows.answers_RxN[row]).tobytes()
        record = tokens_N.tobytes() + segments + answers
        writer.write(record)
        digest.update(record)
    writer.close()


def damage(path: Path, shard: Shard, thorough: bool) -> str | None:
    """What is wrong with a shard's file, None when nothing is. `thorough` reads every row."""
    # The size first: opening a file that was cut short is an error of the reader's own, with a longer text.
    if not path.exists():
        return "missing"
    if _size(path) != shard.bytes:
        return f"{_size(path)} bytes, expected {shard.bytes}"
    try:
        reader = array_record_module.ArrayRecordReader(os.fspath(path))
        rows = reader.num_records()
        digest = hashlib.sha256(b"".join(reader.read_all() if thorough and rows else [])).hexdigest()
        reader.close()
    except Exception as error:  # the reader raises whatever its C++ status maps to
        return " ".join(str(error).split())[:200]
    if rows != shard.rows:
        return f"{rows} rows, expected {shard.rows}"
    return "its rows are not those that were written" if thorough and digest != shard.sha256 else None


def _size(path):
    return path.stat().st_size if path.exists() else 0


@functools.lru_cache(maxsize=1)
def _load(path, written):
    return Tokenizer.load(path)


def _run_here(tasks):
    for index, task in tasks.items():
        yield index, task.run()


def _run_in_processes(workers, tasks):
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _use_one_thread)
    try:
        futures = {pool.submit(task.run): index for index, task in tasks.items()}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise RunError(
            "a process that prepares data died, most likely for lack of memory; do the same again with fewer workers, "
            "it goes on with the shards that are missing"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _use_one_thread():
    """Of the tokenizers' library: the processes already take all cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
