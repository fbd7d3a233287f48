"""Documents in files of every format, whole and in parts, on a disk and behind a URL."""

import json

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from kforcing_jax.data import files
from kforcing_jax.data.files import FileRange, file_ranges, grouped, hold_out_last, separator_is_missing
from kforcing_jax.data.paths import matching_files
from kforcing_jax.errors import DataError

TEXTS = [f"document {i}: " + "é漢 word " * (i % 7) for i in range(60)]


def write(path, texts=TEXTS):
    """A file in the format that its name says."""
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps({"text": t, "id": 1}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": t} for t in texts], indent=1), "utf-8")
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


def documents(path, content, separator="\n\n"):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [text for part in file_ranges([str(path)]) for _, text in part.documents(separator)]


every_format = pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".ndjson", ".parquet", ".arrayrecord"])
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 but not really", r"a\.parquet cannot be read"),
        ("a.arrayrecord", b"short", r"a\.arrayrecord cannot be read"),
        ("a.txt", b"good\xff", r"a\.txt is not UTF-8: byte 4"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "cut sh', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "fine"}\n\xff\n', r"a\.jsonl is not UTF-8: byte 17"),
        ("a.jsonl", b'\n{"body": "x", "id": 1}', r'a\.jsonl, line 2 has no string field "text", .* it has body, id'),
        ("a.jsonl", b'{"text": 3}', r'line 1 has no string field "text"'),
        ("a.jsonl", b'["text"]', r'line 1 has no string field "text"'),
        ("a.jsonl", rb'{"text": "\ud800"}', "line 1 has half of a surrogate pair"),
        ("a.json", b'{"text": "fine"}\n{"text": "cut sh', r"a\.json, line 2 is not JSON"),
        ("a.json", b'[{"text": "fine"},\n{"text": "cut sh', r"a\.json is not JSON"),
        ("a.json", b'["fine"]', r'a\.json, entry 0 has no string field "text"'),
        ("a.json", b'{\n"data": [{"text": "x"}]}', r'a\.json, entry 0 has no string field "text", .* it has data'),
        ("a.json", b"not JSON", r"a\.json is not JSON"),
    ],
)
def test_what_is_damaged_or_something_else_is_named_with_its_place(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as raised:
        documents(tmp_path / name, content)
    assert "\n" not in str(raised.value)


def test_a_parquet_file_without_text_says_what_it_has(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has columns body, id; one should be called text"):
        texts_of(file_ranges([str(tmp_path / "a.parquet")]))


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a\\n{b}"}\n\n{"text": "c"}',
        '\ufeff\n[{"text": "a\\n{b}"}, {"text": "c"}]',
        '[\n {\n  "text": "a\\n{b}"\n },\n {"text": "c"}\n]\n',
    ],
    ids=["lines", "an array in a line", "an array over lines"],
)
def test_a_json_file_is_read_as_what_it_is(tmp_path, content):
    assert documents(tmp_path / "a.json", content) == ["a\n{b}", "c"]
    assert documents(tmp_path / "b.JSON", '{"text": "a", "url": "u"}') == ["a"]
    assert documents(tmp_path / "c.json", '{\n "text": "a",\n "url": "u"\n}\n') == ["a"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".arrayrecord"])
def test_an_entry_without_text_is_none_in_every_format(tmp_path, suffix):
    texts = ["one", None, "", " \n", "two"]
    if suffix == ".arrayrecord":
        texts = ["one", "", json.dumps({"text": None}), " ", "two"]
    path = write(tmp_path / f"a{suffix}", texts)
    assert texts_of(file_ranges([path])) == ["one", None, None, None, "two"]
    assert texts_of(hold_out_last(file_ranges([path]), "\n\n", 1)[1]) == ["two"]
    # The first entries may lack the field, as long as one has it.
    assert documents(tmp_path / "b.jsonl", '{"id": 1}\n{"text": "one"}\n{"id": 2}') == [None, "one", None]


@pytest.mark.parametrize(
    ("content", "separator", "expected"),
    [
        ("one\n\n\n\ntwo\n\none\n\n", "\n\n", ["one", "two", "one"]),
        ("one\n \ntwo\n\t\u00a0\n \nthree \n x", "\n\n", ["one", "two", "three \n x"]),
        ("\ufeffone\r\n\r\ntwo\r\nlines\r\rthree", "\n\n", ["one", "two\nlines", "three"]),
        ("one\r\n\r\ntwo", "\r\n\r\n", ["one", "two"]),
        ("one\rtwo", "\n", ["one", "two"]),
        ("one\n\ntwo", "", ["one\n\ntwo"]),
        ("one\n \nmore --- two", "---", ["one\n \nmore ", " two"]),
    ],
)
def test_a_txt_file_is_cut_at_the_separator_and_what_looks_blank_is(tmp_path, content, separator, expected):
    found = documents(tmp_path / "a.txt", content.encode("utf-8"), separator)
    assert [text.strip("\n") for text in found] == expected


def test_a_separator_that_no_txt_file_has_is_noticed(tmp_path):
    for name, content in (("a.txt", "one\r\ntwo"), ("b.TXT", "three"), ("c.jsonl", '{"text": "a@b"}')):
        (tmp_path / name).write_bytes(content.encode())
    paths = [str(tmp_path / name) for name in ("a.txt", "b.TXT", "c.jsonl")]
    for separator, missing in (("\n", False), ("@", True), ("\\n", True), ("", False)):
        assert separator_is_missing(paths, separator) == missing
    assert not separator_is_missing(paths[2:], "@")


def test_an_address_is_the_same_in_a_part_as_in_the_whole(tmp_path):
    path = write(tmp_path / "a.jsonl")
    whole = file_ranges([path])[0]
    addresses = [address for address, _ in whole.documents("\n\n")]
    assert np.all(np.diff(addresses) > 0)
    later = FileRange(path, addresses[30], whole.stop)
    assert [address for address, _ in later.documents("\n\n")] == addresses[30:]
