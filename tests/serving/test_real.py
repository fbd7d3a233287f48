"""The server on the engine: what comes out over HTTP is what the library gives, alone and in a crowd."""

import asyncio
import concurrent.futures
import random
import re
import threading

import httpx
import numpy as np
import openai
import pytest
import raw_http
from compiling import count_compilations

from kforcing_jax.decoding import Engine, Request, decode
from kforcing_jax.serving.scheduler import CHUNKS

SIZES = {"slots": 5, "max_length": 40, "k": 3}


@pytest.fixture(scope="module")
def models(push_forward_lm, causal_lm):
    return {"student": push_forward_lm, "teacher": causal_lm}


@pytest.fixture(scope="module")
def server(models, module_start):
    engine = Engine(**models, **SIZES)
    engine.warm_up()
    return module_start(engine, tokenizer=None, most_waiting=1024)


@pytest.fixture
def cases():
    """Requests of all kinds, by what `generate` is to be asked for the same texts."""
    numbers = random.Random(7)
    cases = []
    for number in range(24):
        mode = ("student", "ar", "exact")[number % 3]
        prompt = [numbers.randrange(9) for _ in range(numbers.randrange(1, 20))]
        fields = {"prompt": prompt, "seed": number, "mode": mode}
        fields |= {"max_tokens": numbers.randrange(1, 20), "frequency_penalty": numbers.choice([0.0, 0.5])}
        fields |= {"confidence": numbers.choice([0.0, 0.4])} if mode == "student" else {"temperature": 0.7}
        if mode != "student":
            asked = {"top_p": 0.8}, {"top_k": 3}, {"logit_bias": {"1": 2.0, "4": -100.0}}, {"logprobs": 2}, {}
            fields |= asked[number % len(asked)]
        cases.append(fields | ({} if mode == "ar" else {"k": numbers.randrange(1, 4)}))
    return cases


def expected(models, cases):
    """The texts of requests, each by itself, by the library."""
    engine, texts = Engine(**models, **SIZES), []
    for fields in cases:
        names = {"temperature": "tau", "max_tokens": "max_new_tokens"}
        asked = {names.get(name, name): value for name, value in fields.items()}
        asked["logit_bias"] = {int(token): bias for token, bias in fields.get("logit_bias", {}).items()}
        request = Request(**asked)
        texts += ["".join(f" {token}" for token in update.tokens) for _, update in decode(engine, [request])]
    return texts


def ask(server, fields):
    answer = httpx.post(f"{server.url}/v1/completions", json=fields, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_a_seed_gives_the_librarys_text_alone_and_in_a_crowd_and_nothing_compiles(server, models, cases):
    wanted = expected(models, cases)
    with count_compilations() as compiled:
        alone = [ask(server, fields)["text"] for fields in cases[:6]]
        with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
            crowd = list(pool.map(lambda fields: ask(server, fields)["text"], cases))
    assert alone == wanted[:6] and crowd == wanted and compiled == []
    server.wait_until(server.is_idle)


def test_a_thousand_who_hang_up_leave_no_trace_in_the_texts_of_others(server, models, cases, monkeypatch):
    """Of a hundred at a time the first fifty do before their texts can have ended: the engine waits for them."""
    wanted, numbers = expected(models, cases), random.Random(5)
    gate, step, gone = threading.Event(), server.engine.step, []
    monkeypatch.setattr(server.engine, "step", lambda *args, **how: gate.wait() and step(*args, **how))

    async def one(number):
        fields = cases[number % len(cases)]
        if number % 5 == 0:
            answer = await raw_http.ask(server.port, fields)
            return raw_http.whole(answer, stream=False) == wanted[number % len(cases)]
        most = SIZES["max_length"] - len(fields["prompt"])
        fields = fields | {"seed": 1000 + number, "stream": bool(number % 2), "max_tokens": most}
        gone.append(await raw_http.ask(server.port, fields, hang_up_after=numbers.random() * 0.1))
        if len(gone) % 100 == 50:
            gate.set()

    async def all_of_them():
        told = []
        for first in range(0, 1250, 125):
            gate.clear()
            told += await asyncio.gather(*(one(number) for number in range(first, first + 125)))
        return told

    try:
        told = asyncio.run(all_of_them())
    finally:
        gate.set()
    assert told.count(None) == 1000 and told.count(True) == 250
    server.wait_until(server.is_idle)
    text = httpx.get(f"{server.url}/metrics").text
    assert float(re.search(r'finished_reason="abort",model_name="fake"} ([\d.]+)', text)[1]) > 300


def test_log_probabilities_are_those_of_a_full_pass_over_prompt_and_text(server, models):
    model, params = models["teacher"]
    fields = {"prompt": [1, 2, 3, 4, 5], "max_tokens": 8, "seed": 2, "echo": True, "logprobs": 2}
    for mode in ("ar", "exact"):
        choice = ask(server, fields | {"mode": mode})
        ids = [int(token) for token in choice["text"].split()]
        logits_NxV = np.array(model.apply({"params": params}, np.array([ids]))[0], np.float64)
        logits_NxV[:, model.cfg.mask_id] = -np.inf
        log_NxV = logits_NxV - np.log(np.exp(logits_NxV).sum(-1, keepdims=True))
        scores = choice["logprobs"]
        assert scores["tokens"] == [str(token) for token in ids] and scores["token_logprobs"][0] is None
        for position, token in enumerate(ids[1:], start=1):
            assert scores["token_logprobs"][position] == pytest.approx(log_NxV[position - 1, token], abs=2e-4)
            best = max(scores["top_logprobs"][position].values())
            assert best == pytest.approx(log_NxV[position - 1].max(), abs=2e-4)
        text, offsets = choice["text"], scores["text_offset"]
        assert all(text[at:].split()[0] == word for at, word in zip(offsets, scores["tokens"], strict=True))


def test_an_evaluation_harness_scores_a_continuation_by_echo(server):
    """One token too many is asked for and dropped; a greedy continuation is known by equal values."""
    context = [1, 2, 3]
    request = {"model": "fake:ar", "max_tokens": 6, "temperature": 0, "seed": 1}
    greedy = [int(token) for token in ask(server, request | {"prompt": context})["text"].split()]
    request |= {"prompt": context + greedy, "max_tokens": 1, "logprobs": 1, "echo": True}
    scores = ask(server, request)["logprobs"]
    own, top = scores["token_logprobs"][3:-1], scores["top_logprobs"][3:-1]
    assert len(own) == len(greedy) and all(value == max(best.values()) for value, best in zip(own, top, strict=True))
    other = {**request, "prompt": [*context, *((token + 1) % 9 for token in greedy)]}
    scores = ask(server, other)["logprobs"]
    assert sum(scores["token_logprobs"][3:-1]) < sum(own)


def test_truncated_draws_are_within_what_is_left(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    for mode in ("ar", "exact"):
        one = [
            client.completions.create(
                model=f"fake:{mode}", prompt=[1, 2], max_tokens=10, seed=seed, extra_body={"top_k": 1}
            ).choices[0]
            for seed in range(4)
        ]
        assert len({choice.text for choice in one}) == 1
        banned = client.completions.create(
            model=f"fake:{mode}", prompt=[1, 2], max_tokens=30, seed=1, logit_bias={"4": -100, "5": -100}
        )
        assert not {"4", "5"} & set(banned.choices[0].text.split())


def test_a_long_prompt_does_not_hold_up_what_runs(models, module_start):
    """While a prompt of hundreds of tokens is read in parts, others get tokens with every step."""
    engine = Engine(**models, slots=2, max_length=1000, k=3)
    engine.warm_up(["student"])
    running = module_start(engine, tokenizer=None)
    steps, real = [], engine.step

    def step(*args, **settings):
        running.wait_until(lambda: steps or running.scheduler.waiting)  # the second one is there
        updates = real(*args, **settings)
        steps.append({update.slot: len(update.tokens) for update in updates})
        return updates

    engine.step = step
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, running, {"prompt": [1], "max_tokens": 600, "seed": 1, "confidence": 1})
        running.wait_until(lambda: running.scheduler.running)
        second = pool.submit(ask, running, {"prompt": [2] * 900, "max_tokens": 6, "seed": 2})
        first.result(), second.result()
    read = [tokens for tokens in steps if len(tokens) == 2 and 0 in tokens.values()]
    assert len(read) >= 900 // 64 // CHUNKS and all(max(tokens.values()) > 0 for tokens in read)
