"""Preparing in several shards and processes: the same rows, also after an interruption."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from vocabularies import vocabulary

from kforcing_jax.config import DataConfig
from kforcing_jax.data import files, preparation, shards
from kforcing_jax.data.pipeline import load, verify
from kforcing_jax.data.preparation import prepare
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


@pytest.fixture
def config(text):
    return DataConfig(
        source="text_files",
        path=str(text),
        tokenizer=str(vocabulary("gpt2")),
        vocab_size=50_258,
        seq_len=16,
        packing="framed",
        validation_documents=50,
    )


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(files, "_BYTES_PER_RANGE", 5000)


def all_rows(corpus, split="train"):
    return np.stack([corpus._row(record)[0] for record in corpus._source(split)])


def documents(path, corpus):
    """The documents as the rows should have them, one after the other."""
    texts = [json.loads(line)["text"] for name in "ab" for line in (path / f"{name}.jsonl").open(encoding="utf-8")]
    return [[*corpus.tokenizer.encode(t), 50_256] for t in texts]


def test_openwebtext_rows_are_documents_end_to_end_between_bos_and_eos(config, text, tmp_path):
    corpus = prepare(config, SEED, tmp_path / "data")
    encoded = documents(text, corpus)
    for split, part in (("train", encoded[:550]), ("validation", encoded[550:])):
        rows_RxN = all_rows(corpus, split)
        assert set(rows_RxN[:, 0]) == set(rows_RxN[:, -1]) == {50_256}
        stream = np.concatenate(part)
        np.testing.assert_array_equal(rows_RxN[:, 1:-1].ravel(), stream[: rows_RxN[:, 1:-1].size])
        assert len(stream) - rows_RxN[:, 1:-1].size < 14


def test_shards_lose_less_than_a_row_each(config, tmp_path, small_shards):
    corpus = prepare(config, SEED, tmp_path / "data")
    shards_of_train = json.loads((tmp_path / "data" / "manifest.json").read_text())["train"]["shards"]
    assert len(shards_of_train) > 5
    tokens = sum(shard["document_tokens"] for shard in shards_of_train)
    assert tokens - 14 * len(shards_of_train) < 14 * corpus.num_train_rows <= tokens


def test_processes_write_what_one_process_writes(config, tmp_path, small_shards):
    prepare(config, SEED, tmp_path / "one", workers=1)
    prepare(config, SEED, tmp_path / "three", workers=3)
    one, three = (sorted((tmp_path / name).iterdir()) for name in ("one", "three"))
    assert [file.name for file in one] == [file.name for file in three]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, three, strict=True))


def test_an_interrupted_preparation_goes_on_and_ends_as_if_nothing_had_happened(
    config, tmp_path, small_shards, monkeypatch
):
    prepare(config, SEED, tmp_path / "whole", workers=1)
    write, written = shards.write_rows, []

    def interrupted(path, *args):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, *args)

    monkeypatch.setattr(shards, "write_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, SEED, tmp_path / "data", workers=1)
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(shards, "write_rows", lambda path, *args: written.append(path) or write(path, *args))
    prepare(config, SEED, tmp_path / "data", workers=1)
    assert len(written) == len(set(written)), "a finished shard was written again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "whole"]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "data" / file.name).read_bytes()


@pytest.mark.parametrize("where", ["verify", "rename"])
def test_what_is_written_outlives_an_interruption_at_the_very_end(config, tmp_path, small_shards, monkeypatch, where):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "verify":
            patch.setattr(preparation, "verify", interrupted)
        else:
            patch.setattr(type(tmp_path), "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, SEED, tmp_path / "data", workers=1)
    monkeypatch.setattr(shards, "write_rows", lambda *_: pytest.fail("a finished shard was written again"))
    (tmp_path / "data.partial/train.arrayrecord.77.tmp").write_bytes(b"of a process that was killed")
    prepare(config, SEED, tmp_path / "data", workers=1)
    names = [path.name for path in (tmp_path / "data").iterdir()]
    assert all(name.endswith(".arrayrecord") or name in ("manifest.json", "tokenizer.json") for name in names)


def test_a_shard_that_lost_its_end_meanwhile_is_written_again(config, tmp_path, small_shards, monkeypatch):
    whole = prepare(config, SEED, tmp_path / "whole", workers=1)
    write = preparation._write_manifest
    monkeypatch.setattr(preparation, "_write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(config, SEED, tmp_path / "data", workers=1)
    monkeypatch.setattr(preparation, "_write_manifest", write)
    shard = next((tmp_path / "data.partial").glob("train-00003*.arrayrecord"))
    shard.write_bytes(shard.read_bytes()[:-20])
    corpus = prepare(config, SEED, tmp_path / "data", workers=1)
    np.testing.assert_array_equal(all_rows(corpus), all_rows(whole))


def test_going_on_with_another_configuration_is_refused_by_field(config, tmp_path, small_shards, monkeypatch):
    monkeypatch.setattr(preparation, "_write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(config, SEED, tmp_path / "data", workers=1)
    with pytest.raises(RunError, match=r"data\.partial was begun with .* data\.seq_len changed from 16; delete"):
        prepare(dataclasses.replace(config, seq_len=32), SEED, tmp_path / "data", workers=1)


def test_a_bad_line_is_named_and_what_was_finished_is_kept(config, text, tmp_path, small_shards):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes((text / f"{name}.jsonl").read_bytes())
    lines = (tmp_path / "a.jsonl").read_text().split("\n")
    lines[200] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl, byte \d+ is not JSON"):
        prepare(dataclasses.replace(config, path=str(tmp_path)), SEED, tmp_path / "data", workers=1)
    assert not (tmp_path / "data").exists()
    assert list((tmp_path / "data.partial").glob("*.json"))


def test_every_row_is_verified(config, tmp_path):
    prepare(config, SEED, tmp_path / "data")
    verify(tmp_path / "data")
    shard = next((tmp_path / "data").glob("train*"))
    content = bytearray(shard.read_bytes())
    # A token inside a row; the file keeps its size and its index.
    place = content.index(np.array([50_256], np.uint16).tobytes(), 65536)
    content[place - 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RunError, match=f"{shard.name} is damaged"):
        verify(tmp_path / "data")


def test_shared_data_may_be_used_where_the_text_is_not(config, tmp_path):
    prepare(config, SEED, tmp_path / "data")
    elsewhere = dataclasses.replace(config, path="gone", prepared=str(tmp_path / "data"), reader_processes=1)
    assert load(elsewhere, SEED + 1, tmp_path / "data").num_train_rows
    with pytest.raises(RunError, match=r"data\.path = .* now it is 'gone'"):
        load(dataclasses.replace(config, path="gone"), SEED, tmp_path / "data")


def test_a_trained_vocabulary_works_on_streamed_text(config, tmp_path, small_shards):
    corpus = prepare(dataclasses.replace(config, tokenizer="bpe", vocab_size=300), SEED, tmp_path / "data")
    assert corpus.vocab_size == 300 and corpus.dtype == np.uint16
    text = corpus.tokenizer.decode(all_rows(corpus)[0])
    assert text.startswith("a0 ") or "cat" in text


def test_bert_documents_begin_with_cls_and_end_with_sep_also_when_cut(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(["The cat sat.", "a " * 50, "on the mat"] * 4))
    config = DataConfig(
        source="text_files",
        path=str(tmp_path / "a.txt"),
        tokenizer=str(vocabulary("bert-base-uncased")),
        vocab_size=30_522,
        seq_len=12,
        packing="padded",
        document_separator="\n",
        validation_fraction=0.4,
    )
    corpus = prepare(config, SEED, tmp_path / "data")
    for split in ("train", "validation"):
        for tokens_N, segments_N in map(corpus._row, corpus._source(split)):
            document = tokens_N[segments_N == 1]
            assert document[0] == 101 and document[-1] == 102
            assert not {101, 102} & set(document[1:-1])


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


def test_the_command_can_be_killed_and_run_again(text, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from kforcing_jax.data import files\n"
        "files._BYTES_PER_RANGE = 2000\n" + (REPOSITORY / "configs/owt.py").read_text(encoding="utf-8")
    )
    flags = [
        f"--config={config}:smoke",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={text}",
        f"--config.data.tokenizer={vocabulary('gpt2')}",
        "--workers=2",
    ]
    command = [sys.executable, "-m", "kforcing_jax.prepare", *flags]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("data.partial/*-of-*.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run/data").exists()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "shard" in done.stderr and "tokens" in done.stderr  # the progress bar
    assert "every row verified" in done.stdout and "useful" in done.stdout
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "data"]
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert "was there, every row verified" in again.stdout


def test_the_same_vocabulary_may_have_another_path_or_its_name(config, tmp_path):
    folder = prepare(config, SEED, tmp_path / "data", workers=1).directory
    (tmp_path / "copy.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for same in (f"{tmp_path / 'copy.json'}", "gpt2", "openai-community/gpt2"):
        assert load(dataclasses.replace(config, tokenizer=same), SEED, folder).num_train_rows > 0
    for other in ("bert-base-uncased", "bpe", "/no/such"):
        with pytest.raises(RunError, match=rf"was prepared with data\.tokenizer = .*, now it is '{other}'"):
            load(dataclasses.replace(config, tokenizer=other), SEED, folder)
