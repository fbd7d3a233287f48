"""Decoding step by step: a full forward pass over the whole text for every window, draws in f64. An oracle."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.models import CausalLM
from kforcing_jax.noise import position_noise

# Texts are padded to multiples of this, so that few lengths compile.
_UNIT = 64


class Decoded(NamedTuple):
    """New tokens, forward passes of either model, and how many tokens every pass kept."""

    tokens: list[int]
    student_passes: int
    teacher_passes: int
    kept: list[int]


def decode_step_by_step(request, *, student=None, teacher=None, k=1) -> Decoded:
    """k is the engine's window."""
    k, text = request.k or k, list(request.prompt)
    passes, kept = {"student": 0, "teacher": 0}, []
    is_ended = False
    while len(text) < request.end and not is_ended:
        new = []
        if request.mode != "ar":
            passes["student"] += 1
            new = draft(student, request, text, k)
        if request.mode != "student":
            passes["teacher"] += 1
            new = verified(teacher, request, text, new)
        new = new[: request.end - len(text)]
        ends = [index for index, token in enumerate(new) if token in request.end_ids]
        new, is_ended = new[: ends[0] + 1] if ends else new, bool(ends)
        text += new
        kept.append(len(new))
    return Decoded(text[len(request.prompt) :], passes["student"], passes["teacher"], kept)


def draft(student, request, text, k):
    """The tokens of one window that the request's stride keeps."""
    u_K = uniforms(request, len(text), k)
    logits_KxV = window_logits(student, text, u_K, request.tau)
    tokens, product = [], 1.0
    for offset in range(k):
        probabilities_V = softmax(penalised(logits_KxV[offset], request, text + tokens, student))
        token = int(probabilities_V.argmax())
        product *= probabilities_V[token]
        if request.mode == "student" and tokens and product < request.confidence:
            break
        tokens.append(token)
    return tokens


def verified(teacher, request, text, drafts):
    """The teacher's tokens up to the first that differs from the drafts."""
    tokens = []
    for offset in range(len(drafts) + 1):
        logits_V = penalised(next_logits(teacher, text + tokens), request, text + tokens, teacher)
        probabilities_V = softmax(truncated(logits_V / request.tau, request.top_k, request.top_p))
        order = teacher[0].cfg.cdf_order
        tokens_V = np.arange(len(logits_V)) if order is None else order.tokens_V
        cdf_V = np.cumsum(probabilities_V[tokens_V])
        tokens.append(int(tokens_V[np.argmax(cdf_V / cdf_V[-1] > uniforms(request, len(text) + offset, 1)[0])]))
        if offset < len(drafts) and tokens[-1] != drafts[offset]:
            break
    return tokens


def uniforms(request, first, count):
    if request.noise is not None:
        given = np.asarray(request.noise)[first - len(request.prompt) :][:count]
        return np.pad(given, (0, count - len(given)))
    positions = np.arange(first, first + count)[None]
    return np.asarray(position_noise(jnp.array([request.seed], jnp.uint32), positions))[0]


def penalised(logits_V, request, text, model):
    """f64, the mask impossible, with the biases, less the penalty for what was generated."""
    counts_V = np.bincount(text[len(request.prompt) :], minlength=len(logits_V))
    logits_V = np.asarray(logits_V, np.float64) - request.frequency_penalty * counts_V
    logits_V[list(request.logit_bias)] += list(request.logit_bias.values())
    logits_V[model[0].cfg.mask_id] = -np.inf
    return logits_V


def truncated(logits_V, top_k, top_p):
    """By sorting: the top_k likeliest, of these the fewest that have top_p, and what is as likely as the last one."""
    descending_V = np.sort(logits_V)[::-1]
    if top_k:
        logits_V = np.where(logits_V >= descending_V[min(top_k, len(logits_V)) - 1], logits_V, -np.inf)
    if top_p < 1:
        reached_V = np.cumsum(np.sort(softmax(logits_V))[::-1]) >= top_p
        logits_V = np.where(logits_V >= descending_V[np.argmax(reached_V)], logits_V, -np.inf)
    return logits_V


def log_probabilities(teacher, text):
    """(N - 1, V) of the tokens after every token of a text but its last, f64, the mask impossible."""
    tokens = np.pad(text, (0, -len(text) % _UNIT))[None]
    logits_NxV = np.asarray(_forward(*teacher, tokens, None, None), np.float64)[0, : len(text) - 1]
    logits_NxV[:, teacher[0].cfg.mask_id] = -np.inf
    shifted_NxV = logits_NxV - logits_NxV.max(axis=1, keepdims=True)
    return shifted_NxV - np.log(np.exp(shifted_NxV).sum(axis=1, keepdims=True))


def softmax(logits_V):
    weights_V = np.exp(logits_V - logits_V.max())
    return weights_V / weights_V.sum()


def next_logits(teacher, text):
    tokens = np.pad(text, (0, -len(text) % _UNIT))[None]
    return np.asarray(_forward(*teacher, tokens, None, None))[0, len(text) - 1]


def window_logits(student, text, u_K, tau):
    tokens = np.pad(text, (0, -len(text) % _UNIT))[None]
    noise = np.broadcast_to(np.float32(u_K), (*tokens.shape, len(u_K)))
    return np.asarray(_forward(*student, tokens, noise, np.full(1, tau, np.float32)))[0, len(text) - 1]


@functools.partial(jax.jit, static_argnames="model")
def _forward(model, params, tokens_1xN, noise_1xNxK, tau_1):
    inputs = (tokens_1xN,) if isinstance(model, CausalLM) else (tokens_1xN, noise_1xNxK, tau_1)
    return model.apply({"params": params}, *inputs)
