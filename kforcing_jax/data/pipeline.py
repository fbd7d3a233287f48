"""From a source to rows of tokens on disk, once, and from there to batches that depend on (seed, step) alone."""

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import grain
import jax
import numpy as np
from array_record.python import array_record_module

from kforcing_jax.config import DataConfig
from kforcing_jax.data import packing
from kforcing_jax.data.packing import Batch, Rows
from kforcing_jax.data.sources import load_documents, markov_chain, markov_rows
from kforcing_jax.data.tokenizers import Tokenizer, check_vocabulary, markov_tokenizer, train_tokenizer
from kforcing_jax.errors import DataError, RunError

_FORMAT = 2
_SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Prepared data: a tokenizer, and rows of `seq_len` tokens in two splits that share no document.

    `useful_tokens_per_row` are those that are not padding; `tokens_per_document` how many there would be if every
    document had a row of its own. Both are means over the training split.
    """

    directory: Path
    tokenizer: Tokenizer
    seq_len: int
    dtype: np.dtype
    segmented: bool
    num_train_rows: int
    num_validation_rows: int
    useful_tokens_per_row: float
    tokens_per_document: float

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_id

    @property
    def mask_id(self) -> int:
        return self.tokenizer.mask_id

    def check_batch_size(self, name: str, batch_size: int):
        """Raises DataError, calling the batch size `name`, when the training split cannot fill one batch."""
        if batch_size > self.num_train_rows:
            raise DataError(
                f"{name} = {batch_size} is more than the {self.num_train_rows} training rows of data.seq_len = "
                f"{self.seq_len} tokens; lower it, shorten data.seq_len or give more text"
            )

    def describe(self) -> str:
        """Rows, positions, useful tokens and vocabulary in one line."""
        fill = ""
        if self.segmented:
            fill = (
                f", {self.useful_tokens_per_row:.1f} useful tokens each "
                f"({self.useful_tokens_per_row / self.seq_len:.1%}; one document a row: {self.tokens_per_document:.1f})"
            )
        return f"{self.num_train_rows:,} training rows of {self.seq_len}{fill}, vocabulary {self.vocab_size:,}"

    def train_batches(
        self, batch_size: int, seed: int, start_step: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """Endless batches from batch number `start_step` on, reshuffled every epoch.

        Batch number s is a function of (seed, s). `batch_size` counts the rows of all processes; each gets its
        contiguous share, batch_size / process_count rows.

        Raises:
          DataError: batch_size is not divisible by process_count.
        """
        if batch_size % process_count:
            raise DataError(f"a batch of {batch_size} rows cannot be shared equally by {process_count} processes")
        rows = grain.MapDataset.source(self._source("train")).seed(seed).shuffle().repeat().map(self._row)
        # There is no remainder in an endless stream, but Grain's length overflows unless it may drop one.
        shares = rows.batch(batch_size // process_count, drop_remainder=True)
        # The machine's cores belong to the compiled step; reading a batch takes milliseconds.
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        batches = shares[process_index::process_count][start_step:].to_iter_dataset(options)
        return (Batch(*arrays) for arrays in batches)

    def validation_rows(self, count: int) -> Batch:
        """The first min(count, rows there are) validation rows.

        They were put in random order when prepared, so the first few are a sample of all validation documents.
        """
        source = self._source("validation")
        rows = [self._row(source[i]) for i in range(min(count, self.num_validation_rows))]
        return Batch(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))

    def validation_batches(self, count: int, batch_size: int) -> Batch:
        """The first validation rows in batches of equal size; leaves (batches, rows, seq_len).

        A remainder is left out; there is at least one batch, of fewer rows when there are fewer.
        """
        batch = self.validation_rows(count)
        batch_size = min(batch_size, len(batch.tokens))
        whole = len(batch.tokens) // batch_size * batch_size
        return jax.tree.map(lambda x: x[:whole].reshape(-1, batch_size, self.seq_len), batch)

    def prompts(self, count: int, length: int) -> np.ndarray:
        """Up to `count` beginnings of validation text, (count, length): of rows, or of documents that go on after it.

        Raises:
          DataError: no document is longer than `length` tokens.
        """
        if not self.segmented:
            return self.validation_rows(count).tokens[:, :length]
        tokens_RxN, segments_RxN = self.validation_rows(self.num_validation_rows)
        # A document begins where the id changes; it goes on if its id is still there `length` positions later.
        first_RxN = np.diff(segments_RxN, axis=1, prepend=0) > 0
        goes_on_RxN = np.zeros_like(first_RxN)
        goes_on_RxN[:, :-length] = segments_RxN[:, :-length] == segments_RxN[:, length:]
        rows, starts = np.nonzero(first_RxN & goes_on_RxN)
        if not len(rows):
            raise DataError(
                f"evaluation.prompt_length = {length}: no validation document is longer; shorten it or give more text"
            )
        return np.stack([tokens_RxN[r, s : s + length] for r, s in zip(rows[:count], starts[:count], strict=True)])

    def _source(self, split):
        return grain.sources.ArrayRecordDataSource(os.fspath(_rows_path(self.directory, split)))

    def _row(self, record):
        """(tokens_N,) or (tokens_N, segments_N) of one record."""
        tokens_N = np.frombuffer(record, self.dtype, count=self.seq_len).astype(np.int32)
        if not self.segmented:
            return (tokens_N,)
        segments_N = np.frombuffer(record, packing.SEGMENT_DTYPE, offset=self.seq_len * self.dtype.itemsize)
        return tokens_N, segments_N.astype(np.int32)


def prepare(config: DataConfig, seed: int, directory: str | Path) -> Corpus:
    """The corpus of a config, prepared in `directory` unless it is there already.

    The directory appears when it is complete. Processes that share a file system may all call this.

    Raises:
      ConfigError: no vocabulary can satisfy the config.
      DataError: the text cannot be read, or is too short for one row in each split.
      RunError: the directory holds data of another config or seed, is damaged, or cannot be written.
    """
    directory = Path(directory)
    if not directory.exists():
        check_vocabulary(config)
        _write_whole(directory, config, seed)
    return _load(config, seed, directory)


def _write_whole(directory, config, seed):
    """Writes beside the directory and renames, so that nothing half-written ever has its name."""
    temporary = directory.with_name(f"{directory.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write(temporary, config, seed)
        temporary.rename(directory)
    except OSError as error:
        # Another process may have been first; what it made is the same.
        if not (directory / "manifest.json").exists():
            raise RunError(f"{directory} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(directory, config, seed):
    tokenizer, train, validation = (_markov if config.source == "markov" else _text)(config, seed)
    validation = validation.in_order(np.random.default_rng([seed, 3]).permutation(len(validation.tokens_RxN)))
    tokenizer.save(directory / "tokenizer.json")
    files = {}
    for split, rows in zip(_SPLITS, (train, validation), strict=True):
        path = _rows_path(directory, split)
        _write_rows(path, rows)
        files[split] = {
            "rows": len(rows.tokens_RxN),
            "documents": rows.documents,
            "useful_tokens": rows.useful_tokens,
            "bytes": path.stat().st_size,
        }
    manifest = {
        "format": _FORMAT,
        "made_from": _made_from(config, seed),
        "dtype": train.tokens_RxN.dtype.name,
        "segmented": train.segments_RxN is not None,
        **files,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _markov(config, seed):
    """(tokenizer, train rows, validation rows): every row is a sample path of its own."""
    tokenizer = markov_tokenizer(config.markov_states)
    rows_RxN = markov_rows(markov_chain(config, seed), seed, config.markov_rows, config.seq_len)
    rows_RxN = rows_RxN.astype(_token_dtype(tokenizer))
    num_validation = _num_validation(config.validation_fraction, len(rows_RxN))
    train_RxN, validation_RxN = rows_RxN[num_validation:], rows_RxN[:num_validation]
    return tokenizer, *(Rows(split_RxN, documents=len(split_RxN)) for split_RxN in (train_RxN, validation_RxN))


def _text(config, seed):
    """(tokenizer, train rows, validation rows): split by document, the tokenizer trained on the training split."""
    documents = load_documents(config)
    if len(documents) < 2:
        raise DataError(
            f"data.path = {config.path!r} holds 1 document, and one is needed for training and one for validation; "
            f"check data.document_separator = {config.document_separator!r} or give more text"
        )
    order = np.random.default_rng([seed, 2]).permutation(len(documents))
    shuffled = [documents[i] for i in order]
    num_validation = _num_validation(config.validation_fraction, len(documents))
    validation, train = shuffled[:num_validation], shuffled[num_validation:]
    tokenizer = train_tokenizer(config, train)
    return tokenizer, _pack(tokenizer, train, "train", config), _pack(tokenizer, validation, "validation", config)


def _num_validation(fraction, available):
    return min(max(1, round(fraction * available)), available - 1)


def _pack(tokenizer: Tokenizer, documents: Iterable[str], split: str, config: DataConfig) -> Rows:
    dtype = _token_dtype(tokenizer)
    encoded = [np.array([*ids, tokenizer.eos_id], dtype) for ids in tokenizer.encode_documents(documents)]
    rows = packing.pack(encoded, config.packing, config.seq_len, padding=tokenizer.eos_id)
    if not len(rows.tokens_RxN):
        raise DataError(
            f"the {split} split has {sum(map(len, encoded))} tokens in {len(encoded)} documents, fewer than one row of "
            f"data.seq_len = {config.seq_len}; shorten it, change data.validation_fraction = "
            f"{config.validation_fraction} or give more text"
        )
    return rows


def _token_dtype(tokenizer):
    return np.min_scalar_type(tokenizer.vocab_size - 1)


def _rows_path(directory, split):
    return directory / f"{split}.arrayrecord"


def _write_rows(path, rows: Rows):
    # Groups of one record: random access then reads nothing but the row.
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")
    for row, tokens_N in enumerate(rows.tokens_RxN):
        segments = b"" if rows.segments_RxN is None else rows.segments_RxN[row].tobytes()
        writer.write(tokens_N.tobytes() + segments)
    writer.close()


def _made_from(config, seed):
    return {f"data.{name}": value for name, value in dataclasses.asdict(config).items()} | {"seed": seed}


def _load(config: DataConfig, seed: int, directory: Path) -> Corpus:
    manifest = _read_manifest(directory)
    for name, value in _made_from(config, seed).items():
        if manifest["made_from"].get(name) != value:
            raise RunError(
                f"{directory} was prepared with {name} = {manifest['made_from'].get(name)!r}, now it is {value!r}; "
                "set it back, use another work directory or delete the folder"
            )
    for split in _SPLITS:
        _check_rows(_rows_path(directory, split), manifest[split])
    train = manifest["train"]
    return Corpus(
        directory=directory,
        tokenizer=Tokenizer.load(directory / "tokenizer.json"),
        seq_len=config.seq_len,
        dtype=np.dtype(manifest["dtype"]),
        segmented=manifest["segmented"],
        num_train_rows=train["rows"],
        num_validation_rows=manifest["validation"]["rows"],
        useful_tokens_per_row=train["useful_tokens"] / train["rows"],
        tokens_per_document=train["useful_tokens"] / train["documents"],
    )


def _read_manifest(directory):
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if manifest.get("format") != _FORMAT:
        raise _damaged(path, f"format {manifest.get('format')}, expected {_FORMAT}")
    return manifest


def _check_rows(path, expected):
    # The size first: opening a file that was cut short is an error of the reader's own, with a longer text.
    size = path.stat().st_size if path.exists() else 0
    if size != expected["bytes"]:
        raise _damaged(path, f"{size} bytes, expected {expected['bytes']}")
    try:
        rows = len(grain.sources.ArrayRecordDataSource(os.fspath(path)))
    except Exception as error:  # the reader raises whatever its C++ status maps to
        raise _damaged(path, error) from None
    if rows != expected["rows"]:
        raise _damaged(path, f"{rows} rows, expected {expected['rows']}")


def _damaged(path, reason):
    return RunError(f"{path} is damaged ({reason}); delete the folder {path.parent} and it will be prepared again")
