"""External figures of a run's samples: in its summary, its table, and of texts made by hand."""

import json

import numpy as np
import pytest
from external_lm import write_external_lm
from micro import micro_config

from kforcing_jax.config import DataConfig
from kforcing_jax.data.tokenizers import train_tokenizer
from kforcing_jax.evaluation.external import external_figures
from kforcing_jax.evaluation.scorer import Completion, Scorer
from kforcing_jax.evaluation.suite import evaluate
from kforcing_jax.evaluation.tables import interval_text, table
from kforcing_jax.sharding import make_mesh
from kforcing_jax.training import curriculum
from kforcing_jax.workdir import Workdir


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return Scorer.load(write_external_lm(tmp_path_factory.mktemp("lm"), context=32), device="cpu")


def test_text_counts_up_to_eos_and_without_special_tokens(scorer):
    tokenizer = train_tokenizer(DataConfig(tokenizer="bpe", vocab_size=300), ["the quick fox. the dog. "] * 5)
    prompt, eos = tokenizer.encode("the "), tokenizer.eos_id
    texts = ["quick fox", "dog", ""]
    rows = [[*prompt, *tokenizer.encode(text), eos, *tokenizer.encode("the fox")] for text in texts]
    width = max(map(len, rows))
    tokens_RxM = np.array([row + [eos] * (width - len(row)) for row in rows])
    lengths_R = np.full(len(rows), width)
    figures = external_figures(scorer, tokens_RxM, lengths_R, len(prompt), tokenizer)
    scores = scorer.score([Completion("the ", text) for text in texts])
    assert figures["gen_ppl"] == pytest.approx(np.exp(sum(s.nll for s in scores) / sum(s.tokens for s in scores)))
    assert (figures["scored_completions"], figures["empty_completions"]) == (2, 1)
    assert {"token_entropy", "distinct_2", "repetition_4", "gen_ppl_interval"} <= figures.keys()


def test_a_run_has_external_figures_next_to_its_own(scorer, tmp_path):
    config = micro_config()
    workdir = Workdir.claim(tmp_path, config)
    corpus = workdir.corpus()
    mesh = make_mesh(config.mesh)
    curriculum.run(workdir, corpus, mesh)
    summary = evaluate(workdir, corpus, mesh, scorer)
    assert summary == json.loads(workdir.summary_path.read_text())
    for stage in summary["stages"].values():
        low, high = stage["external"]["gen_ppl_interval"]
        assert 1 < low <= stage["external"]["gen_ppl"] <= high
    _, _, header, _, *rows = table(summary).splitlines()
    assert {"Gen-PPL", "entropy", "distinct", "repeat"} <= set(header.split())
    for stage, row in zip(summary["stages"].values(), rows, strict=False):
        assert interval_text(stage["external"], "gen_ppl", 1) in row
    assert "Gen-PPL" in (tmp_path / "report.html").read_text()
    # Without a scorer, figures of what may have been other samples are not kept.
    assert "external" not in evaluate(workdir, corpus, mesh)["stages"]["ar"]
