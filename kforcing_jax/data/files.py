"""Documents in files: txt, jsonl, parquet and ArrayRecord, on a disk or in a bucket.

A document has an address within its file: a byte of a jsonl file, a row of parquet, a record, a number in a txt file. A
`FileRange` is what lies between two addresses, so that one large file can be read in parts, by several processes.
"""

import contextlib
import dataclasses
import glob
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec

from kforcing_jax.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrayrecord", ".array_record")

# Of text, in one range; a range is the unit of work that is done again after an interruption.
_BYTES_PER_RANGE = 64 * 2**20
_ROWS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class FileRange:
    """The documents of a file whose address is in [start, stop); about `size` bytes of it."""

    path: str
    start: int
    stop: int
    size: int = 0

    def documents(self, separator: str) -> Iterator[tuple[int, str]]:
        """(address, text) of every document. `separator` is what stands between those of a txt file.

        Raises:
          DataError: the file cannot be read; names it, and the line, row or byte.
        """
        with _failing_as_one_line(self.path):
            yield from _READERS[_suffix(self.path)](self, separator)


def matching_files(path: str) -> list[str]:
    """Files of a path, sorted: one file, those of a folder at any depth, or what a glob matches; URLs likewise.

    Raises:
      DataError: there is none, or the place cannot be read.
    """
    with _failing_as_one_line(path):
        files = _remote_files(path) if "://" in path else _local_files(path)
    if not files:
        endings = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
        raise DataError(f"data.path = {path!r} matches no file; it should be a file, or a folder of {endings}")
    return sorted(files)


def file_ranges(paths: Sequence[str]) -> list[FileRange]:
    """The whole of every file, in order, in ranges of bounded size."""
    return [part for path in paths for part in _split(path)]


def hold_out_last(ranges: Sequence[FileRange], separator: str, count: int) -> tuple[list[FileRange], list[FileRange]]:
    """(all but the last `count` documents, those), both in order. Only the ranges at the end are read.

    Raises:
      DataError: there are no more than `count` documents.
    """
    missing = count
    for index in reversed(range(len(ranges))):
        part = ranges[index]
        addresses = [address for address, text in part.documents(separator) if text.strip()]
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
    groups, size = [], 0
    for part in ranges:
        if not groups or size + part.size > _BYTES_PER_RANGE:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.size
    return groups


def _local_files(path):
    folder = Path(path).expanduser()
    if folder.is_dir():
        return [str(file) for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
    # A name with brackets may be a file as well as a glob.
    files = [str(folder)] if folder.exists() else glob.glob(str(folder), recursive=True)
    return [file for file in files if os.path.isfile(file)]


def _remote_files(url):
    filesystem, _, _ = fsspec.get_fs_token_paths(url)
    location = filesystem._strip_protocol(url)
    if "*" in location:
        # Asked first, because glob() takes a missing permission for no match.
        filesystem.ls(location.split("*")[0].rpartition("/")[0])
        files = filesystem.glob(location)
    elif filesystem.isdir(location):
        files = [file for file in filesystem.find(location) if file.endswith(SUFFIXES)]
    else:
        # Not exists(), which takes a missing permission for a missing file.
        files = [filesystem.info(location)["name"]]
    return [filesystem.unstrip_protocol(file) for file in files]


@contextlib.contextmanager
def _failing_as_one_line(path):
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"data.path: {path} is not there") from None
    except ImportError as error:
        raise DataError(
            f"{path} needs a package that is not installed ({error}); fsspec's documentation says which one serves "
            'its protocol (gs://: pip install -e ".[gcs]")'
        ) from None
    except Exception as error:  # every file system and format has errors of its own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path} cannot be read: {reason}") from None


def _suffix(path):
    suffix = os.path.splitext(path)[1]
    return suffix if suffix in _READERS else ".txt"


def _split(path: str) -> list[FileRange]:
    """Ranges of about `_BYTES_PER_RANGE` bytes, where documents can be found without reading those before them."""
    with _failing_as_one_line(path):
        size, suffix = fsspec.core.url_to_fs(path)[0].size(path), _suffix(path)
        stop = _ENDS[suffix](path) if suffix in _ENDS else size
    parts = 1 if suffix == ".txt" else max(1, min(round(size / _BYTES_PER_RANGE), stop))
    bounds = [stop * i // parts for i in range(parts + 1)]
    return [FileRange(path, *pair, size // parts) for pair in itertools.pairwise(bounds)]


def _txt_documents(part, separator):
    text = _decode(part.path, _read(part.path)).removeprefix("\ufeff").replace("\r\n", "\n")
    documents = text.split(separator) if separator else [text]
    yield from list(enumerate(documents))[part.start : part.stop]


def _jsonl_documents(part, separator):
    """Of the lines that begin in the range. The number of a line is known only when reading starts at the first."""
    with fsspec.open(part.path, "rb") as file:
        lines = _lines_from(file, part.start)
        for number, (address, line) in enumerate(lines, start=1):
            if address >= part.stop:
                return
            where = f"line {number}" if part.start == 0 else f"byte {address}"
            text = _decode(part.path, line, address).removeprefix("\ufeff")
            if text.strip():
                yield address, _text_field(text, f"{part.path}, {where}")


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
    import pyarrow.parquet

    with fsspec.open(part.path, "rb") as file:
        table = pyarrow.parquet.ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            raise DataError(f"{part.path} has columns {', '.join(table.schema_arrow.names)}; one should be called text")
        sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        first_rows = [sum(sizes[:i]) for i in range(len(sizes))]
        groups = [
            i for i, (first, size) in enumerate(zip(first_rows, sizes, strict=True)) if _overlap(part, first, size)
        ]
        row = first_rows[groups[0]] if groups else 0
        for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=["text"]):
            for text in batch.column(0).to_pylist():
                if part.start <= row < part.stop and text:
                    yield row, _checked_text(text, f"{part.path}, row {row}")
                row += 1


def _overlap(part, first, size):
    return first < part.stop and part.start < first + size


def _parquet_end(path):
    import pyarrow.parquet

    with fsspec.open(path, "rb") as file:
        return pyarrow.parquet.ParquetFile(file).metadata.num_rows


def _record_documents(part, separator):
    with _record_reader(part.path) as reader:
        for start in range(part.start, part.stop, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, part.stop)
            for number, record in enumerate(reader.read(range(start, stop)), start=start):
                yield number, _record_text(record, f"{part.path}, record {number}")


def _record_text(record, where):
    """A record is a text, or a JSON object that has one."""
    text = _decode(where, record)
    return _text_field(text, where) if text.lstrip().startswith('{"') else _checked_text(text, where)


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


def _text_field(line, where):
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); each line should be an object") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise DataError(f'{where} has no string field "text"; each line should be {{"text": "..."}}')
    return _checked_text(entry["text"], where)


def _checked_text(text, where):
    if not isinstance(text, str):
        raise DataError(f"{where} holds {type(text).__name__}, expected text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where} has half of a surrogate pair, which is no character; escape the whole pair") from None
    return text


_READERS = {
    ".txt": _txt_documents,
    ".jsonl": _jsonl_documents,
    ".parquet": _parquet_documents,
    ".arrayrecord": _record_documents,
    ".array_record": _record_documents,
}
# The address after the last document where it is not the size in bytes, which no txt file has more documents than.
_ENDS = {".parquet": _parquet_end, ".arrayrecord": _record_end, ".array_record": _record_end}
