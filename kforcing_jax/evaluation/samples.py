"""Samples of teacher and students: what the AR teacher thinks of them, and how fast they came."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.decoding import Generation, generate
from kforcing_jax.evaluation.text_metrics import distinct_n, repetition, token_entropy
from kforcing_jax.models import CausalLM

_TIMED_RUNS = 3


def measure_samples(
    model,
    params,
    teacher: CausalLM,
    teacher_params,
    prompts_BxP: np.ndarray,
    *,
    new_tokens: int,
    k: int,
    tau: float,
    seeds: np.ndarray,
    eos_id: int | None,
) -> dict:
    """Continues the prompts and measures the continuations, up to their EOS.

    Returns:
      sample_nll, sample_entropy: nats per token under the AR teacher, given prompt and sample so far. Low NLL with
        low entropy is repetition, not quality.
      token_entropy, distinct_2, repetition_4: of the samples alone, see `text_metrics`.
      tokens_per_second: useful tokens (up to EOS) per second of the compiled decoder, median of three runs.
      tokens_per_pass: k, or 1 for the teacher.
    """
    settings = dict(max_new_tokens=new_tokens, k=k, tau=tau, seeds=seeds, eos_id=eos_id)
    decoded = generate(model, params, prompts_BxP, **settings)
    seconds = []
    for _ in range(_TIMED_RUNS):
        start = time.perf_counter()
        generate(model, params, prompts_BxP, **settings)
        seconds.append(time.perf_counter() - start)

    prompt_length = prompts_BxP.shape[1]
    useful_tokens = int((decoded.lengths - prompt_length).sum())
    rows = [tokens[prompt_length:length] for tokens, length in zip(decoded.tokens, decoded.lengths, strict=True)]
    nll, entropy = _under_teacher(teacher, teacher_params, decoded, prompt_length)
    return {
        "sample_nll": nll,
        "sample_entropy": entropy,
        "token_entropy": token_entropy(rows),
        "distinct_2": distinct_n(rows, 2),
        "repetition_4": repetition(rows, 4),
        "tokens_per_second": round(useful_tokens / float(np.median(seconds)), 1),
        "tokens_per_pass": k,
    }


def _under_teacher(teacher, params, decoded: Generation, prompt_length: int) -> tuple[float, float]:
    """Mean NLL and mean predictive entropy (nats) of the new tokens."""

    @jax.jit
    def score(tokens_BxN):
        log_probs = jax.nn.log_softmax(teacher.apply({"params": params}, tokens_BxN)[:, :-1])
        nll_BxM = -jnp.take_along_axis(log_probs, tokens_BxN[:, 1:, None], axis=-1)[..., 0]
        return nll_BxM, -(jnp.exp(log_probs) * log_probs).sum(-1)

    nll_BxM, entropy_BxM = map(np.asarray, score(jnp.asarray(decoded.tokens)))
    position_M = np.arange(1, decoded.tokens.shape[1])
    new_BxM = (position_M >= prompt_length) & (position_M < decoded.lengths[:, None])
    return float(nll_BxM[new_BxM].mean()), float(entropy_BxM[new_BxM].mean())
