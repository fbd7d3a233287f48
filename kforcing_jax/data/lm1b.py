"""LM1B (the One Billion Word Benchmark) as TensorFlow Datasets prepares it, read without TensorFlow, as plain English.

The corpus puts spaces around punctuation (`It 's $ 5 , he said .`); `detokenize` takes them out again. The measure is
`lm1b_detokenizer` of github.com/kuleshov-group/mdlm, which made the text that the paper trained on. BERT splits at
punctuation anyway, so taking out a space beside it changes no token: for bert-base-uncased only two rules matter.

- `£ 5` becomes `£5` as there, but not `the £ and`, which becomes `£and` there. `€ 5` stays, as there.
- `do n't` becomes `don't`. There it stays; LM1B itself writes `don 't`.

Everywhere else BERT's tokens are the same and only the spaces are better: times, per cent, initials, decades, e-mail,
`players ' union` (there half of a quotation), a quotation mark without its partner, closing marks in a row.
"""

import bisect
import contextlib
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from kforcing_jax.data.places import expanded
from kforcing_jax.errors import DataError

_SENTENCES_AT_ONCE = 1024
_FORMAT = "array_record"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
# The tfds command does the same, but imports Beam and mlcroissant as well.
_COMMAND = (
    "pip install tensorflow tensorflow-datasets importlib_resources && python -c 'import tensorflow_datasets as tfds; "
    'tfds.builder("lm1b", data_dir="{}", file_format="array_record").download_and_prepare()\''
)


class Rule(NamedTuple):
    """Spaces to take out: those that `replacement` does not have. `example` is (with them, without)."""

    name: str
    pattern: str
    replacement: str
    example: tuple[str, str]


# Applied in order. No rule takes out or puts in anything but spaces.
RULES = (
    Rule("web address", r"\b(https?|ftp) ?: / / ?", r"\1://", ("see http : / / bbc.co.uk", "see http://bbc.co.uk")),
    Rule("slash", r" / ", "/", ("and / or", "and/or")),
    Rule("e-mail address", r"(?<=\w) @ (?=\w[\w-]*\.\w)", "@", ("mail me @ bbc.co.uk", "mail me@bbc.co.uk")),
    # Also after an abbreviation: the U.S. 's.
    Rule("contraction", r"(?<=[\w.)]) '(?=(?i:s|t|m|d|re|ve|ll)\b(?!'))", "'", ("the U.S. 's role", "the U.S.'s role")),
    # Not when a third apostrophe follows: the letter ' s ' is a quotation.
    Rule(
        "detached contraction",
        r"(?<=[\w.)]) ' (?=(?:s|t|m|d|re|ve|ll)\b(?! '))",
        "'",
        ("Mr. Bush ' s plan", "Mr. Bush's plan"),
    ),
    Rule("Penn Treebank's not", r"(?<=\w) n't\b", "n't", ("they do n't", "they don't")),
    # Where an apostrophe ends a word later on, this one may be the beginning of that quotation.
    Rule("apostrophe in a name", r"(?<=\w) '(?=[^\W\d_])(?!.*\S'(?!\w))", "'", ("Mr. O 'Brien", "Mr. O'Brien")),
    Rule("currency", r"([$£]) (?=[\d.])", r"\1", ("$ 5 and £ .50", "$5 and £.50")),
    Rule("number sign", r"# (?=\d)", "#", ("the # 1 song", "the #1 song")),
    Rule("per cent", r"(?<=\d) %", "%", ("up 5 % in May", "up 5% in May")),
    Rule("time or ratio", r"\b(\d\d?) : (?=\d\d?\b)", r"\1:", ("at 3 : 30 p.m.", "at 3:30 p.m.")),
    Rule("initials", r"\b([A-Z]{1,2}) & ([A-Z])\b", r"\1&\2", ("AT & T lost", "AT&T lost")),
    Rule("decade", r"(?<!\S)' (?=\d0s\b)", "'", ("in the ' 90s", "in the '90s")),
    Rule("quotation", r'(?<!\S)" ([^"]+) "(?!\S)', r'"\1"', ('he said " no " twice', 'he said "no" twice')),
    # After an s, a plural's possessive is more likely.
    Rule(
        "single quotation",
        r"(?<!\S)(?<![sS] )' ((?![.,;:!?)])(?:[^']|(?<=\w)'(?=\w))+) '(?!\S)",
        r"'\1'",
        ("he said ' yes ' twice", "he said 'yes' twice"),
    ),
    # Unless it begins a quotation: the next apostrophe between spaces comes after no s.
    Rule(
        "possessive of a plural",
        r"(?<=[sS]) '(?= )(?!(?:[^']|(?<=\w)'(?=\w))*(?<![sS]) '(?!\S))",
        "'",
        ("the players ' union", "the players' union"),
    ),
    Rule(
        "single quotation after an s",
        r"(?<!\S)' ((?![.,;:!?)])(?:[^']|(?<=\w)'(?=\w))+) '(?!\S)",
        r"'\1'",
        ("she calls ' home ' here", "she calls 'home' here"),
    ),
    # LM1B cuts quotations where sentences end. In the middle, only these two are sure to open or close one.
    Rule("only mark after a colon", r'^([^"]*: ") (?=\S[^"]*$)', r"\1", ('he said : " We won', 'he said: "We won')),
    Rule(
        "only mark after a comma",
        r'^([^"]*[.,!?]) "(?= [a-z][^"]*$)',
        r'\1"',
        ('We won , " he said', 'We won," he said'),
    ),
    Rule("quotation that goes on", r"^([\"']) (?=\S)", r"\1", ('" We won', '"We won')),
    Rule("quotation from before", r"(?<=\S) ([\"'])$", r"\1", ('We won "', 'We won"')),
    Rule("opening bracket", r"([(\[]) (?=\S)", r"\1", ("AMMAN ( Reuters", "AMMAN (Reuters")),
    Rule("closing bracket", r"(?<=\S) ([)\]])", r"\1", ("Reuters ) - King", "Reuters) - King")),
    Rule("closing mark", r"(?<=\S) ([.,;:!?])(?=[\s\"')\]]|$)", r"\1", ("Yes , he did ! ?", "Yes, he did!?")),
)
_COMPILED = tuple((re.compile(rule.pattern), rule.replacement) for rule in RULES)


def detokenize(text: str) -> str:
    """A sentence of LM1B spaced like plain English. Everything but its spaces stays as it is."""
    text = " ".join(text.split())
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text


def open_split(path: str = "", split: str = "train") -> "Split":
    """The sentences of a split, "train" or "test". Opens every file of it, but reads no sentence.

    `path` is TFDS's data_dir, the lm1b folder in it or a version of that; "" is TFDS's default. Of several versions it
    is the newest one in ArrayRecord format.

    Raises:
      DataError: there is none, the split or a file of it is missing or cut short, or tensorflow-datasets is missing.
        Says what there is, and what prepares it.
    """
    root = _root(path)
    folder = _version_folder(root)
    described = _described(folder)
    _check_format(root, folder, described)
    names = [entry.get("name") for entry in described.get("splits", [])]
    if split not in names:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(map(str, names)) or 'none'}")
    with _quiet_tfds() as tfds:
        return _open(tfds, folder, split)


def data_files(path: str = "") -> list[str]:
    """The files of all splits, as `open_split` finds them; not opened. Raises DataError when nothing is prepared."""
    return [str(file) for file in sorted(_version_folder(_root(path)).glob(f"*.{_FORMAT}-*"))]


@dataclasses.dataclass(frozen=True)
class Split:
    """Sentences of a split, read when they are asked for. `ends` are the numbers of sentences up to each file's end."""

    source: Any  # of TFDS
    files: tuple[Path, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """Sentences start to stop, spaced like plain English, in the order of the files.

        Raises:
          DataError: a file is damaged, or holds something else than text; names it.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        while start < stop:
            file = bisect.bisect_right(self.ends, start)
            # One file at a time, so that an error has a name.
            end = min(start + _SENTENCES_AT_ONCE, stop, self.ends[file])
            yield from self._read(self.files[file], range(start, end))
            start = end

    def _read(self, file, numbers):
        try:
            examples = self.source.__getitems__(list(numbers))
            return [detokenize(_text(example["text"])) for example in examples]
        except Exception as error:  # the reader raises whatever its C++ status maps to
            raise DataError(f"{file} is damaged ({_one_line(error)}); copy or prepare it again") from None


def _text(value) -> str:
    """Real folders hold bytes, `tfds.testing.mock_data` gives str."""
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _root(path: str) -> Path:
    if "://" in path:
        raise DataError(
            f"data.path = {path!r}: LM1B is read from a disk; mount the bucket (gcsfuse) and give that path"
        )
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = expanded(path or default)
    if not root.is_dir():
        named = f"data.path = {path!r}" if path else f"data.path is empty, and TFDS's default, {root},"
        raise DataError(f"{named} is not a folder; {_how_to_prepare(root)}")
    return root


def _version_folder(root: Path) -> Path:
    """The newest version, preferably in the right format. Raises DataError when nothing is prepared there."""
    folders = _version_folders(root)
    if not folders:
        inside = sorted(path.name for path in _lm1b_folder(root).iterdir())
        unfinished = next((name for name in inside if name.startswith("incomplete.")), None)
        there = f"only {unfinished}, which did not finish" if unfinished else _listed(inside)
        raise DataError(f"no LM1B is prepared in {_lm1b_folder(root)}, there is {there}; {_how_to_prepare(root)}")
    return max(folders, key=lambda folder: (_is_readable(folder), _version(folder)))


def _version_folders(root):
    """Folders VERSION or CONFIG/VERSION of a finished preparation."""
    if (root / "dataset_info.json").is_file():
        return [root]
    folder = _lm1b_folder(root)
    versions = [path.parent for path in folder.glob("*/dataset_info.json")]
    # Below a config: other data sets in the same folder have the same shape.
    below = [path.parent for path in folder.glob("*/*/dataset_info.json")]
    versions += [path for path in below if _described(path).get("configName") == path.parent.name]
    return [path for path in versions if _VERSION.fullmatch(path.name)]


def _lm1b_folder(root):
    return root / "lm1b" if (root / "lm1b").is_dir() else root


def _version(folder):
    numbers = tuple(map(int, folder.name.split("."))) if _VERSION.fullmatch(folder.name) else ()
    return numbers, str(folder)


def _is_readable(folder):
    return _FORMAT in _formats(folder, _described(folder))


def _formats(folder, described) -> list[str]:
    formats = [described.get("fileFormat", "tfrecord"), *described.get("alternativeFileFormats", [])]
    # What tfds convert_format writes beside another format is not in dataset_info.json.
    converted = [_FORMAT] if any(folder.glob(f"*.{_FORMAT}-*")) else []
    return list(dict.fromkeys([*formats, *converted]))


def _check_format(root, folder, described):
    formats = _formats(folder, described)
    if _FORMAT not in formats:
        other = _data_dir(root) / _FORMAT
        raise DataError(
            f"{folder} is prepared as {', '.join(formats)}, which only TensorFlow reads; it should be {_FORMAT}, in "
            f"another folder; {_how_to_prepare(other)}"
        )


def _described(folder) -> dict:
    path = folder / "dataset_info.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({_one_line(error)}); copy or prepare it again") from None
    if not isinstance(described, dict):
        raise DataError(f"{path} is no description of a data set; copy or prepare it again")
    return described


@contextlib.contextmanager
def _quiet_tfds():
    """TFDS, which takes a second to import and reports every file that it opens."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        import tensorflow_datasets as tfds

        yield tfds
    except ImportError as error:
        raise DataError(
            f"LM1B is read with a package that is not installed ({_one_line(error)}); pip install 'kforcing-jax[lm1b]'"
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def _open(tfds, folder, split) -> Split:
    try:
        builder = tfds.builder_from_directory(folder)
        if builder.info.file_format is None or builder.info.file_format.value != _FORMAT:
            builder.info.set_file_format(_FORMAT, override=True, override_if_initialized=True)
        info, features = builder.info.splits[split], builder.info.features
    except ImportError:
        raise
    except Exception as error:  # its files are somebody else's
        raise DataError(f"{folder} cannot be read by TFDS ({_one_line(error)}); copy or prepare it again") from None
    names = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    if "text" not in names or not isinstance(features["text"], tfds.features.Text):
        raise DataError(f"{folder} has no feature text that holds text; it has {_listed(names)}")
    if not info.shard_lengths or not sum(info.shard_lengths):
        raise DataError(f"{folder} has no sentences in its split {split!r}; copy or prepare it again")
    files = tuple(Path(os.fspath(path)) for path in info.filepaths)
    for file, count in zip(files, info.shard_lengths, strict=True):
        _check_file(file, count)
    return Split(builder.as_data_source(split), files, tuple(itertools.accumulate(info.shard_lengths)))


def _check_file(file: Path, count: int):
    if not file.is_file():
        raise DataError(f"{file} is missing, it should hold {count:,} sentences; copy or prepare it again")
    damage = _damage(file, count)
    if damage:
        raise DataError(f"{file} is damaged ({damage}), it should hold {count:,} sentences; copy or prepare it again")


def _damage(file: Path, count: int) -> str | None:
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(os.fspath(file))
        found = reader.num_records()
        # Only here does it say that it could not open the file.
        reader.close()
    except Exception as error:  # the reader raises whatever its C++ status maps to
        return _one_line(error)
    return None if found == count else f"it holds {found:,}"


def _how_to_prepare(root) -> str:
    return f"prepare it once, on any machine with TensorFlow: {_COMMAND.format(_data_dir(root))}"


def _data_dir(root: Path) -> Path:
    """TFDS's data_dir for a path that may also be a data set or a version in it."""
    if _VERSION.fullmatch(root.name):
        root = root.parent
    return root.parent if root.name == "lm1b" else root


def _listed(names) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"


def _one_line(error) -> str:
    return (" ".join(str(error).split()) or "no reason was given")[:200]
