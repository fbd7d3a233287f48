"""Figures of samples that need no model of ours: under an external scorer, and of the texts alone."""

from collections.abc import Sequence

import numpy as np

from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.evaluation.intervals import gen_ppl, text_report
from kforcing_jax.evaluation.scorer import Completion, Scorer
from kforcing_jax.evaluation.text_metrics import new_tokens


def external_figures(
    scorer: Scorer,
    tokens_RxM: np.ndarray,
    lengths_R: np.ndarray,
    prompt_length: int,
    tokenizer: Tokenizer,
    prompt_of: Sequence | np.ndarray | None = None,
) -> dict:
    """Gen-PPL and what belongs next to it: what `gen_ppl` and `text_report` give of rows that continue prompts.

    Args:
      tokens_RxM, lengths_R: as in `Generation`, with prompts of one length; text counts up to the first EOS.
      prompt_of: the prompt of each row; by default each has its own.
    """
    rows = [(row, prompt_length, end, tokenizer.eos_id) for row, end in zip(tokens_RxM, lengths_R, strict=True)]
    scores = scorer.score([clean(*row, tokenizer) for row in rows])
    return gen_ppl(scores, prompt_of) | text_report([new_tokens(*row) for row in rows], prompt_of)


def clean(tokens: np.ndarray, prompt_length: int, length: int, eos_id: int | None, tokenizer: Tokenizer) -> Completion:
    """The text of one row of a `Generation`: cut at the first generated EOS, special tokens left out.

    Prompt and completion are decoded together and parted where the text stops being that of the prompt alone. A
    character whose bytes are on both sides, or a space that only exists between two words, so goes to the completion.
    """
    kept = prompt_length + len(new_tokens(tokens, prompt_length, length, eos_id))
    whole = tokenizer.decode(tokens[:kept])
    prompt = tokenizer.decode(tokens[:prompt_length])
    differing = (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b)
    boundary = next(differing, min(len(prompt), len(whole)))
    return Completion(whole[:boundary], whole[boundary:])
