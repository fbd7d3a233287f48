"""Figures of samples that continue prompts, with 95 % intervals over the prompts."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from kforcing_jax.evaluation.scorer import Score
from kforcing_jax.evaluation.text_metrics import Rows, distinct_n, repetition, token_entropy

_CONFIDENCE = 0.95


def gen_ppl(
    scores: Sequence[Score], prompt_of: Sequence | np.ndarray | None = None, seed: int = 0, resamples: int = 1000
) -> dict[str, float | int | list[float] | None]:
    """Perplexity of a corpus of completions: exp(NLL of all tokens / number of all tokens), with its interval.

    Args:
      scores: of the completions.
      prompt_of: the prompt of each, a number or a string; by default each has its own.
      seed, resamples: see `bootstrap`.

    Returns:
      gen_ppl: None when there is no token.
      gen_ppl_interval: [low, high], 95% percentile bootstrap over prompts; None with fewer than two prompts.
      scored_tokens, scored_completions, empty_completions: counts; empty completions are in neither of the first two.
    """
    nll, tokens = [score.nll for score in scores], [score.tokens for score in scores]
    interval = mean_interval(nll, tokens, prompt_of, seed, resamples)
    return {
        "gen_ppl": float(np.exp(sum(nll) / sum(tokens))) if sum(tokens) else None,
        # exp is monotone, so the percentiles of the perplexity are those of the mean NLL.
        "gen_ppl_interval": interval and np.exp(interval).tolist(),
        "scored_tokens": sum(tokens),
        "scored_completions": int(np.count_nonzero(tokens)),
        "empty_completions": tokens.count(0),
    }


def text_report(
    rows: Rows, prompt_of: Sequence | np.ndarray | None = None, seed: int = 0, resamples: int = 1000
) -> dict:
    """Diversity and repetition of samples, each with a 95% interval over prompts.

    Entropy and repetition are means over rows, and whole prompts are resampled. Distinct-n is pooled over all rows, and
    there a bootstrap is wrong: a row drawn twice adds n-grams but no distinct ones, so that the whole interval can lie
    below the figure. Its interval is a jackknife over prompts (figure +- t x standard error), which never draws a
    row twice, and whose variance is biased upwards, if at all (Efron and Stein 1981).

    Args:
      rows: generated ids without prompt and EOS, see `new_tokens`.
      prompt_of, seed, resamples: see `gen_ppl`.

    Returns:
      token_entropy (nats), repetition_4, distinct_1, distinct_2, distinct_3, as in `text_metrics`, and each of them
      with "_interval": [low, high], None with fewer than two prompts.
    """
    entropies, repetitions = [token_entropy([row]) for row in rows], [repetition([row], 4) for row in rows]
    lengths = np.array([len(row) for row in rows], int)
    report = {
        "token_entropy": token_entropy(rows),
        "token_entropy_interval": mean_interval(entropies, lengths >= 1, prompt_of, seed, resamples),
        "repetition_4": repetition(rows, 4),
        "repetition_4_interval": mean_interval(repetitions, lengths >= 4, prompt_of, seed, resamples),
    }
    for n in (1, 2, 3):
        report[f"distinct_{n}"] = distinct_n(rows, n)
        report[f"distinct_{n}_interval"] = _distinct_interval(rows, n, prompt_of)
    return report


def mean_interval(
    totals: Sequence[float] | np.ndarray,
    counts: Sequence[int] | np.ndarray,
    prompt_of: Sequence | np.ndarray | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> list[float] | None:
    """[low, high], 95 % percentile bootstrap over prompts; arguments as of `bootstrap`. None with one prompt."""
    values = bootstrap(totals, counts, prompt_of, seed, resamples)
    tail = 50 * (1 - _CONFIDENCE)
    return np.percentile(values, [tail, 100 - tail]).tolist() if len(values) else None


def bootstrap(
    totals: Sequence[float] | np.ndarray,
    counts: Sequence[int] | np.ndarray,
    prompt_of: Sequence | np.ndarray | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> np.ndarray:
    """sum(totals) / sum(counts) of resamples that draw as many prompts as there are, each with all of its samples.

    Args:
      totals: one per sample, 0 where its count is 0.
      counts: what they are divided by: tokens, or 1 for a mean over samples.
      prompt_of: the prompt of each sample, a number or a string; by default each has its own.
      seed: the same seed gives the same resamples.
      resamples: how many.

    Returns:
      (resamples,) f64, less those whose counts are all 0; none with fewer than two prompts, which say nothing of a
      spread.

    Raises:
      ValueError: prompt_of is not as long as totals.
    """
    prompts, number = _prompts(prompt_of, len(totals))
    if prompts < 2:
        return np.empty(0)
    totals_P = np.bincount(number, np.asarray(totals, float), prompts)
    counts_P = np.bincount(number, np.asarray(counts, float), prompts)
    drawn_RxP = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), resamples)
    totals_R, counts_R = drawn_RxP @ totals_P, drawn_RxP @ counts_P
    return totals_R[counts_R > 0] / counts_R[counts_R > 0]


def _prompts(prompt_of, samples) -> tuple[int, np.ndarray]:
    """The number of prompts, and that of each sample's prompt among them."""
    if prompt_of is None:
        return samples, np.arange(samples)
    if len(prompt_of) != samples:
        raise ValueError(f"prompt_of has {len(prompt_of)} entries for {samples} samples")
    prompts, number = np.unique(np.asarray(prompt_of), return_inverse=True)
    return len(prompts), number


def _distinct_interval(rows, n, prompt_of) -> list[float] | None:
    """Delete-one-prompt jackknife of distinct-n."""
    prompts, number = _prompts(prompt_of, len(rows))
    total_P, lost_P, distinct = _ngrams_by_prompt(rows, n, prompts, number)
    total = total_P.sum()
    if prompts < 2 or (total_P == total).any():
        return None
    without_P = (distinct - lost_P) / (total - total_P)
    error = np.sqrt((prompts - 1) * without_P.var())
    reach = stats.t.ppf((1 + _CONFIDENCE) / 2, prompts - 1) * error
    return np.clip([distinct / total - reach, distinct / total + reach], 0, 1).tolist()


def _ngrams_by_prompt(rows, n, prompts, number) -> tuple[np.ndarray, np.ndarray, int]:
    """n-grams of each prompt's rows, distinct ones that no other prompt has, and the number of distinct ones."""
    long = [i for i, row in enumerate(rows) if len(row) >= n]
    if not long:
        return np.zeros(prompts, int), np.zeros(prompts, int), 0
    ngrams = [np.lib.stride_tricks.sliding_window_view(np.asarray(rows[i]), n) for i in long]
    prompt_M = np.repeat(number[long], [len(grams) for grams in ngrams])
    distinct, type_M = np.unique(np.concatenate(ngrams), axis=0, return_inverse=True)
    types, owners = np.divmod(np.unique(type_M.reshape(-1) * prompts + prompt_M), prompts)
    alone = np.bincount(types, minlength=len(distinct))[types] == 1
    return np.bincount(prompt_M, minlength=prompts), np.bincount(owners[alone], minlength=prompts), len(distinct)
