"""Samples of teacher and students: what the AR teacher thinks of them, and how fast they came."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.decoding import Generation, generate
from kforcing_jax.evaluation.text_metrics import distinct_n, repetition, token_entropy
from kforcing_jax.models import CausalLM

_TIMED_RUNS = 3


def decode(model, params, prompts_BxP: np.ndarray, **settings) -> tuple[Generation, float]:
    """Continues the prompts with `generate`: what it decoded, and its useful tokens (up to EOS) per second.

    The rate is the median of three runs after the one that compiles.
    """
    decoded = generate(model, params, prompts_BxP, **settings)
    seconds = []
    for _ in range(_TIMED_RUNS):
        start = time.perf_counter()
        generate(model, params, prompts_BxP, **settings)
        seconds.append(time.perf_counter() - start)
    return decoded, float((decoded.lengths - prompts_BxP.shape[1]).sum() / np.median(seconds))


def measure(teacher: CausalLM, teacher_params, decoded: Generation, prompt_length: int) -> dict:
    """Figures of decoded continuations, up to their EOS.

    Returns:
      sample_nll, sample_entropy: nats per token under the AR teacher, given prompt and sample so far. Low NLL with
        low entropy is repetition, not quality.
      token_entropy, distinct_2, repetition_4: of the samples alone, see `text_metrics`.
    """
    rows = [tokens[prompt_length:length] for tokens, length in zip(decoded.tokens, decoded.lengths, strict=True)]
    nll_BxM, entropy_BxM = map(np.asarray, _under_teacher(teacher, teacher_params, decoded.tokens))
    position_M = np.arange(1, decoded.tokens.shape[1])
    new_BxM = (position_M >= prompt_length) & (position_M < decoded.lengths[:, None])
    return {
        "sample_nll": float(nll_BxM[new_BxM].mean()),
        "sample_entropy": float(entropy_BxM[new_BxM].mean()),
        "token_entropy": token_entropy(rows),
        "distinct_2": distinct_n(rows, 2),
        "repetition_4": repetition(rows, 4),
    }


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
