"""Documents in files of every format, whole and in parts, on a disk and behind a URL."""

import json

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from kforcing_jax.data import files
from kforcing_jax.data.files import FileRange, file_ranges, grouped, hold_out_last, matching_files
from kforcing_jax.errors import DataError

TEXTS = [f"document {i}: " + "é漢 word " * (i % 7) for i in range(60)]


def write(path, texts=TEXTS):
    """A file in the format that its name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": t, "id": 1}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    elif path.suffix == ".parquet":
        table = pyarrow.table({"id": range(len(texts)), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(texts), "utf-8")
    else:
        writer = ArrayRecordWriter(str(path), "group_size:4")
        for number, text in enumerate(texts):
            writer.write((json.dumps({"text": text}) if number % 2 else text).encode())
        writer.close()
    return str(path)


def texts_of(ranges):
    return [text for part in ranges for _, text in part.documents("\n\n")]


every_format = pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".arrayrecord", ".array_record"])
divisible = pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrayrecord"])


@every_format
def test_every_format_gives_its_documents_in_order(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}")
    assert texts_of(file_ranges(matching_files(str(tmp_path)))) == TEXTS
    assert matching_files(path) == [path]


@divisible
@pytest.mark.parametrize("parts", [2, 3, 17, 60])
def test_parts_of_a_file_make_up_the_whole(tmp_path, monkeypatch, suffix, parts):
    path = write(tmp_path / f"a{suffix}")
    monkeypatch.setattr(files, "_BYTES_PER_RANGE", max(1, (tmp_path / f"a{suffix}").stat().st_size // parts))
    ranges = file_ranges([path])
    assert len(ranges) >= parts
    assert texts_of(ranges) == TEXTS


def test_any_cut_of_a_jsonl_file_leaves_every_line_in_one_part(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS[:4])
    size = (tmp_path / "a.jsonl").stat().st_size
    for cut in range(size + 1):
        assert texts_of([FileRange(path, 0, cut), FileRange(path, cut, size)]) == TEXTS[:4]


@every_format
@pytest.mark.parametrize("count", [0, 1, 10, 70, 119])
def test_the_last_documents_are_held_out(tmp_path, monkeypatch, suffix, count):
    monkeypatch.setattr(files, "_BYTES_PER_RANGE", 300)
    paths = [write(tmp_path / f"{name}{suffix}") for name in "ab"]
    train, held_out = hold_out_last(file_ranges(paths), "\n\n", count)
    assert texts_of(train) + texts_of(held_out) == TEXTS + TEXTS
    assert len(texts_of(held_out)) == count


def test_holding_out_everything_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"data\.validation_documents = 60 holds out every document, there are only 60"):
        hold_out_last(file_ranges([path]), "\n\n", 60)


def test_only_the_end_is_read_to_hold_out_the_last(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{name}.jsonl") for name in "abc"]
    (tmp_path / "a.jsonl").write_text("this is not JSON\n")
    train, _ = hold_out_last(file_ranges(paths), "\n\n", 5)
    with pytest.raises(DataError, match=r"a\.jsonl, line 1 is not JSON"):
        texts_of(train)


def test_small_files_are_grouped_and_order_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BYTES_PER_RANGE", 5000)
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:03}.txt").write_text(text * 20, "utf-8")
    ranges = file_ranges(matching_files(str(tmp_path)))
    groups = grouped(ranges)
    assert [part for group in groups for part in group] == ranges
    assert 5 < len(groups) < 40


def test_a_url_is_read_like_a_path(tmp_path, monkeypatch):
    bucket = fsspec.filesystem("memory")
    for name in ("a.jsonl", "b.parquet", "c.txt"):
        write(tmp_path / name)
        bucket.pipe(f"/bucket/owt/{name}", (tmp_path / name).read_bytes())
    bucket.pipe("/bucket/owt/readme.md", b"not text")
    monkeypatch.setattr(files, "_BYTES_PER_RANGE", 400)
    assert texts_of(file_ranges(matching_files("memory://bucket/owt"))) == TEXTS * 3
    assert texts_of(file_ranges(matching_files("memory://bucket/owt/*.jsonl"))) == TEXTS
    assert texts_of(file_ranges(matching_files("memory://bucket/owt/a.jsonl"))) == TEXTS


class Forbidden(fsspec.AbstractFileSystem):
    """A bucket whose reader has no permission."""

    protocol = "forbidden"

    def ls(self, path, detail=True, **kwargs):
        raise PermissionError(13, "does not have storage.objects.list access to the bucket")

    info = _open = ls


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "forbidden://bucket/owt",
            r"forbidden://bucket/owt cannot be read: does not have storage\.objects\.list access",
        ),
        ("forbidden://bucket/*.jsonl", "does not have storage"),
        ("memory://bucket/owt/*.none", "matches no file"),
        ("memory://bucket/nothing/*.jsonl", "is not there"),
        ("memory://bucket/nothing.jsonl", "nothing.jsonl is not there"),
        ("nowhere://bucket/x", "cannot be read: .*nowhere"),
    ],
)
def test_a_bucket_that_cannot_be_read_is_one_line(path, message):
    fsspec.register_implementation("forbidden", Forbidden, clobber=True)
    fsspec.filesystem("memory").pipe("/bucket/owt/a.jsonl", b"")
    with pytest.raises(DataError, match=message) as raised:
        matching_files(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 but not really", r"a\.parquet cannot be read"),
        ("a.arrayrecord", b"short", r"a\.arrayrecord cannot be read"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "cut sh', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "fine"}\n\xff\n', r"a\.jsonl is not UTF-8: byte 17"),
    ],
)
def test_a_file_that_is_cut_short_or_damaged_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        texts_of(file_ranges([str(tmp_path / name)]))
    assert "\n" not in str(raised.value)


def test_a_parquet_file_without_text_says_what_it_has(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has columns body, id; one should be called text"):
        texts_of(file_ranges([str(tmp_path / "a.parquet")]))


def test_an_address_is_the_same_in_a_part_as_in_the_whole(tmp_path):
    path = write(tmp_path / "a.jsonl")
    whole = file_ranges([path])[0]
    addresses = [address for address, _ in whole.documents("\n\n")]
    assert np.all(np.diff(addresses) > 0)
    later = FileRange(path, addresses[30], whole.stop)
    assert [address for address, _ in later.documents("\n\n")] == addresses[30:]
