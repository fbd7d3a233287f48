"""Prepared data: rows of tokens on disk, and batches of them that depend on (seed, step) alone."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import grain
import jax
import numpy as np
from absl import flags

from kforcing_jax.config import DataConfig
from kforcing_jax.data import packing
from kforcing_jax.data.choices import source
from kforcing_jax.data.packing import Batch
from kforcing_jax.data.pretrained import is_vocabulary_of
from kforcing_jax.data.shards import Shard, damage
from kforcing_jax.data.tokenizers import Tokenizer, is_trained
from kforcing_jax.errors import ConfigError, DataError, RunError
from kforcing_jax.registry import is_own

FORMAT = 4
SPLITS = ("train", "validation")
# Of the tokens, from which on it is said that they stand for something unknown.
MUCH_UNKNOWN = 0.03
# Validation rows that are looked at together for prompts.
_ROWS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Prepared data: a tokenizer, and rows of `seq_len` tokens in two splits that share no document.

    `useful_tokens_per_row` are those that are not padding; `tokens_per_document` how many there would be if every
    document had a row of its own. Both are means over the training split, `unknown_share` is the larger of the splits'
    shares of tokens that stand for something outside the vocabulary. `has_answers` says whether rows tell which of
    their tokens are an assistant's.
    """

    directory: Path
    tokenizer: Tokenizer
    seed: int
    seq_len: int
    dtype: np.dtype
    segmented: bool
    num_train_rows: int
    num_validation_rows: int
    useful_tokens_per_row: float
    tokens_per_document: float
    unknown_share: float
    files: Mapping[str, tuple[str, ...]]
    reader_processes: int = 0
    has_answers: bool = False

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return self.tokenizer.vocab_size

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document, if documents end."""
        return self.tokenizer.eos_id

    @property
    def mask_id(self) -> int | None:
        """The id that stands for no token, where the vocabulary has one."""
        return self.tokenizer.mask_id

    @property
    def vocabulary_digest(self) -> str:
        """SHA-256 of what ids stand for: tokens in the order of their ids, and which are special."""
        return self.tokenizer.digest

    @functools.cached_property
    def data_digest(self) -> str:
        """SHA-256 of the rows of both splits in order, by the digests of their shards; not of where they lie."""
        manifest = read_manifest(self.directory)
        rows = {split: [shard["sha256"] for shard in manifest[split]["shards"]] for split in SPLITS}
        described = [self.seq_len, self.dtype.name, self.segmented, rows, *(["answers"] if self.has_answers else [])]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def check_batch_size(self, name: str, batch_size: int) -> None:
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
        unknown = f", {self.unknown_share:.1%} <unk>" if self.unknown_share > MUCH_UNKNOWN else ""
        return f"{self.num_train_rows:,} training rows of {self.seq_len}{fill}, vocabulary {self.vocab_size:,}{unknown}"

    def statistics(self) -> str:
        """Rows, tokens and useful tokens of both splits, a line each."""
        manifest = read_manifest(self.directory)
        return "\n".join(_statistics(split, manifest[split], self.seq_len) for split in SPLITS)

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
        if self.reader_processes:
            batches = _in_processes(batches, self.reader_processes)
        return (Batch(**arrays) for arrays in batches)

    def validation_rows(self, count: int) -> Batch:
        """The first min(count, rows there are) validation rows of a random order, so a few are a sample of all."""
        return self._validation_rows(0, count)

    def _validation_rows(self, start, stop) -> Batch:
        source = self._source("validation")
        order = np.random.default_rng([self.seed, 3]).permutation(self.num_validation_rows)
        rows = [self._row(source[i]) for i in order[start:stop]]
        return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})

    def validation_batches(self, count: int, batch_size: int) -> Batch:
        """The first validation rows in batches of equal size; leaves (batches, rows, seq_len).

        A remainder is left out; there is at least one batch, of fewer rows when there are fewer.
        """
        batch = self.validation_rows(count)
        batch_size = min(batch_size, len(batch.tokens))
        whole = len(batch.tokens) // batch_size * batch_size
        return jax.tree.map(lambda x: x[:whole].reshape(-1, batch_size, self.seq_len), batch)

    def beginnings(self, count: int, length: int) -> list[np.ndarray]:
        """Up to `count` validation texts of more than `length` tokens, (M,) int32 each: documents or rows, to the end.

        Where only answers are learnt, they begin so many tokens before one.

        Raises:
          DataError: no document is longer than `length` tokens, or no answer comes after so many.
        """
        if not self.segmented and not self.has_answers:
            return list(self.validation_rows(count).tokens)
        found: list[np.ndarray] = []
        for start in range(0, self.num_validation_rows, _ROWS_AT_ONCE):
            rows = self._validation_rows(start, start + _ROWS_AT_ONCE)
            found.extend(_before_answers(rows, length) if self.has_answers else _beginnings(rows, length))
            if len(found) >= count:
                break
        if not found:
            what = "no answer of a validation chat comes after so many tokens"
            raise DataError(
                f"evaluation.prompt_length = {length}: "
                f"{what if self.has_answers else 'no validation document is longer'}; shorten it or give more text"
            )
        return found[:count]

    def _source(self, split):
        return grain.sources.ArrayRecordDataSource([os.fspath(self.directory / name) for name in self.files[split]])

    def _row(self, record):
        """The arrays of a `Batch`, by name, of one record."""
        row: dict[str, np.ndarray] = {"tokens": np.frombuffer(record, self.dtype, count=self.seq_len).astype(np.int32)}
        read = self.seq_len * self.dtype.itemsize
        if self.segmented:
            segments_N = np.frombuffer(record, packing.SEGMENT_DTYPE, count=self.seq_len, offset=read)
            row["segments"], read = segments_N.astype(np.int32), read + segments_N.nbytes
        if self.has_answers:
            row["answers"] = np.unpackbits(np.frombuffer(record, np.uint8, offset=read), count=self.seq_len) > 0
        return row


def _statistics(name, split, seq_len):
    tokens, useful, skipped = split["rows"] * seq_len, split["useful_tokens"], split["skipped"]
    return (
        f"{name:<10} {split['rows']:,} rows of {seq_len} from {split['documents']:,} documents "
        f"in {len(split['shards'])} shards: {tokens:,} tokens, {useful:,} useful ({useful / tokens:.1%}), "
        f"{unknown_share(split):.1%} of them <unk>"
        f"{f'; {skipped:,} entries without text left out' if skipped else ''}"
    )


def unknown_share(split: dict) -> float:
    """Of a split's text as the manifest describes it: how many of its tokens stand for something unknown."""
    return split["unknown_tokens"] / max(split["document_tokens"], 1)


def _before_answers(rows, length) -> list[np.ndarray]:
    """The last `length` tokens before every answer that has so many in its document, and all that follow there."""
    segments_RxN = np.ones_like(rows.tokens) if rows.segments is None else rows.segments
    begins_RxN = rows.answers & ~np.pad(rows.answers, [(0, 0), (1, 0)])[:, :-1]
    begins_RxN[:, :length] = False
    begins_RxN[:, length:] &= segments_RxN[:, length:] == segments_RxN[:, :-length]
    places = zip(*np.nonzero(begins_RxN), strict=True)
    return [rows.tokens[r, n - length :][segments_RxN[r, n - length :] == segments_RxN[r, n]] for r, n in places]


def _beginnings(rows, length) -> list[np.ndarray]:
    """The tokens of every document that goes on after the first `length`."""
    tokens_RxN, segments_RxN = rows.tokens, rows.segments
    # A document begins where the id changes; it goes on if its id is still there `length` positions later.
    first_RxN = np.diff(segments_RxN, axis=1, prepend=0) > 0
    goes_on_RxN = np.zeros_like(first_RxN)
    goes_on_RxN[:, :-length] = segments_RxN[:, :-length] == segments_RxN[:, length:]
    places = zip(*np.nonzero(first_RxN & goes_on_RxN), strict=True)
    return [tokens_RxN[row][segments_RxN[row] == segments_RxN[row, start]] for row, start in places]


def _in_processes(batches, count):
    """Grain's worker processes take their settings from absl's flags, which a plain script has not parsed."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=count))


def load(config: DataConfig, seed: int, directory: str | Path) -> Corpus:
    """The corpus that was prepared in a directory.

    Raises:
      RunError: the directory holds data of another config or seed, or is damaged or missing.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    _check_made_from(manifest["made_from"], config, seed, directory)
    for split in SPLITS:
        check_shards(directory, manifest[split], thorough=False)
    train = manifest["train"]
    return Corpus(
        directory=directory,
        tokenizer=Tokenizer.load(directory / "tokenizer.json"),
        seed=seed,
        seq_len=config.seq_len,
        dtype=np.dtype(manifest["dtype"]),
        segmented=manifest["segmented"],
        num_train_rows=train["rows"],
        num_validation_rows=manifest["validation"]["rows"],
        useful_tokens_per_row=train["useful_tokens"] / train["rows"],
        tokens_per_document=train["useful_tokens"] / train["documents"],
        unknown_share=max(unknown_share(manifest[split]) for split in SPLITS),
        files={split: tuple(shard["file"] for shard in manifest[split]["shards"]) for split in SPLITS},
        reader_processes=config.reader_processes,
        has_answers=manifest.get("answers", False),
    )


def verify(directory: str | Path) -> None:
    """Reads every row of prepared data. Raises RunError, naming the file, when one is not what was written."""
    manifest = read_manifest(Path(directory))
    for split in SPLITS:
        check_shards(Path(directory), manifest[split], thorough=True)


def made_from(config: DataConfig, seed: int) -> dict:
    """The fields that rows depend on, by name, as JSON.

    Raises:
      ConfigError: a source of one's own cannot be imported, or names a field that there is not.
    """
    chosen = source(config.source)
    unknown = [name for name in chosen.fields if not hasattr(config, name)]
    if unknown:
        raise ConfigError(f"{config.source}.fields has {unknown[0]!r}, which is no field of the configuration's data")
    fields = {f"data.{name}": getattr(config, name) for name in ("source", "seq_len", *chosen.fields)}
    return fields | ({"seed": seed} if chosen.seeded(config) else {})


def _check_made_from(before, config, seed, directory):
    for name, value in _made_from_now(before, config, seed).items():
        if before.get(name) != value and not _may_differ(name, config, directory):
            raise RunError(
                f"{directory} was prepared with {name} = {before.get(name)!r}, now it is {value!r}; "
                "set it back, use another work directory or delete the folder"
            )


def _made_from_now(before, config, seed):
    """`made_from`; for a source of one's own, whose module may not be here, the fields that it had."""
    if not is_own(config.source):
        return made_from(config, seed)
    now = {f"data.{name}": value for name, value in dataclasses.asdict(config).items()} | {"seed": seed}
    return {name: now.get(name) for name in before}


def _may_differ(name, config, directory):
    """Prepared data is copied to where text and template are not, and its tokenizer is elsewhere or has a name."""
    if name in ("data.path", "data.chat_template"):
        return bool(config.prepared)
    if name != "data.tokenizer" or is_trained(config):
        return False
    return is_vocabulary_of(config.tokenizer, Tokenizer.load(directory / "tokenizer.json").backend)


def read_manifest(directory: Path) -> dict:
    """What manifest.json says of prepared data. Raises RunError when there is none, or it is not of this version."""
    path = directory / "manifest.json"
    if not path.exists():
        raise RunError(f"{directory} holds no prepared data (no manifest.json); name a folder of kforcing_jax.prepare")
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("made_from"), dict):
        raise RunError(f"{path} is not of prepared data; name a folder that kforcing_jax.prepare has written")
    if manifest.get("format") != FORMAT:
        raise RunError(
            f"{path} has format {manifest.get('format')}, this version reads {FORMAT}; delete the folder "
            f"{directory} and prepare it again"
        )
    missing = [name for name in ("dtype", "segmented", "origin", *SPLITS) if name not in manifest]
    if missing:
        raise _damaged(path, f"{missing[0]} is missing")
    return manifest


def check_shards(directory: Path, split: dict, thorough: bool) -> None:
    """Raises RunError when a shard of a split, as the manifest describes it, is missing or damaged."""
    manifest = directory / "manifest.json"
    try:
        shards = {
            entry["file"]: Shard(**{field.name: entry[field.name] for field in dataclasses.fields(Shard)})
            for entry in split["shards"]
        }
        expected = split["rows"]
    except (KeyError, TypeError) as error:
        raise _damaged(manifest, f"{type(error).__name__}: {error}") from None
    for name, shard in shards.items():
        reason = damage(directory / name, shard, thorough)
        if reason:
            raise _damaged(directory / name, reason)
    rows = sum(shard.rows for shard in shards.values())
    if rows != expected:
        raise _damaged(manifest, f"{expected} rows, its shards have {rows}")


def _damaged(path, reason):
    return RunError(f"{path} is damaged ({reason}); delete the folder {path.parent} and prepare it again")
