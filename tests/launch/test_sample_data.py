"""The stand-in for LM1B: sentences spaced like its own, in folders that TFDS and `data.source = "lm1b"` read."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sample_data
import tensorflow_datasets as tfds
from sample_data import sentences_of, tokenize_like_lm1b, write_sample

from kforcing_jax.data.lm1b import detokenize, open_split
from kforcing_jax.errors import ConfigError, DataError, RunError

REPOSITORY = Path(__file__).parents[2]

# Plain, and as LM1B has it.
SENTENCES = {
    "Prices didn't rise.": "Prices didn 't rise .",
    "The U.S. Postal Service's staff can't say why.": "The U.S. Postal Service 's staff can 't say why .",
    '"We paid $1,250.50," he said, "and lost 5%."': '" We paid $ 1,250.50 , " he said , " and lost 5 % . "',
    "It begins at 3:30 p.m. on Friday (or later)!": "It begins at 3 : 30 p.m. on Friday ( or later ) !",
    "See http://www.nasa.gov/mission for more.": "See http : / / www.nasa.gov / mission for more .",
    "The workers' union called it 'a scandal' again.": "The workers ' union called it ' a scandal ' again .",
    "He was born in the '80s in the U.S.": "He was born in the ' 80s in the U.S.",
    "Mr. O'Brien, of AT&T, is 42; his son is 6.": "Mr. O 'Brien , of AT & T , is 42 ; his son is 6 .",
    "AMMAN (Reuters) - It won 6-3, 6-7 (5/7), 7-6.": "AMMAN ( Reuters ) - It won 6-3 , 6-7 ( 5 / 7 ) , 7-6 .",
    "The U.S.'s plan costs £5 and/or a well-known #1?": "The U.S. 's plan costs £ 5 and / or a well-known # 1 ?",
    "It went on ... and on, and on.": "It went on ... and on , and on .",
}


@pytest.mark.parametrize("plain", SENTENCES)
def test_sentences_are_spaced_like_those_of_the_corpus(plain):
    assert tokenize_like_lm1b(plain) == SENTENCES[plain]


@pytest.mark.parametrize("plain", SENTENCES)
def test_detokenizing_undoes_the_spacing(plain):
    assert detokenize(SENTENCES[plain]) == plain


NAMES = ["The bank", "Mr. Smith", "Ms. O'Leary", "The U.S. government", "AT&T", "Nobody", "Germany's minister", "She"]
VERBS = [
    "didn't pay",
    "won 6-3, 7-5 against",
    "said it's",
    "(on Monday) left",
    "spent $1,000 on",
    "doubted",
    "met at 10:15",
]
OBJECTS = [
    "the players' union",
    "5% of it",
    "a 24/7 service",
    'the "big one"',
    "them",
    "him in the '90s",
    "www.bbc.co.uk",
]
ENDINGS = [".", "!", "?", ", he said.", "; nobody knew: why?", " - at least today.", ' ... and "then" some.']


def test_plain_sentences_come_back_as_they_were():
    plain = [
        f"{name} {verb} {thing}{ending}" for name in NAMES for verb in VERBS for thing in OBJECTS for ending in ENDINGS
    ]
    spaced = [sentence for sentence in plain if tokenize_like_lm1b(sentence) != sentence]
    assert len(plain) > 2000
    assert len(spaced) > 0.9 * len(plain)
    assert [detokenize(tokenize_like_lm1b(sentence)) for sentence in plain] == plain


def test_articles_are_cut_where_sentences_end():
    article = 'Mr. A. Smith left the U.S. today. "Why?" he asked. (It was late.) In 1990 it cost $1.50! 3 of 4 paid.'
    sentences = [
        "Mr. A. Smith left the U.S. today.",
        '"Why?" he asked.',
        "(It was late.)",
        "In 1990 it cost $1.50!",
        "3 of 4 paid.",
    ]
    assert list(sentences_of(article)) == sentences
    assert list(sentences_of("It ended with Mr.")) == ["It ended with Mr."]


ARTICLES = [f"Article {i} isn't long. It costs ${i}. It's the same everywhere. Naïve £{i}?" for i in range(50)]


def write(folder, count=100, articles=ARTICLES):
    write_sample(articles, folder, count)
    return folder


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sample") / "deep" / "er")


def test_the_first_distinct_sentences_are_in_one_of_the_splits(sample):
    sentences = [sentence for article in ARTICLES for sentence in sentences_of(article)]
    splits = [list(open_split(str(sample / "tfds"), split).documents()) for split in ("train", "test")]
    assert list(map(len, splits)) == [95, 5]
    assert sorted([*splits[0], *splits[1]]) == sorted(list(dict.fromkeys(sentences))[:100])


def test_it_is_on_disk_what_tfds_writes(sample):
    assert sorted(path.name for path in sample.iterdir()) == ["openwebtext.jsonl", "tfds"]
    version = sample / "tfds" / "lm1b" / "1.1.0"
    assert [path.name for path in (sample / "tfds").iterdir()] == ["lm1b"]
    assert sorted(path.name for path in version.iterdir()) == [
        "dataset_info.json",
        "features.json",
        *(f"lm1b-{split}.array_record-0000{number}-of-00002" for split in ("test", "train") for number in (0, 1)),
    ]
    info = json.loads((version / "dataset_info.json").read_text())
    assert (info["name"], info["version"], info["fileFormat"]) == ("lm1b", "1.1.0", "array_record")


def test_tfds_reads_it_by_name(sample):
    source = tfds.data_source("lm1b", split="train", data_dir=str(sample / "tfds"), download=False)
    assert len(source) == 95
    assert all(" ." in entry["text"].decode() or " ?" in entry["text"].decode() for entry in source)


def test_the_articles_are_lines_of_json(sample):
    lines = (sample / "openwebtext.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": article} for article in ARTICLES]


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_articles_give_the_same_bytes(sample, tmp_path):
    assert digests(write(tmp_path / "again")) == digests(sample)


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "sample").mkdir()
    assert (write(tmp_path / "sample") / "tfds").is_dir()


def refusal(error, *arguments, **keywords):
    """What is said, in one line, when a sample cannot be written."""
    with pytest.raises(error) as raised:
        write(*arguments, **keywords)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for used in (tmp_path, tmp_path / "mine"):
        assert refusal(RunError, used) == (
            f"--out={used} is there already and not an empty folder; delete it or name another one"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_that_cannot_be_written_is_named():
    assert refusal(RunError, Path("/proc/sample")).startswith("--out=/proc/sample cannot be written: ")


def test_too_few_sentences_are_refused(tmp_path):
    assert refusal(ConfigError, tmp_path / "sample", count=39) == "--sentences = 39 should be at least 40"
    assert refusal(DataError, tmp_path / "sample", count=1000) == (
        "the articles have 151 distinct sentences, fewer than --sentences = 1,000"
    )
    assert not list(tmp_path.iterdir())
    assert len(open_split(str(write(tmp_path / "sample", count=40) / "tfds"), "test")) == 2


def test_nothing_is_left_of_a_sample_that_is_interrupted(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_data, "_write_jsonl", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "sample")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert refusal(DataError, tmp_path / "sample").endswith("pip install tensorflow-datasets")
    assert not list(tmp_path.iterdir())


SCRIPT = """
import socket, sys
def refuse(*_):
    raise SystemExit("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(tmp_path, *flags):
    """Runs the command without a network, and with a TensorFlow that must not be imported."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY / "launch"), *sys.path])}
    arguments = [sys.executable, "-c", SCRIPT, str(REPOSITORY / "launch" / "sample_data.py"), *flags]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)


def test_the_command_writes_a_sample_quietly_without_tensorflow_or_a_network(tmp_path):
    news = tmp_path / "NewsArticles.csv"
    news.write_text("text\n" + "".join(f'"{article}"\n' for article in ARTICLES), encoding="utf-8")
    done = command(tmp_path, "--out=sample", "--sentences=100", f"--news={news}")
    out = tmp_path / "sample"
    assert done.stdout == f"{out}/tfds: 100 sentences, {out}/openwebtext.jsonl: 50 articles\n"
    assert (done.stderr, done.returncode) == ("", 0)
    assert len(open_split(str(out / "tfds"), "test")) == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--out is missing, for example --out=sample"),
        (["--out=sample", "--sentences=3"], "--sentences = 3 should be at least 40"),
        (["--out=sample", "--news=missing.csv"], "--news = 'missing.csv' cannot be read: No such file or directory"),
    ],
)
def test_what_the_command_cannot_do_it_says_in_one_line(tmp_path, flags, message):
    done = command(tmp_path, *flags)
    assert (done.stdout, done.stderr, done.returncode) == ("", f"error: {message}\n", 2)
    assert not (tmp_path / "sample").exists()
