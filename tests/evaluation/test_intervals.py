"""Corpus figures and their intervals over prompts."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from kforcing_jax.evaluation.intervals import bootstrap, gen_ppl, text_report
from kforcing_jax.evaluation.scorer import Score
from kforcing_jax.evaluation.text_metrics import distinct_n, repetition, token_entropy


def test_gen_ppl_weighs_tokens_and_not_texts():
    report = gen_ppl([Score(2.0, 1), Score(3.0, 3), Score(0.0, 0)])
    assert report["gen_ppl"] == pytest.approx(math.exp(5 / 4))
    assert report["gen_ppl"] != pytest.approx((math.exp(2) + math.exp(1)) / 2)
    assert (report["scored_tokens"], report["scored_completions"], report["empty_completions"]) == (4, 2, 1)
    low, high = report["gen_ppl_interval"]
    assert math.exp(1) <= low <= report["gen_ppl"] <= high <= math.exp(2)


def test_what_cannot_be_measured_is_null():
    empty = gen_ppl([Score(0.0, 0)] * 3)
    assert empty["gen_ppl"] is empty["gen_ppl_interval"] is None
    assert empty["empty_completions"] == 3
    assert gen_ppl([])["gen_ppl"] is None
    one_prompt = gen_ppl([Score(2.0, 1), Score(3.0, 1)], prompt_of=["a", "a"])
    assert one_prompt["gen_ppl"] == pytest.approx(math.exp(2.5))
    assert one_prompt["gen_ppl_interval"] is None
    report = text_report([[], [1]])
    assert report["distinct_3"] == 0
    assert report["distinct_3_interval"] is report["repetition_4_interval"] is None
    json.dumps([empty, one_prompt, report], allow_nan=False)


def test_the_bootstrap_draws_whole_prompts():
    values = bootstrap([0.0] * 50 + [1.0] * 50, [1] * 100, prompt_of=["a"] * 50 + ["b"] * 50)
    assert set(values) == {0, 0.5, 1}
    assert np.mean(values == 0.5) == pytest.approx(0.5, abs=0.05)


def test_the_bootstrap_is_a_function_of_its_seed():
    totals, counts = np.arange(30.0), np.arange(1, 31)
    np.testing.assert_array_equal(bootstrap(totals, counts, seed=1), bootstrap(totals, counts, seed=1))
    assert (bootstrap(totals, counts, seed=1) != bootstrap(totals, counts, seed=2)).any()
    assert len(bootstrap(totals, counts, resamples=17)) == 17


def test_prompts_must_be_as_many_as_samples():
    with pytest.raises(ValueError, match="1 entries for 2"):
        gen_ppl([Score(1.0, 1)] * 2, prompt_of=[0])


def test_the_interval_of_gen_ppl_covers_the_truth_only_when_prompts_are_resampled():
    rng, truth, prompts, samples = np.random.default_rng(0), 3.0, 50, 4
    covered = {"prompts": 0, "samples": 0}
    for _ in range(100):
        mean_nll = truth + np.repeat(rng.normal(size=prompts), samples) + 0.3 * rng.normal(size=prompts * samples)
        tokens = rng.integers(5, 20, prompts * samples)
        scores = [Score(float(nll * n), int(n)) for nll, n in zip(mean_nll, tokens, strict=True)]
        for name, prompt_of in (("prompts", np.repeat(np.arange(prompts), samples)), ("samples", None)):
            low, high = gen_ppl(scores, prompt_of, resamples=200)["gen_ppl_interval"]
            covered[name] += low <= math.exp(truth) <= high
    assert covered["prompts"] >= 0.9 * 100
    assert covered["samples"] <= 0.8 * 100


def test_the_text_report_has_the_figures_of_text_metrics_inside_their_intervals(rng):
    rows = [rng.integers(0, 9, length) for length in (0, 1, 3, 6, 20, 30, 30)]
    report = text_report(rows)
    expected = {"token_entropy": token_entropy(rows), "repetition_4": repetition(rows, 4)}
    expected |= {f"distinct_{n}": distinct_n(rows, n) for n in (1, 2, 3)}
    assert {name: value for name, value in report.items() if not name.endswith("_interval")} == expected
    for name, value in expected.items():
        low, high = report[f"{name}_interval"]
        assert low < value < high or value == 0
    assert text_report(rows) == report


def test_rows_that_are_left_out_of_a_mean_are_left_out_of_its_interval():
    rows = [[7] * 8, list(range(8))] * 5
    report, with_short = text_report(rows), text_report([*rows, [], [1, 2]], prompt_of=[*range(10), 9, 9])
    assert with_short["repetition_4_interval"] == report["repetition_4_interval"]
    assert text_report([*rows, []], prompt_of=[*range(10), 9])["token_entropy_interval"] == pytest.approx(
        report["token_entropy_interval"]
    )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_interval_of_distinct_n_is_a_jackknife_over_prompts(rng, n):
    prompt_of = np.repeat(np.arange(6), 3)
    rows = [rng.integers(0, 5, rng.integers(0, 15)) for _ in prompt_of]  # far from 1, where it would be clipped
    without = [distinct_n([r for r, p in zip(rows, prompt_of, strict=True) if p != out], n) for out in range(6)]
    error = math.sqrt(5 / 6 * sum((value - np.mean(without)) ** 2 for value in without))
    low, high = text_report(rows, prompt_of)[f"distinct_{n}_interval"]
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 5) * error)
    assert (low + high) / 2 == pytest.approx(distinct_n(rows, n))


def test_the_interval_of_distinct_n_covers_what_samples_of_this_size_have(rng):
    share = 1 / np.arange(1, 301)
    samples = [rng.choice(300, (30, 20), p=share / share.sum()) for _ in range(60)]
    expected = np.mean([distinct_n(rows, 2) for rows in samples])
    intervals = [text_report(rows, resamples=1)["distinct_2_interval"] for rows in samples]
    assert np.mean([low <= expected <= high for low, high in intervals]) > 0.9
