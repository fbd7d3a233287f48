"""How faithful a student is to the AR teacher: agreement under the same noise, and joint distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

from kforcing_jax.data.packing import Batch
from kforcing_jax.evaluation.intervals import mean_interval
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.models.keys import Known, UpTo
from kforcing_jax.models.lm import consecutive
from kforcing_jax.models.truncation import nucleus
from kforcing_jax.noise import sample_uniform
from kforcing_jax.sharding import to_host
from kforcing_jax.training.agreement import agreement_by_row

# Cells of a G-test that expect fewer counts than this are pooled, as its chi-square limit wants.
_LEAST_EXPECTED = 5.0
# The null is the mean over this many samples, so that it adds no noise of its own to the comparison.
_NULL_SAMPLES = 32


def agreement(
    teacher: CausalLM,
    teacher_params: dict,
    student: PushForwardLM,
    params: dict,
    batches: Batch,
    key: jax.Array,
    *,
    window: int,
    tau: float,
    eos_id: int | None,
    top_p: float = 1.0,
) -> dict:
    """Agreement with the AR teacher under the same noise and the student's own prefix, at every position.

    `batches` has leaves (I, B, N); `top_p` is that of the teacher's draws, with which the student was trained.

    Returns:
      agreement: per offset, P(student's token = the token that the teacher draws for the same uniform).
      chance: per offset, P(two independent draws of the teacher are equal), its sum of squared probabilities.
      block_agreement: P(all offsets agree). One minus it bounds the block's total variation from above. Its
        `_interval` is [low, high] at 95 % over rows, None with fewer than two.

    Neither what follows a window's first EOS is counted, nor what lies beyond the longest text (`window_weights`).
    """
    settings: dict = {"window": window, "tau": tau, "eos_id": eos_id, "top_p": top_p}
    sums = agreement_by_row(teacher, teacher_params, student, params, batches, key, **settings)
    return {
        "agreement": sums.agreement_K.tolist(),
        "chance": sums.chance_K.tolist(),
        "block_agreement": sums.block_agreement,
        "block_agreement_interval": mean_interval(sums.agree_R, sums.blocks_R),
    }


def exact_joint(
    teacher: CausalLM, params: dict, contexts_CxN: jax.Array, window: int, tau: float = 1.0, top_p: float = 1.0
) -> np.ndarray:
    """The teacher's joint distribution at `tau` and `top_p` over all blocks of `window` tokens after each context, f64.

    Shape (contexts, states, ..., states) with one axis per offset; states are all ids but the mask, which is last.
    """
    contexts, states = len(contexts_CxN), teacher.cfg.vocab_size - 1
    if window == 1:
        logits_CxV = jax.jit(teacher.apply)({"params": params}, contexts_CxN)[:, -1, :states]
        return to_host(_probabilities(logits_CxV, tau, top_p)).astype(np.float64)
    blocks_AxT = np.indices((states,) * (window - 1)).reshape(window - 1, -1).T
    first_CxE, later_CxAxTxE = _conditionals(teacher, params, contexts_CxN, blocks_AxT, tau, top_p)
    joint = to_host(first_CxE).astype(np.float64)
    by_block = to_host(later_CxAxTxE).reshape(contexts, *(states,) * (window - 1), window - 1, states)
    for offset in range(1, window):
        # P(token | its first `offset` predecessors) does not depend on the later ones: take any.
        later = (0,) * (window - 1 - offset)
        conditional = by_block[(slice(None),) * (1 + offset) + later + (offset - 1,)]
        joint = joint[..., None] * conditional.astype(np.float64)
    return joint


def _probabilities(logits_xE, tau, top_p):
    tempered_xE = (logits_xE - jnp.max(logits_xE, axis=-1, keepdims=True)) / tau
    return jax.nn.softmax(nucleus(tempered_xE, jnp.full(tempered_xE.shape[:-1], top_p)))


@functools.partial(jax.jit, static_argnames="teacher")
def _conditionals(teacher, params, contexts_CxN, blocks_AxT, tau=1.0, top_p=1.0):
    """P(next token) after each context (C, E), and after every token of every block there (C, A, T, E)."""
    states, (contexts, length) = teacher.cfg.vocab_size - 1, contexts_CxN.shape

    def probabilities(hidden):
        logits = teacher.apply({"params": params}, hidden, method="logits")[..., :states]
        return _probabilities(logits, tau, top_p)

    text = teacher.apply({"params": params}, contexts_CxN, method="begin")
    blocks_CxAxT = jnp.broadcast_to(blocks_AxT, (contexts, *blocks_AxT.shape))
    at_CxA = jnp.full(blocks_CxAxT.shape[:2], length)
    positions, prefix = consecutive(at_CxA, blocks_AxT.shape[1]), Known(text.text_keys, UpTo(at_CxA))
    later = teacher.apply({"params": params}, blocks_CxAxT, None, None, positions, prefix, method="extend")
    return probabilities(text.known.hidden[:, -1, 0]), probabilities(later.known.hidden)


def student_counts(
    student: PushForwardLM,
    params: dict,
    contexts_CxN: jax.Array,
    window: int,
    samples: int,
    key: jax.Array,
    tau: float = 1.0,
) -> np.ndarray:
    """How often the student emits each block after each context, in `samples` draws; shaped like `exact_joint`."""
    states = student.cfg.vocab_size - 1
    counts = np.zeros((len(contexts_CxN), *(states,) * window))
    for index, context_N in enumerate(contexts_CxN):
        noise_AxK = sample_uniform(jax.random.fold_in(key, index), (samples, window))
        blocks_AxK = to_host(_windows_after(student, params, context_N, noise_AxK, tau))
        np.add.at(counts[index], tuple(blocks_AxK.T), 1)
    return counts


@functools.partial(jax.jit, static_argnames="student")
def _windows_after(student, params, context_N, noise_AxK, tau=1.0):
    """The blocks_AxK that the student emits after one context: A windows hang off the same prefix."""
    variables, tokens_1xN, tau_1 = {"params": params}, context_N[None], jnp.full(1, tau, jnp.float32)
    no_noise, no_tokens = jnp.zeros((*tokens_1xN.shape, 0)), jnp.zeros((1, len(noise_AxK), 0), jnp.int32)
    text = student.apply(variables, tokens_1xN, no_noise, tau_1, method="begin")
    at_1xA = jnp.full((1, len(noise_AxK)), len(context_N))
    positions, prefix = consecutive(at_1xA, noise_AxK.shape[1]), Known(text.text_keys, UpTo(at_1xA))
    result = student.apply(variables, no_tokens, noise_AxK[None], tau_1, positions, prefix, method="extend")
    hidden = student.drawable(result)
    return student.apply(variables, hidden, noise_AxK[None], tau_1[:, None, None], method="draw")[0]


def compare_with_joint(counts: np.ndarray, joint: np.ndarray, seed: int) -> dict:
    """Total variation between block frequencies and the exact joint, mean over contexts, next to an AR null.

    `counts` and `joint` have the shape that `exact_joint` gives; `seed` is that of the null's samples.

    The null is what a sample of the same size from that very joint shows: no student can be expected to be below
    it. Also a G-test of both (cells that expect fewer than 5 are pooled), summed over contexts.
    """
    contexts, samples = len(counts), int(counts[0].sum())
    observed, expected = counts.reshape(contexts, -1), joint.reshape(contexts, -1)
    expected = expected / expected.sum(axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    null_SxCxE = np.stack([[rng.multinomial(samples, p) for p in expected] for _ in range(_NULL_SAMPLES)])
    return {
        "joint_tv": _total_variation(observed / samples, expected),
        "joint_tv_null": float(np.mean([_total_variation(null / samples, expected) for null in null_SxCxE])),
        "joint_g_test": _g_test(observed, expected * samples),
        "joint_g_test_null": _g_test(null_SxCxE[0], expected * samples),
    }


def _total_variation(p_CxE, q_CxE):
    return float(np.abs(p_CxE - q_CxE).sum(axis=1).mean() / 2)


def _g_test(observed_CxE, expected_CxE):
    statistic, degrees = 0.0, 0
    for observed, expected in zip(observed_CxE, expected_CxE, strict=True):
        large = expected >= _LEAST_EXPECTED
        o = np.append(observed[large], observed[~large].sum())
        e = np.append(expected[large], expected[~large].sum())
        o, e = o[e > 0], e[e > 0]
        statistic += 2 * scipy.special.xlogy(o, o / e).sum()
        degrees += len(e) - 1
    return {
        "statistic": float(statistic),
        "degrees_of_freedom": degrees,
        "p_value": float(scipy.stats.chi2.sf(statistic, degrees)),
    }
