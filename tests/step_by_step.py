"""Decoding step by step: a full forward pass over the whole text for every window, draws in f64. An oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.models import CausalLM
from kforcing_jax.noise import position_noise

# Texts are padded to multiples of this, so that few lengths compile.
_UNIT = 64


def decode_step_by_step(request, *, student=None, teacher=None, k=1):
    """(new tokens, student passes, teacher passes) of a request; k is the engine's window."""
    k, text = request.k or k, list(request.prompt)
    passes = {"student": 0, "teacher": 0}
    while len(text) < request.end:
        new = []
        if request.mode != "ar":
            passes["student"] += 1
            new = draft(student, request, text, k)
        if request.mode != "student":
            passes["teacher"] += 1
            new = verified(teacher, request, text, new)
        for token in new[: request.end - len(text)]:
            text.append(token)
            if token in request.end_ids:
                return text[len(request.prompt) :], passes["student"], passes["teacher"]
    return text[len(request.prompt) :], passes["student"], passes["teacher"]


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
        cdf_V = np.cumsum(softmax(logits_V / request.tau))
        tokens.append(int(np.argmax(cdf_V / cdf_V[-1] > uniforms(request, len(text) + offset, 1)[0])))
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
    """f64, the mask impossible, less the penalty for what was generated."""
    counts_V = np.bincount(text[len(request.prompt) :], minlength=len(logits_V))
    logits_V = np.asarray(logits_V, np.float64) - request.frequency_penalty * counts_V
    logits_V[model[0].cfg.mask_id] = -np.inf
    return logits_V


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
