"""Documents in files: txt, json, parquet and ArrayRecord, on a disk or in a bucket. `paths` says which files.

A document has an address within its file: a byte of a file of JSON lines, a row of parquet, a record, a number in a txt
file or JSON array. A `FileRange` is what lies between two addresses, so that one large file can be read in parts, by
several processes.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import fsspec

from kforcing_jax.errors import DataError

# Of text, in one range; a range is the unit of work that is done again after an interruption.
_BYTES_PER_RANGE = 64 * 2**20
_ROWS_AT_ONCE = 1024
_BLANK_LINE = re.compile(r"(?m)^[^\S\n]+$")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
    b"\x04\x22\x4d\x18": "lz4",
}


@dataclasses.dataclass(frozen=True)
class FileRange:
    """The documents of a file whose address is in [start, stop); about `size` bytes of it."""

    path: str
    start: int
    stop: int
    size: int = 0

    def documents(self, separator: str) -> Iterator[tuple[int, str | None]]:
        """(address, text) of every document; None where an entry has no text, or nothing but whitespace.

        `separator` is what stands between the documents of a txt file.

        Raises:
          DataError: the file cannot be read, or none of its entries has a field for text; names it, and the line, row
            or byte.
        """
        with failing_as_one_line(self.path):
            for address, text in _format(self.path).documents(self, separator):
                yield address, text if text and text.strip() else None


def file_ranges(paths: Sequence[str]) -> list[FileRange]:
    """The whole of every file, in order, in ranges of bounded size. Raises DataError for what cannot be read."""
    return [part for path in paths for part in _split(path)]


def hold_out_last(ranges: Sequence[FileRange], separator: str, count: int) -> tuple[list[FileRange], list[FileRange]]:
    """(all but the last `count` documents, those), both in order. Only the ranges at the end are read.

    Raises:
      DataError: there are no more than `count` documents.
    """
    missing = count
    for index in reversed(range(len(ranges))):
        part = ranges[index]
        addresses = [address for address, text in part.documents(separator) if text]
        if len(addresses) > missing:
            first = addresses[-missing] if missing else part.stop
            before, after = dataclasses.replace(part, stop=first), dataclasses.replace(part, start=first)
            return [*ranges[:index], before], [*([after] if missing else []), *ranges[index + 1 :]]
        missing -= len(addresses)
    if count == missing:
        raise DataError(f"data.path holds no text ({len(ranges)} parts of files were read); give other files")
    raise DataError(
        f"data.validation_documents = {count} holds out every document, there are only {count - missing}; lower it"
    )


def grouped(ranges: Sequence[FileRange]) -> list[list[FileRange]]:
    """Neighbouring ranges together, so that many small files make few groups."""
    groups: list[list[FileRange]] = []
    size = 0
    for part in ranges:
        if not groups or size + part.size > _BYTES_PER_RANGE:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.size
    return groups


def json_entries(path: str) -> Iterator[tuple[str, object]]:
    """(place, entry) of every line of a file of JSON lines, or entry of a JSON array; the place as errors name it.

    Raises:
      DataError: the file is of another kind, or cannot be read; names it, and the line or entry.
    """
    with failing_as_one_line(path):
        how, file_format = compression(path), _format(path)
        if how or file_format not in (_LINES, _ARRAY):
            raise DataError(f"{path} is {how or _suffix(path)}; it should be lines of JSON, as a .jsonl has them")
        part = FileRange(path, 0, sys.maxsize)
        with fsspec.open(path, "rb") as file:
            entries = _line_entries(part, file) if file_format is _LINES else _array_entries(part)
            for _, where, entry in entries:
                yield f"{path}, {where}", entry


def separator_is_missing(paths: Iterable[str], separator: str) -> bool:
    """Whether there are txt files, and the separator of documents is in none of them."""
    texts = [path for path in paths if _suffix(path) == ".txt" and not compression(path)]
    separator = _line_ends(separator)
    return bool(texts and separator) and not any(separator in _text_of(path, separator) for path in texts)


def compression(path: str) -> str | None:
    """The name of the format that a file is compressed in. Raises OSError."""
    with fsspec.open(path, "rb") as file:
        head = file.read(8)
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)


@contextlib.contextmanager
def failing_as_one_line(path: str) -> Iterator[None]:
    """Errors of file systems and formats as DataError, naming the path."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"data.path: {path} is not there") from None
    except ImportError as error:
        raise DataError(
            f"{path} needs a package that is not installed ({error}); fsspec's documentation says which one serves "
            "its protocol (gs://: pip install 'kforcing-jax[gcs]')"
        ) from None
    except Exception as error:  # every file system and format has errors of its own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path} cannot be read: {reason}") from None


def _suffix(path):
    return os.path.splitext(path)[1].lower()


def _split(path: str) -> list[FileRange]:
    """Ranges of about `_BYTES_PER_RANGE` bytes, where documents can be found without reading those before them."""
    with failing_as_one_line(path):
        how = compression(path)
        if how:
            raise DataError(f"{path} is compressed ({how}); unpack it")
        size = fsspec.core.url_to_fs(path)[0].size(path)
        file_format = _format(path)
        stop = file_format.end(path) if file_format.end else size
    parts = max(1, min(round(size / _BYTES_PER_RANGE), stop)) if file_format.divisible else 1
    bounds = [stop * i // parts for i in range(parts + 1)]
    return [FileRange(path, *pair, size // parts) for pair in itertools.pairwise(bounds)]


def _text_of(path, separator):
    """A txt file with line ends as \\n, and, where empty lines separate documents, visually empty lines empty."""
    text = _line_ends(_decode(path, _read(path)).removeprefix("\ufeff"))
    return _BLANK_LINE.sub("", text) if "\n\n" in separator else text


def _line_ends(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _txt_documents(part, separator):
    separator = _line_ends(separator)
    text = _text_of(part.path, separator)
    documents = text.split(separator) if separator else [text]
    # What is blank stands between two separators: no document, and none without a text either.
    yield from ((i, documents[i]) for i in range(part.start, min(part.stop, len(documents))) if documents[i].strip())


def _json_format(path):
    """Of a .json file: an array, one object over several lines, or lines of objects."""
    with fsspec.open(path, "rb") as file:
        line = b""
        while not line.strip() and (line := file.readline()):
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            return _ARRAY if isinstance(json.loads(line), list) else _LINES
        except (ValueError, RecursionError):
            return _ARRAY  # it goes on in the next line, or is damaged


def _array_documents(part, separator):
    yield from _texts(part.path, _array_entries(part))


def _array_entries(part):
    text = _decode(part.path, _read(part.path)).removeprefix("\ufeff")
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{part.path} is not JSON ({error}); it should be objects, one a line or in an array") from None
    entries = entries if isinstance(entries, list) else [entries]
    numbered = list(enumerate(entries))[part.start : part.stop]
    yield from ((number, f"entry {number}", entry) for number, entry in numbered)


def _line_documents(part, separator):
    with fsspec.open(part.path, "rb") as file:
        yield from _texts(part.path, _line_entries(part, file))


def _line_entries(part, file):
    """Of the lines that begin in the range. The number of a line is known only when reading starts at the first."""
    for number, (address, line) in enumerate(_lines_from(file, part.start), start=1):
        if address >= part.stop:
            return
        where = f"line {number}" if part.start == 0 else f"byte {address}"
        text = _decode(part.path, line, address).removeprefix("\ufeff")
        if text.strip():
            yield address, where, _from_json(text, f"{part.path}, {where}")


def _lines_from(file, start):
    """(address, line) of every line that begins at or after `start`."""
    address = max(start - 1, 0)
    file.seek(address)
    if start:
        # The rest of the line before; nothing but its line break when a line begins at `start`.
        address += len(file.readline())
    while line := file.readline():
        yield address, line
        address += len(line)


def _parquet_documents(part, separator):
    with fsspec.open(part.path, "rb") as file:
        table = _parquet(part.path).ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            raise DataError(f"{part.path} has columns {', '.join(table.schema_arrow.names)}; one should be called text")
        sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        first_rows = [sum(sizes[:i]) for i in range(len(sizes))]
        groups = [i for i, first in enumerate(first_rows) if first < part.stop and part.start < first + sizes[i]]
        row = first_rows[groups[0]] if groups else 0
        for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=["text"]):
            for text in batch.column(0).to_pylist():
                if part.start <= row < part.stop:
                    yield row, checked_text(text, f"{part.path}, row {row}")
                row += 1


def _parquet_end(path):
    with fsspec.open(path, "rb") as file:
        return _parquet(path).ParquetFile(file).metadata.num_rows


def _parquet(path):
    """The module that reads such files, of a library that only they need."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow, which is not installed; pip install 'kforcing-jax[parquet]'") from None
    return pyarrow.parquet


def _record_documents(part, separator):
    with _record_reader(part.path) as reader:
        for start in range(part.start, part.stop, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, part.stop)
            for number, record in enumerate(reader.read(range(start, stop)), start=start):
                where = f"{part.path}, record {number}"
                text = _decode(where, record)
                # A record is a text, or a JSON object that has one.
                is_object = text.lstrip().startswith('{"')
                yield number, _text_field(_from_json(text, where), where) if is_object else checked_text(text, where)


def _record_end(path):
    with _record_reader(path) as reader:
        return reader.num_records()


@contextlib.contextmanager
def _record_reader(path):
    from array_record.python import array_record_module

    if "://" in path:
        raise DataError(
            f"{path}: ArrayRecord files are read from a disk; mount the bucket (gcsfuse) and give that path"
        )
    reader = array_record_module.ArrayRecordReader(path)
    try:
        yield reader
    finally:
        reader.close()


def _read(path):
    with fsspec.open(path, "rb") as file:
        return file.read()


def _decode(path, content, address=0):
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {address + error.start} ({error.reason}); convert it") from None


def _from_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); each line should be an object") from None


def _texts(path, entries):
    """(address, text) of entries (address, where, JSON). Some may lack the field, but not all."""
    without, named = 0, False
    for address, where, entry in entries:
        text = _text_field(entry, f"{path}, {where}")
        named = named or "text" in entry
        without += not named
        yield address, text
    if without and not named:
        raise DataError(f'{path}, {where} has no string field "text", nor has any before it; it has {_listed(entry)}')


def _listed(entry):
    return ", ".join(sorted(entry)[:5]) or "none"


def _text_field(entry, where):
    text = entry.get("text") if isinstance(entry, dict) else entry
    if not isinstance(entry, dict) or not isinstance(text, str | None):
        raise DataError(f'{where} has no string field "text"; each entry should be {{"text": "..."}}')
    return checked_text(text, where)


def checked_text(text: object, where: str) -> str | None:
    """A text that can be written as UTF-8, or None. Raises DataError for anything else, which is at `where`."""
    if not isinstance(text, str | None):
        raise DataError(f"{where} holds {type(text).__name__}, expected text")
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where} has half of a surrogate pair, which is no character; escape the whole pair") from None
    return text


class _Format(NamedTuple):
    """`end(path)` is the address after the last document, where that is not the size in bytes."""

    documents: Callable[[FileRange, str], Iterator[tuple[int, str | None]]]
    end: Callable[[str], int] | None = None
    divisible: bool = True


# No txt file and no array has more documents than bytes.
_ARRAY = _Format(_array_documents, divisible=False)
_LINES = _Format(_line_documents)
_RECORDS = _Format(_record_documents, _record_end)
# By ending; a function tells from the content.
_FORMATS: dict[str, _Format | Callable[[str], _Format]] = {
    ".txt": _Format(_txt_documents, divisible=False),
    ".json": _json_format,
    ".jsonl": _LINES,
    ".ndjson": _LINES,
    ".parquet": _Format(_parquet_documents, _parquet_end),
    ".arrayrecord": _RECORDS,
    ".array_record": _RECORDS,
}
SUFFIXES = tuple(_FORMATS)


def _format(path) -> _Format:
    found = _FORMATS[_suffix(path)]
    return found if isinstance(found, _Format) else found(path)
