"""Figures of samples that need no model of ours: under an external scorer, and of the texts alone."""

from collections.abc import Iterable, Sequence

import numpy as np

from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.evaluation.intervals import gen_ppl, text_report
from kforcing_jax.evaluation.scorer import Completion, Scorer, clean, mauve_score, new_tokens


def external_figures(
    scorer: Scorer,
    tokens_RxM: np.ndarray,
    lengths_R: np.ndarray,
    prompt_length: int,
    tokenizer: Tokenizer,
    prompt_of: Sequence | None = None,
    references: Sequence[np.ndarray] = (),
) -> dict:
    """Gen-PPL, what belongs next to it, and MAUVE: of rows that continue prompts of one length.

    Args:
      tokens_RxM, lengths_R: as in `Generation`; text counts up to the first EOS.
      prompt_of: the prompt of each row; by default each has its own.
      references: real texts, each a prompt and its continuation, for MAUVE.

    Returns:
      what `gen_ppl` and `text_report` give, and mauve: None where there are no references or the package is missing.
    """
    eos_id = tokenizer.eos_id
    rows = [(row, prompt_length, length, eos_id) for row, length in zip(tokens_RxM, lengths_R, strict=True)]
    completions = [clean(*row, tokenizer) for row in rows]
    figures = gen_ppl(scorer.score(completions), prompt_of) | text_report([new_tokens(*row) for row in rows], prompt_of)
    real = _with_text(clean(text, prompt_length, len(text), eos_id, tokenizer) for text in references)
    samples = _with_text(completions)
    return figures | {"mauve": mauve_score(scorer, samples, real) if samples and real else None}


def _with_text(completions: Iterable[Completion]) -> list[Completion]:
    return [completion for completion in completions if completion.text.strip()]
