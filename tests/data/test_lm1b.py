"""LM1B as plain English, and its folders on disk: what is read, and what is said of those that cannot be."""

import itertools
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from sample_data import write_lm1b
from tokenizers.pre_tokenizers import BertPreTokenizer

from kforcing_jax.data.lm1b import RULES, Split, data_files, detokenize, open_split
from kforcing_jax.data.units import Lm1bDocuments
from kforcing_jax.errors import DataError

# For each rule more than its own example, and what it should leave alone.
BY_RULE = {
    "web address": [
        ("On the Net : http : / / www.nasa.gov / mission _ pages", "On the Net: http://www.nasa.gov/mission _ pages"),
        ("https : / / example.com and ftp : / / a.org", "https://example.com and ftp://a.org"),
        ("The word http : it", "The word http: it"),
    ],
    "slash": [("a 24 / 7 / 365 job", "a 24/7/365 job"), ("6-7 ( 5 / 7 ) , 7-6", "6-7 (5/7), 7-6")],
    "e-mail address": [
        ("john.smith @ news.bbc.co.uk .", "john.smith@news.bbc.co.uk."),
        ("10 apples @ 50 pence .", "10 apples @ 50 pence."),
    ],
    "contraction": [
        ("I 'm sure they 're here , he 'll say .", "I'm sure they're here, he'll say."),
        ("You CAN 'T !", "You CAN'T!"),
        ("the BBC ( UK ) 's 1990 's plan", "the BBC (UK)'s 1990's plan"),
    ],
    "detached contraction": [("Murray ' s home", "Murray's home"), ("the letter ' s ' here", "the letter 's' here")],
    "Penn Treebank's not": [("He did n't .", "He didn't."), ("the n't of it , n't", "then't of it, n't")],
    "apostrophe in a name": [
        ("Cote d 'Ivoire , Shi 'ite and L 'Aquila", "Cote d'Ivoire, Shi'ite and L'Aquila"),
        ("the word 'hello' is", "the word 'hello' is"),
        ("six o 'clock", "six o'clock"),
    ],
    "currency": [("US $ 2.5 billion", "US $2.5 billion"), ("the £ and the $ fell", "the £ and the $ fell")],
    "number sign": [("# 10 and # ten", "#10 and # ten")],
    "per cent": [("rose 0.3 % , or %", "rose 0.3%, or %")],
    "time or ratio": [
        ("at 10 : 30 : 05 a.m. , 2 : 1", "at 10:30:05 a.m., 2:1"),
        ("in 2008 : 30 people", "in 2008: 30 people"),
    ],
    "initials": [("the S & P 500 , PG & E", "the S&P 500, PG&E"), ("Standard & Poor 's", "Standard & Poor's")],
    "decade": [("the ' 80s and ' 90s .", "the '80s and '90s.")],
    "quotation": [
        ('" No , " he said , " never . "', '"No," he said, "never."'),
        ('( " One " and " Two " )', '("One" and "Two")'),
    ],
    "single quotation": [("He said ' I don 't ' and ' no ' .", "He said 'I don't' and 'no'.")],
    "possessive of a plural": [
        ("the players ' and owners ' rights", "the players' and owners' rights"),
        ("the union of the players ' .", "the union of the players'."),
    ],
    "single quotation after an s": [("it was ' home ' , it is ' here '", "it was 'home', it is 'here'")],
    "only mark after a colon": [
        ('She added : " I am .', 'She added: "I am.'),
        ('One : " two " : " three', 'One: "two": " three'),
    ],
    "only mark after a comma": [
        ('Why ? " she asked .', 'Why?" she asked.'),
        ('He said , " We won', 'He said, " We won'),
    ],
    "quotation that goes on": [("\" It 's good , he said .", "\"It's good, he said."), ("' It is", "'It is")],
    "quotation from before": [('It is good . "', 'It is good."'), ("It is good . '", "It is good.'")],
    "opening bracket": [("a ( [ b", "a ([b"), ("(", "(")],
    "closing bracket": [("b ] ) c", "b]) c"), (")", ")")],
    "closing mark": [
        ("Why ? ! Yes ; no : well , no .", "Why?! Yes; no: well, no."),
        ("Well ... it is .5 of .net .", "Well ... it is .5 of .net."),
    ],
}

# As the corpus writes them.
SENTENCES = {
    "Fish , ranked 98th in the world , fired 22 aces en route to a 6-3 , 6-7 ( 5 / 7 ) , 7-6 ( 7 / 4 ) win .": (
        "Fish, ranked 98th in the world, fired 22 aces en route to a 6-3, 6-7 (5/7), 7-6 (7/4) win."
    ),
    'a Newsweek cover story titled " Crazy Talk : Oprah , Wacky Cures & You . "': (
        'a Newsweek cover story titled "Crazy Talk: Oprah, Wacky Cures & You."'
    ),
    "Elk calling -- a skill that hunters perfected long ago -- is now its own sport .": (
        "Elk calling -- a skill that hunters perfected long ago -- is now its own sport."
    ),
    "AMMAN ( Reuters ) - King Abdullah of Jordan will meet U.S. President Barack Obama in Washington on April 21 .": (
        "AMMAN (Reuters) - King Abdullah of Jordan will meet U.S. President Barack Obama in Washington on April 21."
    ),
    "Authorities served warrants at Murray 's Las Vegas home , and they don 't , can 't and won 't comment .": (
        "Authorities served warrants at Murray's Las Vegas home, and they don't, can't and won't comment."
    ),
    "The U.S. Postal Service said it can 't comment . \"": "The U.S. Postal Service said it can't comment.\"",
    "Shares fell 3.5 % to $ 1,234.50 at 3 : 30 p.m.": "Shares fell 3.5% to $1,234.50 at 3:30 p.m.",
    "The workers ' union asked for £ 5 , or € 6 , an hour .": "The workers' union asked for £5, or € 6, an hour.",
    "But will it last ?": "But will it last?",
    "": "",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_does_what_its_example_says_and_no_other_rule_does_it(rule):
    spaced, plain = rule.example
    assert detokenize(spaced) == plain
    for other in RULES:
        if other is not rule:
            spaced = re.sub(other.pattern, other.replacement, spaced)
    assert spaced != plain


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_punctuation_is_spaced_as_in_english(name):
    for spaced, plain in BY_RULE[name]:
        assert detokenize(spaced) == plain


def test_sentences_of_the_corpus_become_english():
    for spaced, plain in SENTENCES.items():
        assert detokenize(spaced) == plain


def every_text():
    cases = [case for name in BY_RULE for case in BY_RULE[name]]
    return [text for pair in [*cases, *SENTENCES.items(), *(rule.example for rule in RULES)] for text in pair]


def random_texts(count):
    """Words and punctuation in any order, between them spaces or nothing."""
    pieces = [
        *"abs1590\"'()[]$£€%&#@:;,.!?/-_",
        "n't",
        "'s",
        "the",
        "AT",
        "U.S.",
        "http",
        "90s",
        "...",
        "née",
        "—",
        "’",
    ]
    rng = random.Random(0)
    return [
        "".join(rng.choice(pieces) + rng.choice(["", " ", " ", " "]) for _ in range(rng.randrange(30)))
        for _ in range(count)
    ]


def test_plain_english_stays_as_it_is_and_nothing_but_spaces_changes():
    for text in every_text():
        assert detokenize(detokenize(text)) == detokenize(text)
    for text in random_texts(5000) + every_text():
        assert detokenize(text).replace(" ", "") == "".join(text.split())


def bert_words(text):
    return [word for word, _ in BertPreTokenizer().pre_tokenize_str(text)]


def test_berts_tokens_change_by_two_rules_only():
    # The reference, too, takes out spaces beside what BERT splits off, and after the one sign that it does not.
    texts = [text for text in random_texts(5000) + every_text() if "£" not in text and "n't" not in text]
    assert len(texts) > 2000
    for text in texts:
        assert bert_words(detokenize(text)) == bert_words(text)
    assert bert_words(detokenize("£ 5 , € 5")) == ["£5", ",", "€", "5"]


@pytest.mark.parametrize("piece", [" '", ' "', "s ' b ", "a 'b ", "( ", " .", "1 : 1 ", "x", 'a : " ', ', " b '])
def test_detokenizing_takes_little_time_on_any_text(piece):
    detokenize(piece * 5000)


TRAIN = [f"It 's sentence {number} of {100} ." for number in range(1, 100)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data_dir of TFDS with 95 sentences to train on and 5 to test on, in two files each. Not to be changed."""
    data_dir = tmp_path_factory.mktemp("tfds")
    write_lm1b([*TRAIN, "£ 5 naïve"], data_dir, data_dir / "downloads")
    return data_dir


@pytest.fixture
def data_dir(prepared, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(prepared, tmp_path / "tfds")


def version(data_dir):
    return data_dir / "lm1b" / "1.1.0"


def shard(data_dir, number=0):
    return version(data_dir) / f"lm1b-train.array_record-{number:05}-of-00002"


def edit(data_dir, **fields):
    path = version(data_dir) / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(path, split="train"):
    """What is said of a folder, in one line."""
    with pytest.raises(DataError) as raised:
        open_split(str(path), split)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_both_splits_are_read_as_plain_english(prepared):
    train, test = (list(open_split(str(prepared), split).documents()) for split in ("train", "test"))
    assert len(open_split(str(prepared), "train")) == len(train) == 95
    assert data_files(str(prepared)) == [
        str(file) for split in ("test", "train") for file in open_split(str(prepared), split).files
    ]
    assert sorted([*train, *test]) == sorted([detokenize(sentence) for sentence in TRAIN] + ["£5 naïve"])


def test_the_parts_of_a_split_are_the_split(prepared):
    split = open_split(str(prepared))
    whole = list(split.documents(0, len(split)))
    bounds = [0, 1, 40, 48, 49, 95]
    parts = [list(split.documents(start, stop)) for start, stop in itertools.pairwise(bounds)]
    assert [len(part) for part in parts] == [1, 39, 8, 1, 46]
    assert [text for part in parts for text in part] == whole
    assert list(split.documents(90, 1000)) == whole[90:]


def test_a_split_has_the_order_of_tfds(prepared):
    source = tfds.builder_from_directory(version(prepared)).as_data_source("train")
    assert list(open_split(str(prepared)).documents()) == [detokenize(entry["text"].decode()) for entry in source]


@pytest.mark.parametrize("below", ["", "lm1b", "lm1b/1.1.0"])
def test_the_path_is_the_data_dir_the_data_set_or_the_version(prepared, below):
    assert len(open_split(str(prepared / below), "test")) == 5


def test_an_empty_path_is_the_default_of_tfds(prepared, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert len(open_split("", "test")) == 5
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"data.path is empty, and TFDS's default, {tmp_path}/tensorflow_datasets," in refusal("")


def test_a_worker_process_can_be_told_its_part_by_value(prepared):
    documents = Lm1bDocuments(str(prepared), "train", 45, 55)
    texts = list(pickle.loads(pickle.dumps(documents)).texts())
    assert texts == list(open_split(str(prepared)).documents(45, 55))


class TextSource:
    """Gives str where files hold bytes, as `tfds.testing.mock_data` does."""

    def __getitems__(self, numbers):
        return [{"text": f"It 's {number} ."} for number in numbers]


def test_a_source_of_text_is_read_as_one_of_bytes():
    split = Split(TextSource(), files=(Path("a"), Path("b")), ends=(2, 3))
    assert list(split.documents()) == ["It's 0.", "It's 1.", "It's 2."]


def move(data_dir, *parts):
    """Moves the version to another place of the data set."""
    target = data_dir.joinpath("lm1b", *parts)
    target.parent.mkdir(exist_ok=True)
    version(data_dir).rename(target)
    return target


def test_the_newest_version_that_can_be_read_is_taken(data_dir):
    shutil.copytree(version(data_dir), data_dir / "lm1b" / "1.0.9")
    shutil.copytree(version(data_dir), data_dir / "lm1b" / "1.10.0")
    assert open_split(str(data_dir)).files[0].parent.name == "1.10.0"
    for path in (data_dir / "lm1b" / "1.10.0").glob("*.array_record-*"):
        path.unlink()
    info = data_dir / "lm1b" / "1.10.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    assert open_split(str(data_dir)).files[0].parent.name == "1.1.0"


def test_a_data_set_with_a_config_is_read(data_dir):
    edit(data_dir, configName="plain_text")
    move(data_dir, "plain_text", "1.1.0")
    for below in ("", "lm1b", "lm1b/plain_text", "lm1b/plain_text/1.1.0"):
        assert len(open_split(str(data_dir / below), "test")) == 5


def test_a_version_in_a_folder_of_another_name_is_read(data_dir):
    version(data_dir).rename(data_dir / "mine")
    assert len(open_split(str(data_dir / "mine"), "test")) == 5


def test_what_convert_format_writes_beside_another_format_is_read(data_dir):
    info = version(data_dir) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    assert len(list(open_split(str(data_dir)).documents())) == 95


COMMAND = (
    "prepare it once, on any machine with TensorFlow: "
    "pip install tensorflow tensorflow-datasets importlib_resources && python -c 'import tensorflow_datasets as tfds; "
    'tfds.builder("lm1b", data_dir="{}", file_format="array_record").download_and_prepare()\''
)


@pytest.mark.parametrize("below", ["", "lm1b", "lm1b/1.1.0"])
def test_a_missing_folder_is_named_with_what_prepares_it(tmp_path, below):
    data_dir = tmp_path / "data"
    assert refusal(data_dir / below) == (
        f"data.path = '{data_dir / below}' is not a folder; {COMMAND.format(data_dir)}"
    )


def test_a_bucket_and_a_split_that_is_not_there_are_refused(prepared):
    assert "mount the bucket" in refusal("gs://mine/tfds")
    assert refusal(prepared, "validation") == f"{version(prepared)} has no split 'validation'; it has train, test"


def to_other_format(data_dir):
    edit(data_dir, fileFormat="tfrecord")
    for path in version(data_dir).glob("*.array_record-*"):
        path.unlink()


def without_sentences(data_dir):
    splits = json.loads((version(data_dir) / "dataset_info.json").read_text())["splits"]
    edit(data_dir, splits=[split | {"shardLengths": []} for split in splits])


def with_feature(name, feature):
    def change(data_dir):
        features = tfds.features.FeaturesDict({name: feature})
        (version(data_dir) / "features.json").write_text(json.dumps(features.to_json()))

    return change


def cut(size):
    return lambda data_dir: shard(data_dir, 1).write_bytes(shard(data_dir, 1).read_bytes()[:size])


def damaged(name, content):
    return lambda data_dir: (version(data_dir) / name).write_text(content)


AGAIN = "; copy or prepare it again"
NUMBERS = tfds.features.Tensor(shape=(None,), dtype=np.int64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda data_dir: (data_dir / "lm1b").rename(data_dir / "mnist"),
            ["no LM1B is prepared in {data_dir}, there is downloads, mnist; ", COMMAND],
        ),
        (
            lambda data_dir: version(data_dir).rename(data_dir / "lm1b" / "incomplete.5NHQWS_1.1.0"),
            ["in {data_dir}/lm1b, there is only incomplete.5NHQWS_1.1.0, which did not finish"],
        ),
        (
            to_other_format,
            [
                "{version} is prepared as tfrecord, which only TensorFlow reads; it should be array_record",
                "/array_record",
            ],
        ),
        (without_sentences, ["{version} has no sentences in its split 'train'" + AGAIN]),
        (with_feature("line", tfds.features.Text()), ["{version} has no feature text that holds text; it has line"]),
        (with_feature("text", NUMBERS), ["{version} has no feature text that holds text; it has text"]),
        *((damaged("dataset_info.json", content), ["{version}"]) for content in ("{", "[]", "{}")),
        *((damaged("features.json", content), ["{version}"]) for content in ("{", "[]", "{}")),
        (
            lambda data_dir: (version(data_dir) / "features.json").unlink(),
            ["{version} cannot be read by TFDS"],
        ),
        (lambda data_dir: shard(data_dir, 1).unlink(), ["{shard} is missing, it should hold 47 sentences" + AGAIN]),
        *((cut(size), ["{shard} is damaged (", "), it should hold 47 sentences" + AGAIN]) for size in (0, 1000, -100)),
        (
            lambda data_dir: shutil.copy(
                version(data_dir) / "lm1b-test.array_record-00000-of-00002", shard(data_dir, 1)
            ),
            ["{shard} is damaged (it holds 2), it should hold 47 sentences"],
        ),
    ],
)
def test_what_is_missing_or_damaged_is_named_with_what_to_do(data_dir, change, said):
    change(data_dir)
    message = refusal(data_dir)
    for part in said:
        places = {"data_dir": data_dir, "version": version(data_dir), "shard": shard(data_dir, 1)}
        assert (part.format(data_dir) if part is COMMAND else part.format(**places)) in message


def test_a_file_with_a_damaged_sentence_is_named_when_it_is_read(data_dir):
    content = bytearray(shard(data_dir, 1).read_bytes())
    place = content.index(b"sentence")
    content[place : place + 8] = b"SENTENCE"
    shard(data_dir, 1).write_bytes(content)
    split = open_split(str(data_dir))
    assert len(list(split.documents(0, 47))) == 47
    with pytest.raises(DataError, match=f"{shard(data_dir, 1)} is damaged .*; copy or prepare it again"):
        list(split.documents())


def test_a_sentence_that_is_not_utf8_is_refused(data_dir):
    features = tfds.builder_from_directory(version(data_dir)).info.features
    writer = array_record_module.ArrayRecordWriter(os.fspath(shard(data_dir)), "group_size:1")
    for _ in range(48):
        writer.write(features.serialize_example({"text": b"\xff"}))
    writer.close()
    with pytest.raises(DataError, match=f"{shard(data_dir)} is damaged .*utf-8"):
        list(open_split(str(data_dir)).documents())


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record"])
def test_a_missing_package_is_named(prepared, monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    message = refusal(prepared)
    assert package in message
    assert message.endswith("pip install 'kforcing-jax[lm1b]'")


SCRIPT = """
import socket, sys
def refuse(*_):
    raise SystemExit("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
# TFDS asks for it only where it prepares data, and does not require it.
sys.modules["importlib_resources"] = None
from absl import logging
logging.set_verbosity(logging.INFO)
from kforcing_jax.data.lm1b import open_split
assert "tensorflow_datasets" not in sys.modules
print(len(list(open_split(sys.argv[1], "test").documents())))
assert logging.get_verbosity() == logging.INFO
assert "jax" not in sys.modules
"""


def test_reading_is_quiet_and_uses_neither_tensorflow_nor_the_network(prepared, tmp_path):
    # As if it were installed.
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", SCRIPT, str(prepared)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("5\n", "", 0)
