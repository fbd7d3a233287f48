"""Requests that come to an engine at random, and what is to be true of what they get."""

import itertools

import numpy as np
from step_by_step import log_probabilities

from kforcing_jax.decoding import Logprobs, Request

K, LONGEST = 4, 40  # of the engines that serve them


def serve(engine, requests, rng=None):
    """Tokens and passes of every request; with `rng` they arrive at random, and steps are of random length."""
    updates = serve_updates(engine, requests, rng)
    tokens = [list(itertools.chain(*(update.tokens for update in each))) for each in updates]
    return tokens, [each[-1].passes for each in updates]


def serve_updates(engine, requests, rng=None):
    """All updates of every request."""
    waiting, running = list(range(len(requests))), {}
    updates = [[] for _ in requests]
    if rng is not None:
        rng.shuffle(waiting)
    while waiting or running:
        while waiting and engine.free_slots and (rng is None or not running or rng.random() < 0.6):
            index = waiting.pop(0)
            running[engine.insert(requests[index])] = index
        for update in engine.step(**(random_step(rng) if rng is not None else {})):
            index = running[update.slot]
            assert update.error is None
            updates[index].append(update)
            if update.is_finished:
                del running[update.slot]
    return updates


def random_step(rng):
    chunks = rng.choice([None, 0, 1, 2])
    return {"passes": int(rng.integers(1, 4)), "wait": bool(rng.integers(2)), "chunks": chunks}


def random_request(rng):
    mode = str(rng.choice(["student", "ar", "exact"]))
    prompt = rng.integers(0, 12, rng.integers(1, 24)).tolist()
    return Request(
        prompt,
        int(rng.integers(1, LONGEST - len(prompt))),
        seed=int(rng.integers(2**32)),
        mode=mode,
        k=int(rng.integers(1, K + 1)),
        tau=float(rng.choice([1.0, 0.5, 0.05, 3.0])),
        confidence=float(rng.choice([0.0, 0.3, 0.9])) if mode == "student" else 0.0,
        frequency_penalty=float(rng.choice([0.0, 0.0, 0.5])),
        end_ids=rng.choice(12, rng.integers(0, 3), replace=False).tolist(),
        **({} if mode == "student" else random_settings_of_a_teacher(rng)),
    )


def random_settings_of_a_teacher(rng):
    logprobs = rng.choice([None, 0, 3, 20])
    return {
        "top_k": int(rng.choice([0, 0, 1, 3, 100])),
        "top_p": float(rng.choice([1.0, 1.0, 0.3, 0.9])),
        "logit_bias": {int(token): float(rng.normal()) for token in rng.choice(13, rng.integers(0, 3), replace=False)},
        "logprobs": logprobs,
        "prompt_logprobs": bool(rng.integers(2)) and logprobs is not None,
    }


def check_logprobs(teacher, request, updates):
    """What updates told, against a full forward pass over the text."""
    if request.logprobs is None:
        assert all(update.logprobs is None and update.prompt_logprobs is None for update in updates)
        return
    of_prompts = [update.prompt_logprobs for update in updates if update.prompt_logprobs is not None]
    assert len(of_prompts) == request.prompt_logprobs
    text = [*request.prompt, *itertools.chain(*(update.tokens for update in updates))]
    expected_NxV = log_probabilities(teacher, text)
    first = 1 if request.prompt_logprobs else len(request.prompt)
    found = Logprobs.joined([*of_prompts, *(update.logprobs for update in updates)])
    tokens_N, expected_NxV = np.array(text[first:]), expected_NxV[first - 1 :]
    np.testing.assert_allclose(found.token_N, expected_NxV[np.arange(len(tokens_N)), tokens_N], atol=3e-4)
    alternatives = min(request.logprobs, 12)
    np.testing.assert_allclose(found.top_NxT, -np.sort(-expected_NxV)[:, :alternatives], atol=3e-4)
    assert found.top_ids_NxT.shape == (len(tokens_N), alternatives)
    theirs_NxT = np.take_along_axis(expected_NxV, found.top_ids_NxT, axis=1)
    np.testing.assert_allclose(found.top_NxT, theirs_NxT, atol=3e-4)
    if alternatives:
        is_likeliest = found.top_ids_NxT[:, 0] == tokens_N
        assert (found.token_N == found.top_NxT[:, 0])[is_likeliest].all()
