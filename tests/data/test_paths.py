"""Which files a path stands for, on a disk and behind a URL, and what is said of the rest."""

import bz2
import gzip
import logging
import lzma
import os

import fsspec
import pytest

from kforcing_jax.data.files import file_ranges
from kforcing_jax.data.paths import difference, fingerprints, matching_files
from kforcing_jax.data.places import cache_folder, expanded
from kforcing_jax.errors import DataError


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")


def names(folder, path=None):
    """What is found, relative to the folder."""
    return [os.path.relpath(file, folder) for file in matching_files(str(path or folder))]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "kforcing_jax")
    return lambda: caplog.text


def test_numbers_in_names_count_as_numbers(tmp_path):
    wanted = ["part-1.txt", "part-2.txt", "part-9/a.txt", "part-10/a.txt", "part-10.txt", "part-011.txt", "part-11.txt"]
    make(tmp_path, *wanted)
    assert set(names(tmp_path)) == set(wanted)
    for files in (names(tmp_path), names(tmp_path, tmp_path / "**/*.txt")):
        assert [name for name in files if "/" not in name] == [name for name in wanted if "/" not in name]
        assert files.index("part-9/a.txt") < files.index("part-10/a.txt")


def test_endings_are_compared_without_case_and_what_is_left_out_is_said(tmp_path, said):
    make(tmp_path, "A.TXT", "b.Json", "c.md", "d.csv", "e", "f.log", ".hidden/g.txt", ".h.txt")
    os.symlink("nowhere.txt", tmp_path / "i.txt")
    assert names(tmp_path) == ["A.TXT", "b.Json"]
    assert "4 (files whose ending is none of .txt, .json" in said() and "c.md" in said() and ", ..." in said()
    assert "2 (names that begin with a dot)" in said() and "1 (links to nothing)" in said() and "i.txt" in said()


def test_a_glob_says_the_folders_that_it_matches(tmp_path, said):
    make(tmp_path, "a.txt", "sub/b.txt", "c.md")
    assert names(tmp_path, tmp_path / "*") == ["a.txt"]
    assert "1 (folders that a pattern matches)" in said() and "sub" in said() and "c.md" in said()


def test_a_folder_that_was_read_as_a_pattern_is_said_also_where_that_matches_others(tmp_path, said):
    make(tmp_path, "texts [12]/a.txt", "texts 1/b.txt")
    assert names(tmp_path, tmp_path / "texts [12]/*.txt") == ["texts 1/b.txt"]
    assert "'texts [12]' is there, but was read as a pattern" in said()


def test_links_to_folders_are_followed_and_those_that_lead_back_end(tmp_path, said):
    make(tmp_path / "elsewhere", "deep/b.txt")
    make(tmp_path / "texts", "a.txt")
    os.symlink("../elsewhere", tmp_path / "texts/linked")
    os.symlink("../../elsewhere", tmp_path / "elsewhere/deep/again")
    for path in (tmp_path / "texts", tmp_path / "texts/**/*.txt"):
        assert names(tmp_path / "texts", path)[:2] == ["a.txt", "linked/deep/b.txt"]
        assert "what a link leads to again" in said()
        assert len({os.path.realpath(file) for file in matching_files(str(path))}) == len(matching_files(str(path)))


def test_runs_and_prepared_data_are_no_text(tmp_path, said):
    make(tmp_path, "a.txt", "run/config.json", "run/.lock", "run/metrics.jsonl", "run/stages/x.json")
    make(tmp_path / "data", "manifest.json", "tokenizer.json", "train-00000-of-00001.arrayrecord")
    assert names(tmp_path) == ["a.txt"] and "2 (runs and prepared data)" in said()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("c.md", r"'.*c\.md' ends in none of \.txt, \.json, .*Rename or convert"),
        ("*.md", r"matches no file; .*left out 1 \(files whose ending .*c\.md"),
        ("*.none", r"matches no file; it should be a file, or a folder of \.txt, "),
        ("my texts [[]v2]/*.none", r"matches no file;"),
        ("my texts [v2]/*.txt", r"'my texts \[v2\]' is there, but was read as a pattern; write 'my texts \[\[\]v2\]'"),
        ("no such folder/a.txt", "matches no file"),
    ],
)
def test_what_matches_nothing_says_why(tmp_path, pattern, message):
    make(tmp_path, "c.md", "my texts [v2]/a.txt", "a[1].txt")
    with pytest.raises(DataError, match=message) as raised:
        matching_files(str(tmp_path / pattern))
    assert "\n" not in str(raised.value)
    assert names(tmp_path, tmp_path / "a[1].txt") == ["a[1].txt"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gzip", gzip.compress(b"text", mtime=0)),
        ("bz2", bz2.compress(b"text")),
        ("xz", lzma.compress(b"text")),
        ("zstd", b"\x28\xb5\x2f\xfd rest"),
        ("zip", b"PK\x03\x04 rest"),
    ],
)
def test_a_compressed_file_is_called_by_its_format_whatever_its_name(tmp_path, name, content):
    for file in ("a.jsonl.packed", "b.txt", "c.JSON"):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(DataError, match=rf"{file} is compressed \({name}\); unpack it"):
            file_ranges(matching_files(str(tmp_path / file)))


class Forbidden(fsspec.AbstractFileSystem):
    """A bucket whose reader has no permission."""

    protocol = "forbidden"

    def ls(self, path, detail=True, **kwargs):
        raise PermissionError(13, "does not have storage.objects.list access to the bucket")

    info = _open = ls


@pytest.fixture
def bucket():
    files = fsspec.filesystem("memory")
    for name in ("10.jsonl", "9.jsonl", "a.TXT", "readme.md", ".tmp/b.txt", ".c.jsonl", "sub/d.txt"):
        files.pipe(f"/bucket/texts/{name}", b"{}")
    yield files
    files.rm("/bucket", recursive=True)


def test_a_url_stands_for_what_a_path_would(bucket, said):
    def found(url):
        return [file.removeprefix("memory:///bucket/texts/") for file in matching_files(url)]

    assert found("memory://bucket/texts") == ["9.jsonl", "10.jsonl", "a.TXT", "sub/d.txt"]
    assert "readme.md" in said() and "2 (names that begin with a dot)" in said()
    assert found("memory://bucket/texts/*.jsonl") == ["9.jsonl", "10.jsonl"]
    assert found("memory://bucket/texts/[a-z].???") == ["a.TXT"]
    assert found("memory://bucket/texts/9.jsonl") == ["9.jsonl"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "forbidden://bucket/owt",
            r"forbidden://bucket/owt cannot be read: does not have storage\.objects\.list access",
        ),
        ("forbidden://bucket/*.jsonl", "does not have storage"),
        ("memory://bucket/texts/*.none", "matches no file"),
        ("memory://bucket/nothing/*.jsonl", "is not there"),
        ("memory://bucket/nothing.jsonl", "nothing.jsonl is not there"),
        ("nowhere://bucket/x", "cannot be read: .*nowhere"),
    ],
)
def test_a_bucket_that_cannot_be_read_is_one_line(bucket, path, message):
    fsspec.register_implementation("forbidden", Forbidden, clobber=True)
    with pytest.raises(DataError, match=message) as raised:
        matching_files(path)
    assert "\n" not in str(raised.value)


def test_a_file_is_the_same_by_what_is_in_it_and_read_again_only_after_a_change(tmp_path, bucket):
    make(tmp_path, "a.txt", "b.txt")
    paths = [*matching_files(str(tmp_path)), "memory://bucket/texts/9.jsonl"]
    before = fingerprints(paths)
    os.utime(tmp_path / "a.txt", (1, 1))
    assert difference(before, fingerprints(paths, before)) is None
    for path, change in ((paths[0], "TEXT"), (paths[1], "longer text")):
        with open(path, "w") as file:
            file.write(change)
        now = fingerprints(paths, before)
        assert difference(before, now) == f"{path} has changed"
        before = now
    bucket.pipe("/bucket/texts/9.jsonl", b"{},")
    assert difference(before, fingerprints(paths, before)) == f"{paths[2]} has changed"
    assert difference(before, fingerprints(paths[1:], before)) == f"{paths[0]} is gone"
    assert difference(fingerprints(paths[1:]), before) == f"{paths[0]} is new"


def test_without_a_home_folder_the_variable_to_set_is_named(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(DataError, match=r"no home folder .*set XDG_CACHE_HOME"):
        cache_folder()
    with pytest.raises(DataError, match="~/texts is in a home folder, and there is none"):
        expanded("~/texts")
    monkeypatch.setenv("XDG_CACHE_HOME", "/tmp/cache")
    assert str(cache_folder("x")) == "/tmp/cache/kforcing_jax/x"
