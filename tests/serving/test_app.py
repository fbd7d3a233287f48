"""The HTTP side, as clients see it, on an engine without a model."""

import json

import httpx
import openai
import pytest
from fake_engine import FakeEngine

from kforcing_jax.data.chat_template import ChatTemplate
from kforcing_jax.decoding import Request

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def expected(running, prompt, new, seed):
    """The text that the fake engine's tokens have."""
    request = Request(running.tokenizer.encode_prompt(prompt), new, seed=seed, end_ids=(running.tokenizer.eos_id,))
    return running.tokenizer.decode(running.engine.expected(request))


def events(running, path="/v1/completions", **fields):
    """The decoded events of a stream, the last one as it is."""
    with httpx.stream("POST", running.url + path, json=fields | {"stream": True}, timeout=30) as response:
        lines = [line for line in response.iter_lines() if line]
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.fixture
def running(start):
    return start()


@pytest.fixture
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def test_the_openai_client_gets_texts_usage_and_passes(running, client):
    answer = client.completions.create(model="fake", prompt="hello", max_tokens=8, seed=3)
    assert answer.choices[0].text == expected(running, "hello", 8, 3)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 8, 13)
    assert (
        answer.usage.passes == 4 and answer.object == "text_completion" and answer.choices[0].finish_reason == "length"
    )


def test_a_stream_joins_to_the_plain_answer(running, client):
    plain = client.completions.create(model="fake", prompt="hello", max_tokens=20, seed=5)
    stream = client.completions.create(
        model="fake", prompt="hello", max_tokens=20, seed=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == plain.choices[0].text
    assert chunks[-1].usage == plain.usage and not chunks[-1].choices
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]


def test_every_prompt_has_n_choices_in_order_with_seeds_that_count_up(running):
    answer = running.post(prompt=["ab", "cd"], n=3, max_tokens=6, seed=2**32 - 1).json()
    seeds = [2**32 - 1, 0, 1]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["seed"] for choice in answer["choices"]] == seeds * 2
    texts = [expected(running, prompt, 6, seed) for prompt in ("ab", "cd") for seed in seeds]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert answer["usage"]["completion_tokens"] == 36 and answer["usage"]["prompt_tokens"] == 4


def test_a_batch_is_streamed_with_the_index_of_every_choice(running):
    plain = running.post(prompt=["ab", "cd"], max_tokens=9, seed=1).json()
    texts = ["", ""]
    for event in events(running, prompt=["ab", "cd"], max_tokens=9, seed=1):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in plain["choices"]]


def test_prompts_may_be_ids_or_lists_of_them(running):
    ids = running.tokenizer.encode("hello")
    plain = running.post(prompt="hello", max_tokens=4, seed=1).json()["choices"][0]["text"]
    assert running.post(prompt=ids, max_tokens=4, seed=1).json()["choices"][0]["text"] == plain
    lists = running.post(prompt=[ids, ids], max_tokens=4, seed=1).json()["choices"]
    assert [choice["text"] for choice in lists] == [plain, plain]


def test_a_seed_that_is_not_given_is_told_and_gives_the_same_text_again(running):
    first, second = (running.post(prompt="x", max_tokens=12).json()["choices"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    assert running.post(prompt="x", max_tokens=12, seed=first["seed"]).json()["choices"][0]["text"] == first["text"]


def test_max_tokens_is_by_default_the_room_that_is_left(running):
    usage = running.post(prompt="hello", seed=1, ignore_eos=True).json()["usage"]
    assert usage["total_tokens"] == running.engine.max_length


def test_a_prompt_comes_back_with_echo_and_nothing_is_drawn_without_tokens(running):
    assert (
        running.post(prompt="hello", max_tokens=4, seed=1, echo=True).json()["choices"][0]["text"].startswith("hello")
    )
    answer = running.post(prompt="hello", max_tokens=0, echo=True).json()
    assert answer["choices"][0]["text"] == "hello" and answer["usage"]["completion_tokens"] == 0
    streamed = events(running, prompt="hello", max_tokens=4, seed=1, echo=True)
    assert streamed[0]["choices"][0]["text"].startswith("hello")


@pytest.mark.parametrize("at", range(1, 12))
def test_a_stop_string_ends_the_text_before_it_and_frees_the_slot(start, at):
    running = start(FakeEngine(slots=1, k=3))
    whole = expected(running, "hello", 20, 3)
    stop = whole[at : at + 2]
    plain = running.post(prompt="hello", max_tokens=20, seed=3, stop=["never this", stop]).json()
    cut = whole[: whole.find(stop)]
    assert plain["choices"][0]["text"] == cut and plain["choices"][0]["finish_reason"] == "stop"
    assert plain["usage"]["completion_tokens"] == len(cut) + 2
    streamed = events(running, prompt="hello", max_tokens=20, seed=3, stop=stop)
    assert "".join(event["choices"][0]["text"] for event in streamed) == cut
    running.wait_until(running.is_idle)


def test_ids_end_texts_unless_they_are_ignored(running):
    whole = running.engine.expected(Request(running.tokenizer.encode("hi"), 20, seed=4))
    answer = running.post(prompt="hi", max_tokens=20, seed=4, stop_token_ids=[whole[6]]).json()
    first = whole.index(whole[6])
    assert answer["choices"][0]["text"] == running.tokenizer.decode(whole[:first])
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", first + 1)


def test_model_names_choose_modes(running, client):
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == ["fake", "fake:student", "fake:ar", "fake:exact"]
    assert listed["fake:ar"].mode == "ar" and listed["fake"].max_model_len == 32 and listed["fake"].k == 2
    assert client.models.retrieve("fake:exact").mode == "exact"
    for name, mode in (("fake", "student"), ("fake:ar", "ar"), ("fake:exact", "exact")):
        client.completions.create(model=name, prompt="a", max_tokens=2)
        assert running.engine.inserted[-1].mode == mode
    client.completions.create(model="fake", prompt="a", max_tokens=2, extra_body={"mode": "ar"})
    assert running.engine.inserted[-1].mode == "ar"


def test_what_a_request_asks_for_reaches_the_engine(running):
    fields = dict(mode="ar", top_p=0.9, top_k=5, logit_bias={"7": 2.5}, temperature=0.5, frequency_penalty=0.25)
    assert running.post(prompt="a", max_tokens=3, seed=9, **fields).status_code == 200
    request = running.engine.inserted[-1]
    assert (request.top_p, request.top_k, request.logit_bias, request.tau) == (0.9, 5, {7: 2.5}, 0.5)
    assert (request.frequency_penalty, request.seed, request.max_new_tokens) == (0.25, 9, 3)
    assert running.post(prompt="a", max_tokens=3, confidence=0.3, k=1).status_code == 200
    assert (running.engine.inserted[-1].confidence, running.engine.inserted[-1].k) == (0.3, 1)


def test_temperature_0_is_the_likeliest_token_of_the_teacher(running):
    assert running.post(prompt="a", max_tokens=3, mode="exact", temperature=0, top_p=0.5).status_code == 200
    assert running.engine.inserted[-1].top_k == 1


def test_a_student_of_a_nucleus_takes_that_one_and_drafts_from_it_by_default(start):
    running = start(top_p=0.9, tau_range=(0.7, 0.7))
    # (mode, what is given, tau and top_p that the engine is asked for)
    for mode, given, expected in (
        ("student", {}, (0.7, 1.0)),  # its tokens are from the nucleus
        ("student", {"top_p": 0.9, "temperature": 0.7}, (0.7, 1.0)),
        ("exact", {}, (0.7, 0.9)),
        ("exact", {"top_p": 1, "temperature": 1}, (1.0, 1.0)),
        ("ar", {}, (0.7, 0.9)),  # so that `exact` is what it gives
        ("ar", {"top_p": 0.5, "temperature": 1}, (1.0, 0.5)),
    ):
        assert running.post(prompt="a", max_tokens=3, mode=mode, **given).status_code == 200
        asked = running.engine.inserted[-1]
        assert (asked.tau, asked.top_p) == expected, (mode, given)
    for top_p in (1, 0.8):
        error = running.post(prompt="a", max_tokens=3, top_p=top_p)
        assert error.status_code == 400 and error.json()["error"]["param"] == "top_p"
        message = f"top_p = {top_p} is none that the student was trained with (0.9), and its tokens are settled"
        assert error.json()["error"]["message"].startswith(message)
        assert error.json()["error"]["message"].endswith("mode ar or exact takes any")
    (model,) = (m for m in running.http.get(running.url + "/v1/models").json()["data"] if m["id"] == "fake")
    assert (model["tau"], model["temperature"], model["top_p"]) == ([0.7, 0.7], 0.7, 0.9)


def test_neutral_fields_of_other_servers_are_taken(running):
    fields = dict(
        repetition_penalty=1.0, best_of=1, min_p=0.0, presence_penalty=0, logit_bias=None, logprobs=None, user="me"
    )
    fields |= dict(
        suffix=None, top_p=1, top_k=-1, use_beam_search=False, skip_special_tokens=True, n=1, echo=False, stop=None
    )
    assert running.post(prompt="a", max_tokens=3, **fields).status_code == 200


REFUSED = {
    "a wrong type": (dict(max_tokens="ten"), "max_tokens", "'ten'"),
    "a fraction of a token": (dict(max_tokens=1.5), "max_tokens", "1.5"),
    "a boolean for a number": (dict(temperature=True), "temperature", "True"),
    "an unknown field": (dict(max_token=3), "max_token", "did you mean max_tokens?"),
    "no prompt": (dict(prompt=None), "prompt", "missing"),
    "no prompts": (dict(prompt=[]), "prompt", "text, token ids"),
    "an empty list of ids": (dict(prompt=[[]]), "prompt", "empty"),
    "mixed prompts": (dict(prompt=["a", [1]]), "prompt", "text, token ids"),
    "an id outside the vocabulary": (dict(prompt=[5, 98]), "prompt", "[0, 98)"),
    "a negative id": (dict(prompt=[-1]), "prompt", "-1"),
    "text outside the vocabulary": (dict(prompt="é"), "prompt", "U+00E9"),
    "half of a surrogate pair": (dict(prompt="a\ud800"), "prompt", "U+D800"),
    "more than the context": (dict(max_tokens=32), "max_tokens", "context of 32"),
    "a prompt of the whole context": (dict(prompt="a" * 32), "prompt", "context of 32"),
    "a prompt of a megabyte": (dict(prompt="a" * 10**6), "prompt", "1,000,000 characters"),
    "too many choices": (dict(n=129), "n", "128"),
    "no choice": (dict(n=0), "n", "1"),
    "too many texts": (dict(prompt=["a"] * 33, n=2), "n", "64"),
    "a window that is too large": (dict(k=3), "k", "window of 2"),
    "a window of nothing": (dict(k=0), "k", "1"),
    "a window of a teacher": (dict(k=2, mode="ar"), "k", "no effect in mode ar"),
    "an unknown mode": (dict(mode="fast"), "mode", "'student', 'ar' or 'exact'"),
    "a confidence that is none": (dict(confidence=1.5), "confidence", "1"),
    "a confidence of a teacher": (dict(confidence=0.5, mode="exact"), "confidence", "no effect"),
    "top_p of a student": (dict(top_p=0.9), "top_p", "trained with (1)"),
    "top_k of a student": (dict(top_k=5), "top_k", "mode ar or exact can"),
    "logprobs of a student": (dict(logprobs=1), "logprobs", "mode ar or exact can"),
    "logit_bias of a student": (dict(logit_bias={"5": 1}), "logit_bias", "mode ar or exact can"),
    "a bias of a number that is none": (dict(logit_bias={"9" * 5000: 1}, mode="ar"), "logit_bias", "no token id"),
    "two ways to write an id": (dict(logit_bias={" 1": 1, "1": 2}, mode="ar"), "logit_bias", "' 1'"),
    "a name that is no text": ({"a\ud800": 1}, "a\\ud800", "no field"),
    "a bias of what is no id": (dict(logit_bias={"x": 1}, mode="ar"), "logit_bias", "'x'"),
    "a temperature that it was not trained with": (dict(temperature=0.5), "temperature", "mode ar or exact takes any"),
    "no temperature": (dict(temperature=0), "temperature", "trained with (1)"),
    "a negative temperature": (dict(temperature=-1), "temperature", "-1"),
    "a temperature that is no number": (dict(temperature=float("inf"), mode="ar"), "temperature", "finite"),
    "a seed that is too large": (dict(seed=2**64), "seed", str(2**64)),
    "a penalty that is too large": (dict(frequency_penalty=3), "frequency_penalty", "2"),
    "an empty stop string": (dict(stop=""), "stop", "1 character"),
    "too many stop strings": (dict(stop=["x"] * 17), "stop", "16"),
    "what is not supported": (dict(repetition_penalty=1.2), "repetition_penalty", "not supported"),
    "best of several": (dict(best_of=3), "best_of", "not supported"),
    "an option of a stream without one": (
        dict(stream_options={"include_usage": True}),
        "stream_options",
        "without stream",
    ),
}


@pytest.fixture(scope="module")
def shared(module_start):
    return module_start()


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_field_is_refused_by_name_in_openais_shape(shared, case):
    fields, param, words = REFUSED[case]
    body = json.dumps({"prompt": "a", "max_tokens": 4} | fields)
    response = httpx.post(f"{shared.url}/v1/completions", content=body)
    assert response.status_code == 400, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param and words in error["message"] and param in error["message"]
    assert shared.is_idle() and not shared.engine.inserted


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "JSON object"),
        (b'"text"', "JSON object"),
        (b"null", "JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "finite"),
    ],
)
def test_a_body_that_is_no_request_is_refused(shared, body, words):
    response = httpx.post(f"{shared.url}/v1/completions", content=body)
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_a_body_that_is_too_large_is_refused_unread(shared):
    response = httpx.post(f"{shared.url}/v1/completions", content=b" " * (8 * 2**20 + 1))
    assert response.status_code == 413 and response.json()["error"]["type"] == "invalid_request_error"
    chunks = httpx.post(f"{shared.url}/v1/completions", content=iter([b" " * 2**20] * 9))
    assert chunks.status_code == 413


def test_other_paths_methods_and_models_are_not_found_in_the_same_shape(shared):
    assert httpx.get(f"{shared.url}/v1/nothing").json()["error"]["message"] == "there is nothing at /v1/nothing"
    assert httpx.get(f"{shared.url}/v1/completions").status_code == 405
    unknown = shared.post(prompt="a", model="gpt-4")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
    assert "fake:exact" in unknown.json()["error"]["message"]
    assert httpx.get(f"{shared.url}/v1/models/gpt-4").status_code == 404
    contradiction = shared.post(prompt="a", model="fake:ar", mode="exact")
    assert contradiction.status_code == 400 and contradiction.json()["error"]["param"] == "mode"


def test_a_model_without_a_chat_template_says_so(shared):
    response = shared.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert response.status_code == 404 and "no chat template" in response.json()["error"]["message"]


def test_chats_go_through_the_template(start):
    running = start(FakeEngine(max_length=80), chat_template=ChatTemplate(TEMPLATE))
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
    messages = [{"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(model="fake", messages=messages, max_completion_tokens=6, seed=2)
    text = expected(running, "<user>hi</>>", 6, 2)
    assert answer.choices[0].message.content == text and answer.choices[0].message.role == "assistant"
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    stream = client.chat.completions.create(model="fake", messages=parts, max_tokens=6, seed=2, stream=True)
    chunks = [chunk.choices[0].delta for chunk in stream]
    assert chunks[0].role == "assistant" and "".join(delta.content or "" for delta in chunks) == text
    again = [*messages, answer.choices[0].message, {"role": "user", "content": "more"}]
    second = client.chat.completions.create(model="fake", messages=again, max_tokens=3, seed=2)
    assert second.usage.prompt_tokens == len(f"<user>hi</><assistant>{text}</><user>more</>>")
    image = running.post("/v1/chat/completions", messages=[{"role": "user", "content": [{"type": "image_url"}]}])
    assert image.status_code == 400 and image.json()["error"]["param"] == "messages"


def test_without_a_tokenizer_ids_go_in_and_out(start):
    running = start(tokenizer=None)
    answer = running.post(prompt=[5, 6], max_tokens=3, seed=1).json()["choices"][0]["text"]
    assert answer == "".join(f" {i}" for i in running.engine.expected(Request([5, 6], 3, seed=1)))
    assert running.post(prompt="text").json()["error"]["param"] == "prompt"
    assert running.post(prompt=[5], stop="x").json()["error"]["param"] == "stop"


def test_a_key_guards_the_api_and_is_told_nowhere(start, capfd):
    running = start(api_key="secret-key")
    for headers in ({}, {"Authorization": "Bearer wrong-key"}, {"Authorization": "Basic secret-key"}):
        for path in ("/v1/models", "/v1/models/fake"):
            refused = httpx.get(running.url + path, headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        response = httpx.post(f"{running.url}/v1/completions", json={"prompt": "a"}, headers=headers)
        assert response.status_code == 401 and "key" in response.json()["error"]["message"]
        assert response.json()["error"]["type"] == "authentication_error"
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret-key")
    assert client.completions.create(model="fake", prompt="secret text", max_tokens=2).choices
    for path in ("/health", "/metrics", "/"):
        response = httpx.get(running.url + path)
        assert response.status_code == 200 and "secret" not in response.text
    written = "".join(capfd.readouterr())
    assert not any(word in written for word in ("secret", "wrong-key"))


def test_metrics_count_what_was_served(start):
    running = start(FakeEngine(k=2))
    running.post(prompt="hello", max_tokens=8, seed=1, mode="exact", ignore_eos=True)
    running.post(prompt="hello", max_tokens=99)
    lines = dict(
        line.rsplit(" ", 1) for line in httpx.get(f"{running.url}/metrics").text.splitlines() if line[0] != "#"
    )
    for name, value in {
        'vllm:generation_tokens_total{model_name="fake"}': 8,
        'vllm:prompt_tokens_total{model_name="fake"}': 5,
        'vllm:request_success_total{finished_reason="length",model_name="fake"}': 1,
        'kforcing:passes_total{model="student",model_name="fake"}': 4,
        'kforcing:request_errors_total{model_name="fake",status="400"}': 1,
        'vllm:spec_decode_num_drafts_total{model_name="fake"}': 4,
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="fake",position="0"}': 4,
        'vllm:time_to_first_token_seconds_count{model_name="fake"}': 1,
        'vllm:e2e_request_latency_seconds_count{model_name="fake"}': 1,
        'kforcing:tokens_per_pass_sum{mode="exact",model_name="fake"}': 2,
        'vllm:num_requests_running{model_name="fake"}': 0,
        'vllm:num_requests_waiting{model_name="fake"}': 0,
        'vllm:kv_cache_usage_perc{model_name="fake"}': 0.5,
    }.items():
        assert float(lines[name]) == value, name


def test_the_time_of_a_token_leaves_out_those_that_came_first_at_once(start):
    """Many tokens come with the first event: they took no time that anybody saw, and count for nothing."""
    running = start(FakeEngine(k=1, seconds=0.01))
    running.scheduler._seconds_per_pass = 0.004  # five passes a step, of 10 ms
    running.post(prompt="a", max_tokens=15, seed=1, ignore_eos=True)
    running.post(prompt="a", max_tokens=1, seed=1)
    lines = dict(
        line.rsplit(" ", 1) for line in httpx.get(f"{running.url}/metrics").text.splitlines() if line[0] != "#"
    )
    name = 'vllm:request_time_per_output_token_seconds_{}{{model_name="fake"}}'
    assert float(lines[name.format("count")]) == 1 and float(lines[name.format("sum")]) > 0.0019


def test_what_is_dropped_is_counted_with_what_it_cost(start):
    running = start(FakeEngine(slots=1, k=1, max_length=30_000, seconds=0.005))
    asked = dict(prompt="abc", max_tokens=29_000, stream=True, ignore_eos=True)
    with httpx.stream("POST", f"{running.url}/v1/completions", json=asked) as response:
        next(response.iter_lines())
    running.wait_until(running.is_idle)
    running.wait_until(
        lambda: 'finished_reason="abort",model_name="fake"} 1.0' in httpx.get(f"{running.url}/metrics").text
    )
    text = httpx.get(f"{running.url}/metrics").text
    assert 'vllm:prompt_tokens_total{model_name="fake"} 3.0' in text
    assert 'kforcing:passes_total{model="student",model_name="fake"} 0.0' not in text
