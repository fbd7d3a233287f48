"""Samples of teacher and students: where they start, what the AR teacher thinks of them, and how fast they come."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.decoding import Generation, generate
from kforcing_jax.evaluation.intervals import mean_interval
from kforcing_jax.evaluation.text_metrics import distinct_n, new_tokens, repetition, token_entropy
from kforcing_jax.evaluation.timing import in_turns
from kforcing_jax.models import CausalLM
from kforcing_jax.sharding import to_host


def prompts(corpus: Corpus, count: int, length: int, kept: int = 0) -> np.ndarray:
    """Up to `count` beginnings of validation text, (count, length), that begin with a word where text has words.

    Where rows are cut from running text they begin anywhere in it, after `kept` tokens of their own (a BOS); where only
    answers are learnt, an answer comes next.

    Raises:
      DataError: no document is longer than `length` tokens.
    """
    texts = corpus.beginnings(count, length)
    if corpus.segmented or corpus.has_answers:
        return np.stack([text_M[:length] for text_M in texts])
    firsts = [first_word(corpus.tokenizer, text_M, kept, len(text_M) - length + kept) for text_M in texts]
    pieces = [(text_M[:kept], text_M[first:]) for text_M, first in zip(texts, firsts, strict=True)]
    return np.stack([np.concatenate(piece)[:length] for piece in pieces])


def first_word(tokenizer: Tokenizer, tokens_N: np.ndarray, least: int, most: int) -> int:
    """The first index in (least, most] where a word begins: after an EOS, or at white space. `least` if there is none.

    What is at `least` itself may be the middle of a word.
    """
    before = tokenizer.decode(tokens_N[: least + 1])
    for index in range(least + 1, most + 1):
        whole = tokenizer.decode(tokens_N[: index + 1])
        piece = whole[len(before) :]
        after_space = before[-1:].isspace() or piece[:1].isspace()
        if tokens_N[index - 1] == tokenizer.eos_id or (after_space and piece.strip()):
            return index
        before = whole
    return least


def speeds(
    stages: Mapping[str, tuple],
    prompts_RxP: np.ndarray,
    batches: Iterable[int],
    rounds: int,
    top_p: float = 1.0,
    **settings: Any,
) -> dict[str, dict[str, dict]]:
    """How fast `stages` (name to model, parameters, tokens per pass) decode, taking turns, every text at full length.

    `top_p` is that of an AR teacher's draws; `settings` are further ones of `generate`, `max_new_tokens` among them.

    Returns:
      By stage and by number of requests (text, as JSON wants it): raw tokens_per_second, from the median; of students
      also vs_ar, how much faster than `ar` within a round: median, and first and last quartile (low, high).
    """
    found: dict[str, dict[str, dict]] = {name: {} for name in stages}
    for batch in batches:
        rows = prompts_RxP[np.arange(batch) % len(prompts_RxP)]
        programs = {
            name: functools.partial(
                generate, model, params, rows, k=k, seeds=np.arange(batch), **_top_p_of(model, top_p), **settings
            )
            for name, (model, params, k) in stages.items()
        }
        times = in_turns(programs, rounds)
        for name in stages:
            rate = batch * settings["max_new_tokens"] / times.median(name)
            versus = {} if name == "ar" else {"vs_ar": times.ratio("ar", name)}
            found[name][str(batch)] = {"tokens_per_second": round(rate, 1)} | versus
    return found


def _top_p_of(model, top_p) -> dict:
    return {"top_p": top_p} if isinstance(model, CausalLM) else {}


def measure(
    teacher: CausalLM, teacher_params: dict, decoded: Generation, prompt_length: int, eos_id: int | None
) -> dict:
    """Figures of decoded continuations.

    Returns:
      What `stride_figures` gives.
      token_entropy, distinct_2, repetition_4: of the texts up to their EOS and without it, see `text_metrics`.
    """
    texts = zip(decoded.tokens, decoded.lengths, strict=True)
    rows = [new_tokens(tokens, prompt_length, length, eos_id) for tokens, length in texts]
    return stride_figures(teacher, teacher_params, decoded, prompt_length) | {
        "token_entropy": token_entropy(rows),
        "distinct_2": distinct_n(rows, 2),
        "repetition_4": repetition(rows, 4),
    }


def stride_figures(teacher: CausalLM, params: dict, decoded: Generation, prompt_length: int) -> dict:
    """What a stride is chosen by, each figure with `_interval`.

    Returns:
      tokens_per_pass: tokens up to and with EOS over the forward passes that they took.
      sample_nll, sample_entropy: see `under_teacher`.
    """
    new_B = decoded.lengths - prompt_length
    per_pass = _mean_over_prompts("tokens_per_pass", new_B, decoded.passes)
    return per_pass | under_teacher(teacher, params, decoded.tokens, decoded.lengths, prompt_length)


def under_teacher(
    teacher: CausalLM,
    params: dict,
    tokens_BxN: np.ndarray,
    lengths_B: np.ndarray,
    prompt_length: int,
    prompt_of: Sequence | np.ndarray | None = None,
) -> dict:
    """sample_nll and sample_entropy: nats per token (EOS included) under the AR teacher at tau = 1.

    Given prompt and sample so far. Low NLL with low entropy is repetition, not quality. Each with `_interval`,
    [low, high] at 95 % over prompts; `prompt_of` is the prompt of each sample, by default each has its own.
    """
    position_M = np.arange(1, tokens_BxN.shape[1])
    new_BxM = (position_M >= prompt_length) & (position_M < lengths_B[:, None])
    nll_B, entropy_B = (
        np.sum(to_host(nats_BxM), axis=1, where=new_BxM, dtype=np.float64)
        for nats_BxM in _under_teacher(teacher, params, tokens_BxN)
    )
    count_B = new_BxM.sum(axis=1)
    return _mean_over_prompts("sample_nll", nll_B, count_B, prompt_of) | _mean_over_prompts(
        "sample_entropy", entropy_B, count_B, prompt_of
    )


def _mean_over_prompts(name, totals_B, counts_B, prompt_of=None) -> dict:
    interval = mean_interval(totals_B, counts_B, prompt_of)
    return {name: float(totals_B.sum() / counts_B.sum()), f"{name}_interval": interval}


@functools.partial(jax.jit, static_argnames="teacher")
def _under_teacher(teacher, params, tokens_BxN):
    """NLL and predictive entropy (nats) of every token after the first, both (B, N - 1)."""

    def nll_and_entropy(logits, targets):
        log_probs = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        return nll, -(jnp.exp(log_probs) * log_probs).sum(-1)

    variables = {"params": params}
    hidden_BxNx1xD = teacher.apply(variables, tokens_BxN[:, :-1], method="begin").known.hidden
    targets_BxNx1 = teacher.cfg.column_of(tokens_BxN[:, 1:, None])
    measured = teacher.apply(variables, nll_and_entropy, hidden_BxNx1xD, targets_BxNx1, method="per_token")
    return jax.tree.map(lambda x: x[..., 0], measured)
