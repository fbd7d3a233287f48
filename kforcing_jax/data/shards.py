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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from array_record.python import array_record_module

from kforcing_jax.data import lm1b, packing
from kforcing_jax.data.files import FileRange
from kforcing_jax.data.packing import Rows
from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.data.whole_file import whole_file, write_text
from kforcing_jax.errors import RunError

# Groups of one record: random access then reads nothing but the row. Token ids hardly compress, and slowly.
_OPTIONS = "group_size:1,uncompressed"


class Documents(Protocol):
    """What one shard is made from; can be sent to another process."""

    def texts(self) -> Iterator[str]:
        """The documents; what is blank is left out later."""


@dataclasses.dataclass(frozen=True)
class GivenDocuments:
    """Documents that are in memory."""

    given: tuple[str, ...]

    def texts(self) -> Iterator[str]:
        return iter(self.given)

    def describe(self) -> dict:
        """What identifies them, as JSON."""
        digest = hashlib.sha256("\0".join(self.given).encode("utf-8", "surrogatepass")).hexdigest()
        return {"documents": len(self.given), "sha256": digest}


@dataclasses.dataclass(frozen=True)
class FileDocuments:
    """Documents in parts of files."""

    ranges: tuple[FileRange, ...]
    separator: str

    def texts(self) -> Iterator[str]:
        return (text for part in self.ranges for _, text in part.documents(self.separator))

    def describe(self) -> dict:
        return {"ranges": [dataclasses.asdict(part) for part in self.ranges]}


@dataclasses.dataclass(frozen=True)
class Lm1bDocuments:
    """Sentences start to stop of a split of LM1B."""

    path: str
    split: str
    start: int
    stop: int

    def texts(self) -> Iterator[str]:
        return lm1b.open_split(self.path, self.split).documents(self.start, self.stop)

    def describe(self) -> dict:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Shard:
    """What is known of a finished shard. `document_tokens` are those of its documents before rows were cut."""

    rows: int
    documents: int
    document_tokens: int
    useful_tokens: int
    bytes: int
    sha256: str  # of its rows, one after the other


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard to be written: `documents` by the tokenizer at `tokenizer_path`, into `path`."""

    documents: Documents
    tokenizer_path: Path
    path: Path
    packing: str
    seq_len: int

    @property
    def done_path(self) -> Path:
        return self.path.with_suffix(".json")

    def finished(self) -> Shard | None:
        """The shard, if it was written before and is still whole."""
        try:
            shard = Shard(**json.loads(self.done_path.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return shard if _size(self.path) == shard.bytes else None

    def run(self) -> Shard:
        """Writes the shard, under its name only when it is complete."""
        tokenizer = _tokenizer(self.tokenizer_path)
        encoded = encode_documents(tokenizer, self.documents.texts(), self.packing, self.seq_len)
        rows = _packed(tokenizer, encoded, self.packing, self.seq_len)
        shard = write_rows(self.path, rows, sum(map(len, encoded)))
        write_text(self.done_path, json.dumps(dataclasses.asdict(shard)))
        return shard


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


def encode_documents(tokenizer: Tokenizer, texts: Iterator[str], packing: str, seq_len: int) -> list[np.ndarray]:
    """Ids of each document that is not blank, with the ids that begin and end it.

    A document that has a row or segment of its own is cut to a row; where an id begins documents, the end's id stays.
    """
    dtype, end = token_dtype(tokenizer), [tokenizer.eos_id]
    alone = packing in ("segments", "padded")
    begin = [tokenizer.bos_id] if alone and tokenizer.begins_documents else []
    longest = seq_len - 2 if begin else None
    documents = filter(None, map(str.strip, texts))
    return [np.array([*begin, *ids[:longest], *end], dtype) for ids in tokenizer.encode_documents(documents)]


def write_rows(path: Path, rows: Rows, document_tokens: int) -> Shard:
    """Writes rows to `path`, whole or not at all."""
    digest = hashlib.sha256()
    with whole_file(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), _OPTIONS)
        for row, tokens_N in enumerate(rows.tokens_RxN):
            segments = b"" if rows.segments_RxN is None else rows.segments_RxN[row].tobytes()
            record = tokens_N.tobytes() + segments
            writer.write(record)
            digest.update(record)
        writer.close()
    return Shard(
        rows=len(rows.tokens_RxN),
        documents=rows.documents,
        document_tokens=document_tokens,
        useful_tokens=rows.useful_tokens,
        bytes=path.stat().st_size,
        sha256=digest.hexdigest(),
    )


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


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.min_scalar_type(tokenizer.vocab_size - 1)


def _packed(tokenizer, encoded, how, seq_len):
    begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    frame = (begin, tokenizer.eos_id) if how == "framed" else None
    return packing.pack(encoded, how, seq_len, tokenizer.eos_id, frame)


def _size(path):
    return path.stat().st_size if path.exists() else 0


@functools.cache
def _tokenizer(path):
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
            "a process that prepares data died, most likely for lack of memory; run the same command again with fewer "
            "--workers, it goes on with the shards that are missing"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _use_one_thread():
    """Of the tokenizers' library: the processes already take all cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
