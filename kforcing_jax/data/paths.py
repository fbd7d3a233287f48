"""Which files a path stands for, in which order, and whether they are still what they were."""

import collections
import concurrent.futures
import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import fsspec

from kforcing_jax.data.files import SUFFIXES, compression, failing_as_one_line
from kforcing_jax.data.places import expanded
from kforcing_jax.errors import DataError

_ENDINGS = ", ".join(SUFFIXES)
_UNKNOWN, _HIDDEN = f"files whose ending is none of {_ENDINGS}", "names that begin with a dot"
_TWICE, _BROKEN, _FOLDER = "what a link leads to again", "links to nothing", "folders that a pattern matches"
_OWN = "runs and prepared data"
# Names that folders of ours hold: prepared data, such that is being prepared, runs.
_OURS = ({"manifest.json", "tokenizer.json"}, {"preparing.lock"}, {"config.json", ".lock"})
# What file systems call the version of a file, best first.
_VERSIONS = ("etag", "ETag", "generation", "md5Hash", "LastModified", "updated", "mtime", "created")
_log = logging.getLogger("kforcing_jax")


def matching_files(path: str, quiet: bool = False) -> list[str]:
    """Files of a path: one file, those of a folder at any depth, or what a glob matches; URLs likewise.

    They are in order of their names, in which numbers count as numbers. What is left out is said, unless `quiet`.

    Raises:
      DataError: there is none, or the place cannot be read.
    """
    left_out: collections.defaultdict[str, list[str]] = collections.defaultdict(list)
    with failing_as_one_line(path):
        if "://" in path.removeprefix("file://"):
            found = _remote_files(path, left_out)
        else:
            found = _local_files(expanded(path.removeprefix("file://")), left_out)
        files = [file for file in found if _is_known(file, left_out)]
        if not files:
            raise _no_file(path, left_out)
    if left_out and not quiet:
        _log.warning("data.path = %r: left out %s", path, _listed(left_out))
    if _pattern_note(path) and not quiet:
        _log.warning("data.path = %r%s", path, _pattern_note(path))
    return sorted(files, key=_natural)


def fingerprints(paths: Sequence[str], known: Mapping[str, list] | None = None) -> dict[str, list]:
    """{path: [size, time or version, SHA-256]} of files; of a bucket's without the last.

    Those that have the size and time of `known` are not read again.

    Raises:
      DataError: a file cannot be read.
    """
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(lambda path: _fingerprint(path, (known or {}).get(path)), paths), strict=True))


def difference(before: Mapping[str, list], now: Mapping[str, list]) -> str | None:
    """The first file of two `fingerprints` that is not the same, and why; None when all are."""
    for name in sorted({*before, *now}, key=_natural):
        if name not in now:
            return f"{name} is gone"
        if name not in before:
            return f"{name} is new"
        (size, time, digest), (size_now, time_now, digest_now) = before[name], now[name]
        if size != size_now or (digest or time) != (digest_now or time_now):
            return f"{name} has changed"
    return None


def _natural(path):
    # The path itself last: 01 and 1 are the same number.
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", path)], path


def _listed(left_out):
    return "; ".join(
        f"{len(names)} ({reason}): {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for reason, names in left_out.items()
    )


def _is_known(file, left_out):
    known = os.path.splitext(file)[1].lower() in SUFFIXES
    if not known:
        left_out[_UNKNOWN].append(file)
    return known


def _no_file(path, left_out):
    unknown = left_out.get(_UNKNOWN, [])
    for file in unknown[:1]:
        how = compression(file)
        if how:
            return DataError(f"{file} is compressed ({how}); unpack it")
    if unknown == [str(expanded(path))] or unknown == [path]:
        return DataError(f"data.path = {path!r} ends in none of {_ENDINGS}; what is it? Rename or convert it")
    return DataError(
        f"data.path = {path!r} matches no file{_pattern_note(path)}; it should be a file, or a folder of {_ENDINGS}"
        f"{'; left out ' if left_out else ''}{_listed(left_out)}"
    )


def _pattern_note(path):
    """Of a folder or file that is there by the name that was read as a pattern."""
    parts = Path(path).parts
    for i, part in enumerate(parts):
        if glob.has_magic(part) and "://" not in path and os.path.exists(expanded(os.path.join(*parts[: i + 1]))):
            return f": {part!r} is there, but was read as a pattern; write {glob.escape(part)!r} or rename it"
    return ""


def _local_files(place: Path, left_out) -> Iterator[str]:
    if place.is_dir():
        found = _in_folder(place, left_out)
    elif place.exists():  # a name with brackets may be a file as well as a glob
        found = [str(place)]
    else:
        found = _once(glob.glob(str(place), recursive=True), left_out)
    for file in found:
        if os.path.isfile(file):
            yield file
        else:
            left_out[_FOLDER if os.path.isdir(file) else _BROKEN].append(file)


def _in_folder(folder, left_out):
    def failed(error):
        raise error

    seen = set()
    for root, folders, names in os.walk(folder, onerror=failed, followlinks=True):
        identity = os.path.realpath(root)
        if identity in seen or any(own <= {*names} for own in _OURS):
            left_out[_TWICE if identity in seen else _OWN].append(root)
            folders.clear()
            continue
        seen.add(identity)
        for name in filter(_is_hidden, (*folders, *names)):
            left_out[_HIDDEN].append(os.path.join(root, name))
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        yield from (os.path.join(root, name) for name in names if not _is_hidden(name))


def _is_hidden(name):
    return name.startswith(".")


def _once(files, left_out):
    """Without those that `**` finds again and again behind a link that leads back."""
    seen = set()
    for file in sorted(files, key=len):
        folder, name = os.path.split(file)
        identity = os.path.join(os.path.realpath(folder), name)
        if identity in seen:
            left_out[_TWICE].append(file)
        else:
            seen.add(identity)
            yield file


def _remote_files(url, left_out):
    filesystem, _, _ = fsspec.get_fs_token_paths(url)
    location = filesystem._strip_protocol(url)
    fixed = re.split(r"[*?\[]", location)[0].rpartition("/")[0] if glob.has_magic(location) else location
    if "*" in location or (fixed != location and not filesystem.exists(location)):
        # Asked first, because glob() takes a missing permission for no match.
        filesystem.ls(fixed)
        found = [file for file, info in filesystem.glob(location, detail=True).items() if info["type"] != "directory"]
    elif filesystem.isdir(location):
        found, fixed = filesystem.find(location), location
    else:
        # Not exists(), which takes a missing permission for a missing file.
        return [filesystem.unstrip_protocol(filesystem.info(location)["name"])]
    # As in a folder of a disk; a pattern that asks for such names gets them.
    hidden = [] if "/." in location else [file for file in found if "/." in file[len(fixed) :]]
    if hidden:
        left_out[_HIDDEN].extend(hidden)
    return [filesystem.unstrip_protocol(file) for file in found if file not in set(hidden)]


def _fingerprint(path, known):
    with failing_as_one_line(path):
        return _remote_fingerprint(path) if "://" in path else _local_fingerprint(expanded(path), known)


def _remote_fingerprint(url):
    filesystem, location = fsspec.core.url_to_fs(url)
    info = filesystem.info(location)
    return [info["size"], next((str(info[name]) for name in _VERSIONS if info.get(name)), ""), ""]


def _local_fingerprint(path, known):
    # The time of a change to the file or its name, which no tool sets back.
    now = [os.stat(path).st_size, os.stat(path).st_ctime_ns]
    if known and list(known[:2]) == now:
        return list(known)
    with open(path, "rb") as file:
        return [*now, hashlib.file_digest(file, "sha256").hexdigest()]
