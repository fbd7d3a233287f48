"""What shards are made from: for every source of text its units, each of which becomes one shard of one split.

A unit can be sent to another process, and says its rows. The readers are named in the table of `choices.py`.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kforcing_jax.config import DataConfig
from kforcing_jax.data import lm1b, packing, pretrained, sources
from kforcing_jax.data.choices import PACKINGS, source
from kforcing_jax.data.files import FileRange, grouped, hold_out_last
from kforcing_jax.data.packing import Rows
from kforcing_jax.data.paths import matching_files
from kforcing_jax.data.tokenizers import Tokenizer, is_trained, markov_tokenizer
from kforcing_jax.errors import ConfigError, DataError, UserError
from kforcing_jax.registry import imported, is_own

_SENTENCES_PER_SHARD = 500_000
_CHARACTERS_PER_SHARD = 64_000_000
# Of a streamed text, for the training of a vocabulary.
_CHARACTERS_FOR_TOKENIZER = 200_000_000
_log = logging.getLogger("kforcing_jax")


class Unit(Protocol):
    """What one shard is made from."""

    def rows(self, tokenizer: Tokenizer, how: str, seq_len: int) -> Rows:
        """Its rows."""


Units = dict[str, Sequence[Unit]]


class _TextUnit:
    """A unit of documents; `texts` gives None for an entry that has none."""

    def texts(self) -> Iterator[str | None]:
        raise NotImplementedError

    def rows(self, tokenizer: Tokenizer, how: str, seq_len: int) -> Rows:
        return encode_and_pack(tokenizer, self.texts(), how, seq_len)


@dataclasses.dataclass(frozen=True)
class GivenDocuments(_TextUnit):
    """Documents that are in memory."""

    given: tuple[str, ...]

    def texts(self) -> Iterator[str | None]:
        """The documents."""
        return iter(self.given)


@dataclasses.dataclass(frozen=True)
class FileDocuments(_TextUnit):
    """Documents in parts of files."""

    ranges: tuple[FileRange, ...]
    separator: str

    def texts(self) -> Iterator[str | None]:
        """What the files hold, None for an entry without text. Raises DataError when one cannot be read."""
        return (text for part in self.ranges for _, text in part.documents(self.separator))


@dataclasses.dataclass(frozen=True)
class Lm1bDocuments(_TextUnit):
    """Sentences start to stop of a split of LM1B."""

    path: str
    split: str
    start: int
    stop: int

    def texts(self) -> Iterator[str | None]:
        """The sentences, spaced like plain English. Raises DataError when they cannot be read."""
        return lm1b.open_split(self.path, self.split).documents(self.start, self.stop)


@dataclasses.dataclass(frozen=True)
class MarkovRows:
    """Rows start to stop of the sample paths of a chain."""

    config: DataConfig
    seed: int
    start: int
    stop: int

    def rows(self, tokenizer: Tokenizer, how: str, seq_len: int) -> Rows:
        """Rows of `seq_len` states, an id each; they are full, so there is nothing to pack."""
        chain = sources.markov_chain(self.config, self.seed)
        rows_RxN = sources.markov_rows(chain, self.seed, self.config.markov_rows, seq_len)[self.start : self.stop]
        return Rows(rows_RxN.astype(tokenizer.dtype), documents=len(rows_RxN), document_tokens=rows_RxN.size)


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a source of text is read. Every method raises DataError when it cannot be.

    The least that a source of one's own has is `documents`.
    """

    config: DataConfig
    seed: int

    def documents(self) -> Iterable[str]:
        """Texts in the order of the source; blank ones and repetitions are left out later."""
        raise NotImplementedError(f"{type(self).__name__} has no documents()")

    def distinct_documents(self) -> list[str]:
        """The documents that are not blank, each of them once.

        Raises:
          DataError: there are none, or they cannot be read.
        """
        try:
            documents = _texts(self.documents())
        except UserError:
            raise
        except Exception as error:  # of a source of one's own: anything can be raised
            if not is_own(self.config.source):
                raise
            reason = " ".join(str(error).split())
            raise DataError(f"data.source = {self.config.source!r} fails: {type(error).__name__}: {reason}") from None
        if is_own(self.config.source) and not any(map(str.strip, documents)):
            raise DataError(f"data.source = {self.config.source!r} gives no text; its documents() should")
        return sources.distinct(documents, self.config.path)

    def files(self) -> Sequence[str]:
        """Those of the user's that the text is in."""
        return []

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, unless it is to be trained on the training split."""
        return None if is_trained(self.config) else pretrained.load_configured(self.config)

    def save_beside(self, directory: Path, tokenizer: Tokenizer) -> None:
        """Writes what prepared data keeps beside its tokenizer; raises OSError."""

    def units(self) -> Units:
        """Units of both splits, which share no document.

        Here of distinct documents that fit into memory, in random order, a random part of them for validation.

        Raises:
          DataError: there are fewer than two.
        """
        documents = self.distinct_documents()
        if len(documents) < 2:
            separator = f"check data.document_separator = {self.config.document_separator!r} or "
            raise DataError(
                f"data.path = {self.config.path!r} holds 1 distinct document, and one is needed for training and one "
                f"for validation; {'' if is_own(self.config.source) else separator}give more text"
            )
        train, validation = split_at_random(self.config, self.seed, documents)
        return {"train": _in_parts(train), "validation": _in_parts(validation)}


def _texts(documents: Iterable[str]) -> list[str]:
    """As a list. Raises TypeError when they are no texts, or one text, which would be taken letter by letter."""
    if isinstance(documents, str):
        raise TypeError("documents() gives one text, it should give several: a list, or one by one")
    documents = list(documents)
    for document in documents:
        if not isinstance(document, str):
            raise TypeError(f"documents() gives {type(document).__name__} among its texts")
    return documents


class News(Reader):
    """News articles, cleaned."""

    def documents(self) -> Iterable[str]:
        """The articles, in the order of their file."""
        return sources.news(self.config.path)

    def files(self) -> Sequence[str]:
        """The local copy, where one is given."""
        return [self.config.path] if self.config.path else []


class TextFiles(Reader):
    """A user's files; in a stream, where the last documents are held out."""

    def documents(self) -> Iterable[str]:
        """What has text, file by file."""
        return sources.texts(self.config)

    def files(self) -> Sequence[str]:
        """All that `data.path` stands for."""
        return matching_files(self.config.path, quiet=True)

    def units(self) -> Units:
        """As of any source, or parts of files, the last documents of which are for validation."""
        separator, count = self.config.document_separator, self.config.validation_documents
        if not count:
            return super().units()
        train, validation = hold_out_last(sources.text_ranges(self.config), separator, count)
        files = dict.fromkeys((validation[0].path, validation[-1].path))
        _log.info("held out for validation: the last %d documents, in %s", count, " to ".join(files))
        return {
            split: [FileDocuments(tuple(group), separator) for group in grouped(parts)]
            for split, parts in (("train", train), ("validation", validation))
        }


class Lm1b(Reader):
    """The One Billion Word benchmark, its test split for validation."""

    def files(self) -> Sequence[str]:
        """Those of all splits."""
        return lm1b.data_files(self.config.path)

    def units(self) -> Units:
        """Parts of the split `train`, and of `test` for validation."""
        return {"train": self._sentences("train"), "validation": self._sentences("test")}

    def _sentences(self, split):
        count = len(lm1b.open_split(self.config.path, split))
        starts = range(0, count, _SENTENCES_PER_SHARD)
        return [Lm1bDocuments(self.config.path, split, i, min(i + _SENTENCES_PER_SHARD, count)) for i in starts]


class Markov(Reader):
    """Sample paths of a random Markov chain."""

    def tokenizer(self) -> Tokenizer:
        """Its ids are the states."""
        return markov_tokenizer(self.config.markov_states)

    def units(self) -> Units:
        """One for each split; the first rows are for validation."""
        rows, count = self.config.markov_rows, _num_validation(self.config, self.config.markov_rows)
        return {
            "train": [MarkovRows(self.config, self.seed, count, rows)],
            "validation": [MarkovRows(self.config, self.seed, 0, count)],
        }


def reader(config: DataConfig, seed: int) -> Reader:
    """The reader of a config's source. Raises ConfigError when one's own cannot be imported."""
    kind = imported(source(config.source).reader, "a source")
    if not (isinstance(kind, type) and issubclass(kind, Reader)):
        raise ConfigError(f"data.source = {config.source!r} is not a subclass of kforcing_jax.data.units.Reader")
    return kind(config, seed)


def encode_and_pack(tokenizer: Tokenizer, texts: Iterator[str | None], how: str, seq_len: int) -> Rows:
    """Rows of the documents that are not blank, with the ids that begin and end them.

    A document that has a row or segment of its own is cut to a row; where an id begins documents, the end's id stays.

    Raises:
      DataError: the text cannot be read, or the tokenizer has no token that ends a document.
    """
    end_id, bos_id, unknown_id = tokenizer.eos_id, tokenizer.bos_id, tokenizer.unknown_id
    if end_id is None:
        raise DataError("the tokenizer has no token that ends a document")
    skipped, unknown, encoded = 0, 0, []

    def documents():
        nonlocal skipped
        for text in texts:
            if text and text.strip():
                yield text.strip()
            else:
                skipped += 1

    begin = [bos_id] if PACKINGS[how].segmented and tokenizer.begins_documents else []
    longest = seq_len - 2 if begin else None
    for ids in tokenizer.encode_documents(documents()):
        unknown += 0 if unknown_id is None else ids.count(unknown_id)
        encoded.append(np.array([*begin, *ids[:longest], end_id], tokenizer.dtype))
    rows = packing.pack(encoded, how, seq_len, end_id, (end_id if bos_id is None else bos_id, end_id))
    return dataclasses.replace(rows, unknown_tokens=unknown, skipped=skipped)


def split_at_random(config: DataConfig, seed: int, documents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(for training, for validation), in random order."""
    order = np.random.default_rng([seed, 2]).permutation(len(documents))
    shuffled = [documents[i] for i in order]
    count = _num_validation(config, len(documents))
    return shuffled[count:], shuffled[:count]


def _num_validation(config, available):
    return min(max(1, round(config.validation_fraction * available)), available - 1)


def _in_parts(documents) -> list[GivenDocuments]:
    return [GivenDocuments(part) for part in in_parts(documents, len)]


def in_parts(documents: Sequence[Any], characters: Callable[[Any], int]) -> list[tuple]:
    """Documents as they are to be in shards."""
    ends = itertools.accumulate(map(characters, documents))
    parts = itertools.groupby(zip(ends, documents, strict=True), lambda pair: pair[0] // _CHARACTERS_PER_SHARD)
    return [tuple(document for _, document in part) for _, part in parts]


def first_texts(units: Sequence[Any]) -> Iterator[str]:
    """The first documents of units that have `texts`, as many as a vocabulary is trained on."""
    read = 0
    for text in filter(None, itertools.chain.from_iterable(unit.texts() for unit in units)):
        yield text
        read += len(text)
        if read > _CHARACTERS_FOR_TOKENIZER:
            return
