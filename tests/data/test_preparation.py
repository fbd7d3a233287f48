"""Preparing in several shards and processes: the same rows, also after an interruption."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kforcing_jax.config import DataConfig
from kforcing_jax.data import files, preparation, pretrained, shards
from kforcing_jax.data.choices import KnownTokenizer
from kforcing_jax.data.pipeline import load, verify
from kforcing_jax.data.preparation import prepare
from kforcing_jax.data.tokenizers import train_tokenizer
from kforcing_jax.errors import DataError, RunError

REPOSITORY = Path(__file__).parents[2]
SEED = 0
WORDS = ["the", "cat", "said", "it's", "on", "a", "mat", "U.S.", "Zürich", "12.5"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with two jsonl files of 300 documents."""
    folder = tmp_path_factory.mktemp("owt")
    rng = np.random.default_rng(0)
    for name in "ab":
        texts = [f"{name}{i} " + " ".join(rng.choice(WORDS, rng.integers(1, 40))) for i in range(300)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), "utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with byte-level tokens without merges, EOS and mask."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(DataConfig(tokenizer="bpe", vocab_size=258), []).save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def config(text, tokenizer):
    return DataConfig(
        source="text_files",
        path=str(text),
        tokenizer=str(tokenizer),
        vocab_size=258,
        seq_len=16,
        packing="framed",
        validation_documents=50,
    )


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(files, "_BYTES_PER_RANGE", 10_000)


def all_rows(corpus, split="train"):
    return np.stack([corpus._row(record)["tokens"] for record in corpus._source(split)])


def documents(path, corpus):
    """The documents as the rows should have them, one after the other."""
    texts = [json.loads(line)["text"] for name in "ab" for line in (path / f"{name}.jsonl").open(encoding="utf-8")]
    return [[*corpus.tokenizer.encode(t), corpus.eos_id] for t in texts]


def test_openwebtext_rows_are_documents_end_to_end_between_bos_and_eos(config, text, tmp_path):
    corpus = prepare(config, SEED, tmp_path / "data")
    encoded = documents(text, corpus)
    for split, part in (("train", encoded[:550]), ("validation", encoded[550:])):
        rows_RxN = all_rows(corpus, split)
        assert set(rows_RxN[:, 0]) == set(rows_RxN[:, -1]) == {corpus.eos_id}
        stream = np.concatenate(part)
        np.testing.assert_array_equal(rows_RxN[:, 1:-1].ravel(), stream[: rows_RxN[:, 1:-1].size])
        assert len(stream) - rows_RxN[:, 1:-1].size < 14


def test_shards_lose_less_than_a_row_each(config, tmp_path, small_shards):
    corpus = prepare(config, SEED, tmp_path / "data")
    shards_of_train = json.loads((tmp_path / "data" / "manifest.json").read_text())["train"]["shards"]
    assert len(shards_of_train) > 4
    tokens = sum(shard["document_tokens"] for shard in shards_of_train)
    assert tokens - 14 * len(shards_of_train) < 14 * corpus.num_train_rows <= tokens


def test_processes_write_what_one_process_writes(config, tmp_path, small_shards):
    prepare(config, SEED, tmp_path / "one", workers=1)
    prepare(config, SEED, tmp_path / "three", workers=3)
    one, three = (sorted((tmp_path / name).iterdir()) for name in ("one", "three"))
    assert [file.name for file in one] == [file.name for file in three]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, three, strict=True))


def interrupted(*_, **__):
    raise KeyboardInterrupt


NOTES = ["preparing.json", "preparing.lock", "train.arrayrecord.77.tmp", "train-00077-of-00088.json"]


@pytest.mark.parametrize("place", ["written", "check_shards", "write_text", "_tidy"])
def test_an_interrupted_preparation_goes_on_and_ends_as_if_nothing_had_happened(
    config, tmp_path, small_shards, monkeypatch, place
):
    """The folder is there before, as a mount point is, and is never replaced."""
    (tmp_path / "data").mkdir()
    inode = (tmp_path / "data").stat().st_ino
    prepare(config, SEED, tmp_path / "whole", workers=1)
    write, written = shards.write_rows, []

    def limited(path, rows):
        if place == "written" and len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, rows)

    monkeypatch.setattr(shards, "write_rows", limited)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if place == "write_text":  # of the manifest, not of the plan
            texts = preparation.write_text
            patch.setattr(
                preparation, place, lambda path, *a: (interrupted if "mani" in path.name else texts)(path, *a)
            )
        elif place != "written":
            patch.setattr(preparation, place, interrupted)
        prepare(config, SEED, tmp_path / "data", workers=1)
    assert (tmp_path / "data/manifest.json").exists() == (place == "_tidy")
    for name in NOTES[1:3]:  # a killed process has left them
        (tmp_path / "data" / name).write_bytes(b"")
    place = "over"
    prepare(config, SEED, tmp_path / "data", workers=1)
    assert len(written) == len(set(written)), "a finished shard was written again"
    assert (tmp_path / "data").stat().st_ino == inode and sorted(os.listdir(tmp_path)) == ["data", "whole"]
    assert sorted(os.listdir(tmp_path / "data")) == sorted(os.listdir(tmp_path / "whole"))
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "data" / file.name).read_bytes()


def begin(config, directory):
    """Leaves a preparation when its shards are written."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparation, "_manifest", interrupted)
        prepare(config, SEED, directory, workers=1)


def test_a_shard_that_lost_its_end_meanwhile_is_written_again(config, tmp_path, small_shards):
    whole = prepare(config, SEED, tmp_path / "whole", workers=1)
    begin(config, tmp_path / "data")
    shard = next((tmp_path / "data").glob("train-00003*.arrayrecord"))
    shard.write_bytes(shard.read_bytes()[:-20])
    corpus = prepare(config, SEED, tmp_path / "data", workers=1)
    np.testing.assert_array_equal(all_rows(corpus), all_rows(whole))


def test_going_on_with_another_configuration_or_text_is_refused(config, text, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes((text / f"{name}.jsonl").read_bytes())
    config = dataclasses.replace(config, path=str(tmp_path / "*.jsonl"))
    begin(config, tmp_path / "data")
    with pytest.raises(RunError, match=r"data was begun with .* data\.seq_len changed from 16; delete"):
        prepare(dataclasses.replace(config, seq_len=32), SEED, tmp_path / "data", workers=1)
    content = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(content.replace("cat", "dog"))
    with pytest.raises(RunError, match=r"data was begun with .*a\.jsonl has changed; delete"):
        prepare(config, SEED, tmp_path / "data", workers=1)
    (tmp_path / "a.jsonl").write_text(content)
    assert prepare(config, SEED, tmp_path / "data", workers=1).num_train_rows


def test_a_bad_line_is_named_and_what_was_finished_is_kept(config, text, tmp_path, small_shards):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes((text / f"{name}.jsonl").read_bytes())
    lines = (tmp_path / "a.jsonl").read_text().split("\n")
    lines[250] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl, byte \d+ is not JSON"):
        prepare(dataclasses.replace(config, path=str(tmp_path / "*.jsonl")), SEED, tmp_path / "data", workers=1)
    assert not (tmp_path / "data/manifest.json").exists() and list((tmp_path / "data").glob("*-of-*.json"))


def test_text_that_changed_after_it_was_prepared_is_noticed_where_it_is_there(config, text, tokenizer, tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes((text / name).read_bytes())
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    config = dataclasses.replace(config, path=str(tmp_path / "*.jsonl"), tokenizer=str(tmp_path / "tokenizer"))
    prepare(config, SEED, tmp_path / "data")
    os.utime(tmp_path / "a.jsonl", (1, 1))
    prepare(config, SEED, tmp_path / "data")
    for name, edit in {
        "a.jsonl": lambda content: content.replace(b"cat", b"dog"),
        "b.jsonl": lambda content: content + b'{"text": "more"}\n',
        "c.jsonl": lambda content: b'{"text": "new"}\n',
        "tokenizer/tokenizer.json": lambda content: content + b"\n",
    }.items():
        file = tmp_path / name
        before = file.read_bytes() if file.exists() else None
        file.write_bytes(edit(before))
        with pytest.raises(RunError, match=rf"prepared from another data\.\w+: .*{name} (has changed|is new); delete"):
            prepare(config, SEED, tmp_path / "data")
        file.write_bytes(before) if before else file.unlink()
    prepare(config, SEED, tmp_path / "data")
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(RunError, match=r"b\.jsonl is gone"):
        prepare(config, SEED, tmp_path / "data")
    (tmp_path / "a.jsonl").unlink()
    shutil.rmtree(tmp_path / "tokenizer")
    assert prepare(config, SEED, tmp_path / "data").num_train_rows


@pytest.mark.parametrize("bytes_left", [0, 40_000])
def test_a_full_disk_is_one_line_with_file_and_reason(config, tmp_path, bytes_left):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, limits[1]))
    try:
        with pytest.raises(RunError, match=r"data\S* cannot be written: .*[Ff]ile too large") as raised:
            prepare(config, SEED, tmp_path / "data", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(raised.value)
    assert prepare(config, SEED, tmp_path / "data", workers=1).num_train_rows


def test_entries_without_text_are_counted(config, text, tmp_path):
    (tmp_path / "a.jsonl").write_bytes((text / "a.jsonl").read_bytes() + b'{"text": null}\n{"text": " "}\n')
    (tmp_path / "b.jsonl").write_bytes((text / "b.jsonl").read_bytes())
    corpus = prepare(dataclasses.replace(config, path=str(tmp_path)), SEED, tmp_path / "run/data")
    train, validation = corpus.statistics().split("\n")
    assert "550 documents" in train and train.endswith("; 2 entries without text left out")
    assert "50 documents" in validation and "left out" not in validation


def test_every_row_is_verified(config, tmp_path):
    prepare(config, SEED, tmp_path / "data")
    verify(tmp_path / "data")
    shard = next((tmp_path / "data").glob("train*"))
    content = bytearray(shard.read_bytes())
    # A token inside a row; the file keeps its size and its index.
    content[content.index(all_rows(load(config, SEED, tmp_path / "data"))[5].astype(np.uint16).tobytes()) + 6] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RunError, match=f"{shard.name} is damaged"):
        verify(tmp_path / "data")


def test_shared_data_may_be_used_where_the_text_is_not(config, tmp_path):
    prepare(config, SEED, tmp_path / "data")
    elsewhere = dataclasses.replace(config, path="gone", prepared=str(tmp_path / "data"), reader_processes=1)
    assert load(elsewhere, SEED + 1, tmp_path / "data").num_train_rows
    with pytest.raises(RunError, match=r"data\.path = .* now it is 'gone'"):
        load(dataclasses.replace(config, path="gone"), SEED, tmp_path / "data")


def test_documents_begin_with_cls_and_end_with_sep_also_when_cut(tmp_path):
    words = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "a", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "a.txt").write_text("\n".join(["The cat sat.", "a " * 50, "on the mat"] * 4))
    config = DataConfig(
        source="text_files",
        path=str(tmp_path / "a.txt"),
        tokenizer=str(tmp_path / "vocab.txt"),
        vocab_size=len(words),
        seq_len=12,
        packing="padded",
        document_separator="\n",
        validation_fraction=0.4,
    )
    corpus = prepare(config, SEED, tmp_path / "data")
    for split in ("train", "validation"):
        for tokens_N, segments_N in (corpus._row(record).values() for record in corpus._source(split)):
            document = tokens_N[segments_N == 1]
            assert document[0] == 1 and document[-1] == 2
            assert not {1, 2} & set(document[1:-1])


PLAIN_SCRIPT = """
import itertools
import numpy as np
from kforcing_jax.config import DataConfig
from kforcing_jax.data.preparation import prepare

if __name__ == "__main__":
    threads = prepare(DataConfig(source="markov", seq_len=8), 0, {data!r})
    processes = prepare(DataConfig(source="markov", seq_len=8, reader_processes=2), 0, {data!r})
    for a, b in itertools.islice(zip(threads.train_batches(8, 0, 3), processes.train_batches(8, 0, 3)), 12):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    print("equal")
"""


def test_reading_in_processes_gives_the_same_batches_from_a_plain_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PLAIN_SCRIPT.format(data=str(tmp_path / "data")))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


# Many shards; where it is to be killed, it does not come to an end before.
KILLED_CONFIG = """
import os, time
from kforcing_jax.data import files, preparation
files._BYTES_PER_RANGE = 2000
if "IS_KILLED" in os.environ:
    preparation._manifest = lambda *_: time.sleep(600)
"""


def test_the_command_can_be_killed_and_run_again(text, tokenizer, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(KILLED_CONFIG + (REPOSITORY / "configs/owt.py").read_text(encoding="utf-8"))
    flags = [
        f"--config={config}:smoke",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={text}",
        f"--config.data.tokenizer={tokenizer}",
        "--config.data.vocab_size=258",
        "--workers=2",
    ]
    command = [sys.executable, "-m", "kforcing_jax.prepare", *flags]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    killed = environment | {"IS_KILLED": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=killed, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("data/*-of-*.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run/data/manifest.json").exists()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "shard" in done.stderr and "tokens" in done.stderr  # the progress bar
    assert "every row verified" in done.stdout and "useful" in done.stdout
    names = {path.name for path in (tmp_path / "run/data").iterdir()}
    assert {name for name in names if "-of-" not in name} == {"manifest.json", "tokenizer.json"}
    assert all(name.endswith(".arrayrecord") for name in names if "-of-" in name)
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert "was there, every row verified" in again.stdout


def test_the_same_vocabulary_may_have_another_path_or_its_name(config, tmp_path, monkeypatch):
    folder = prepare(config, SEED, tmp_path / "data", workers=1).directory
    (tmp_path / "copy.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert load(dataclasses.replace(config, tokenizer=str(tmp_path / "copy.json")), SEED, folder).num_train_rows > 0
    digests = {"gpt2": pretrained.digest(load(config, SEED, folder).tokenizer.backend)}
    monkeypatch.setattr(pretrained, "KNOWN_TOKENIZERS", {n: KnownTokenizer("", d) for n, d in digests.items()})
    for same in ("gpt2", "openai-community/gpt2"):
        assert load(dataclasses.replace(config, tokenizer=same), SEED, folder).num_train_rows > 0
    for other in ("bert-base-uncased", "bpe", "/no/such"):
        with pytest.raises(RunError, match=rf"was prepared with data\.tokenizer = .*, now it is '{other}'"):
            load(dataclasses.replace(config, tokenizer=other), SEED, folder)
