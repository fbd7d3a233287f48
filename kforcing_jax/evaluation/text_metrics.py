"""Repetition and diversity of samples, from their token ids alone.

A sample is a row of generated ids: without its prompt, and cut at its end of sequence. Rows may differ in length. What
cannot be measured, because every row is too short, is 0 and never NaN.
"""

from collections.abc import Sequence

import numpy as np

Rows = Sequence[Sequence[int] | np.ndarray]


def new_tokens(tokens: np.ndarray, prompt_length: int, length: int, eos_id: int | None) -> np.ndarray:
    """The generated ids of one row of a `Generation`, up to its first EOS and without it."""
    new = np.asarray(tokens[prompt_length:length])
    ends = np.flatnonzero(new == eos_id) if eos_id is not None else np.zeros(0, int)
    return new[: ends[0]] if len(ends) else new


def distinct_n(rows: Rows, n: int) -> float:
    """Distinct n-grams over all n-grams, counted over the whole sample (Li et al. 2016); higher is more diverse.

    N-grams do not cross rows. It falls as the sample grows, so compare samples of one size only. 0 when no row has n
    tokens.
    """
    ngrams = [_ngrams(row, n) for row in rows if len(row) >= n]
    return _distinct_share(np.concatenate(ngrams)) if ngrams else 0.0


def token_entropy(rows: Rows) -> float:
    """Entropy in nats of the unigram distribution of each row, averaged over rows.

    The sample entropy that discrete diffusion models report next to perplexity (Zheng et al. 2025, arXiv 2409.02908),
    and not the entropy of one distribution pooled over all rows. A row of m tokens has at most log(m). Empty rows are
    left out; 0 when all are.
    """
    return _mean([_entropy(row) for row in rows if len(row)])


def repetition(rows: Rows, n: int = 4) -> float:
    """seq-rep-n of Welleck et al. 2020: 1 - distinct n-grams / n-grams within a row, averaged over rows; 0 is best.

    Rows with fewer than n tokens have no n-gram to repeat and are left out; 0 when all are.
    """
    return _mean([1 - _distinct_share(_ngrams(row, n)) for row in rows if len(row) >= n])


def _ngrams(row, n):
    return np.lib.stride_tricks.sliding_window_view(np.asarray(row), n)


def _distinct_share(ngrams):
    return len(np.unique(ngrams, axis=0)) / len(ngrams)


def _entropy(row):
    _, counts = np.unique(np.asarray(row), return_counts=True)
    share = counts / counts.sum()
    return float((share * np.log(1 / share)).sum())


def _mean(values):
    return float(np.mean(values)) if values else 0.0
