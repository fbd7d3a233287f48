"""The engine against step-by-step decoding, and what a request may and may not depend on."""

import dataclasses
import functools
import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrivals import LONGEST, K, check_logprobs, random_request, serve, serve_updates
from compiling import count_compilations
from step_by_step import decode_step_by_step, next_logits

from kforcing_jax.config import MeshConfig
from kforcing_jax.decoding import Engine, Request, generate, memory, programs, stream
from kforcing_jax.errors import ConfigError, DataError, RunError
from kforcing_jax.interop.official import in_order
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM, cache, cached, init_params
from kforcing_jax.noise import CdfOrder
from kforcing_jax.sharding import make_mesh, parameter_shardings


@pytest.fixture(scope="module")
def engine(student, teacher):
    """One for all tests: what a slot held before is part of what they test."""
    return Engine(student=student, teacher=teacher, slots=3, max_length=LONGEST, k=K)


@pytest.fixture(scope="module")
def warm(student, teacher):
    """One for longer texts, all of whose programs are compiled."""
    engine, told = Engine(student=student, teacher=teacher, slots=5, max_length=120, k=2), []
    engine.warm_up(told=lambda key, seconds: told.append((key, seconds)))
    assert {("run", "ar", 192), ("insert",), ("prefill", "teacher", "one", 64, 192, True)} <= {key for key, _ in told}
    assert all(seconds > 0 for _, seconds in told)
    return engine


@pytest.mark.parametrize("seed", range(3))
def test_requests_that_come_and_go_are_decoded_as_step_by_step(engine, student, teacher, seed):
    rng = np.random.default_rng(seed)
    requests = [random_request(rng) for _ in range(12)]
    for request, updates in zip(requests, serve_updates(engine, requests, rng), strict=True):
        expected = decode_step_by_step(request, student=student, teacher=teacher, k=K)
        assert list(itertools.chain(*(update.tokens for update in updates))) == expected.tokens, request
        passes = {"student": expected.student_passes, "teacher": expected.teacher_passes}
        assert updates[-1].passes == passes, request
        assert updates[-1].kept == tuple(sum(kept > j for kept in expected.kept) for j in range(K + 1)), request
        check_logprobs(teacher, request, updates)


def test_a_request_is_the_same_to_the_bit_alone_in_a_crowd_and_in_any_order(engine):
    rng = np.random.default_rng(7)
    requests = [random_request(rng) for _ in range(6)]
    alone = [serve(engine, [request])[0][0] for request in requests]
    assert serve(engine, requests)[0] == alone
    assert serve(engine, requests[::-1])[0] == alone[::-1]
    assert serve(engine, requests, rng)[0] == alone


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tau": 0.3},
        {"tau": 20.0},
        {"frequency_penalty": 0.7},
        {"top_p": 0.7},
        {"top_k": 3, "tau": 2.0, "logit_bias": {2: -100.0, 5: 1.0}},
    ],
)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_exact_decoding_is_the_ar_sample_of_that_seed(engine, k, settings):
    prompts = [[3, 1, 4], [1], [2, 7, 1, 8, 2, 8]]
    requests = [Request(p, 30, seed=11 * k + i, mode="ar", **settings) for i, p in enumerate(prompts)]
    exact = [dataclasses.replace(request, mode="exact", k=k) for request in requests]
    assert serve(engine, exact)[0] == serve(engine, requests)[0]


def test_exact_decoding_needs_no_good_student(teacher, student):
    """Drafts of an untrained one cost time, those of the teacher's own draws save it; the text is the same."""
    model = PushForwardLM(teacher[0].cfg)
    untrained = model, init_params(model, jax.random.key(5))
    engine = Engine(student=untrained, teacher=teacher, slots=2, max_length=LONGEST, k=K)
    requests = [Request([3, 1], 30, seed=seed, mode="ar") for seed in range(2)]
    exact = [dataclasses.replace(request, mode="exact") for request in requests]
    assert serve(engine, exact)[0] == serve(engine, requests)[0]


def test_exact_samples_have_the_teachers_distribution(student, teacher):
    """G-test of blocks of two tokens against the teacher's own joint, in f64; 132 degrees of freedom."""
    prompt, samples = [3, 1], 3000
    decoded = generate(
        *student, [prompt] * samples, max_new_tokens=2, seeds=range(samples), mode="exact", teacher=teacher, k=2
    )
    first_V = softmax(next_logits(teacher, prompt), 9)
    joint_VxV = np.stack([p * softmax(next_logits(teacher, [*prompt, v]), 9) for v, p in enumerate(first_V)])
    counts_VxV = np.zeros_like(joint_VxV)
    np.add.at(counts_VxV, tuple(decoded.tokens[:, 2:].T), 1)
    seen = counts_VxV > 0
    assert joint_VxV[seen].min() > 0
    g = 2 * (counts_VxV[seen] * np.log(counts_VxV[seen] / samples / joint_VxV[seen])).sum()
    assert g < 220  # 1e-6 of the exact distribution's samples


def softmax(logits_V, mask_id):
    weights_V = np.exp(np.float64(logits_V) - np.max(logits_V))
    weights_V[mask_id] = 0
    return weights_V / weights_V.sum()


def test_a_stream_gives_the_same_tokens_as_they_come(student, teacher):
    prompt = [4, 2, 4]
    whole = generate(*student, [prompt], max_new_tokens=11, seeds=[6], k=4, confidence=0.2)
    blocks = list(stream(*student, prompt, max_new_tokens=11, seed=6, k=4, confidence=0.2))
    assert len(blocks) == whole.passes[0] and list(itertools.chain(*blocks)) == whole.tokens[0, 3:].tolist()
    exact = stream(*student, prompt, max_new_tokens=11, seed=6, k=4, mode="exact", teacher=teacher)
    ar = generate(*teacher, [prompt], max_new_tokens=11, seeds=[6])
    assert list(itertools.chain(*exact)) == ar.tokens[0, 3:].tolist()


def test_confidence_0_is_the_fixed_stride_and_1_takes_more_passes(engine):
    request = Request([5, 3], 32, seed=1)
    (fixed, cautious), passes = serve(engine, [request, dataclasses.replace(request, confidence=1.0)])
    assert len(fixed) == len(cautious) == 32
    assert passes[0]["student"] == 8 < passes[1]["student"]


ASKS = {"top_p": 0.8, "top_k": 5, "logit_bias": {3: 1.0}, "logprobs": 2, "prompt_logprobs": True}


def test_nothing_compiles_after_warm_up(warm):
    rng = np.random.default_rng(3)
    with count_compilations() as compiled:
        for size, modes in enumerate((["ar"], ["student", "exact"], ["student", "ar", "exact"]), start=1):
            prompts = rng.integers(0, 12, (size, 29 * size))
            rows = zip(prompts, modes, strict=True)
            requests = [Request(p, 4 * size, mode=m, k=1 + size % 2) for p, m in rows]
            asking = [dataclasses.replace(r, **ASKS) for r in requests if r.mode != "student"]
            serve(warm, [*requests, *asking], rng)
            serve(warm, [*asking, *asking])
    assert compiled == []


@pytest.mark.parametrize("mode", ["ar", "exact"])
@pytest.mark.parametrize("length", [1, 2, 17, 100])
def test_log_probabilities_are_those_of_a_full_forward_pass(warm, teacher, mode, length):
    rng = np.random.default_rng(length)
    prompts = rng.integers(0, 13, (3, length)).tolist()
    settings = [{"logprobs": 12, "prompt_logprobs": True}, {"logprobs": 1, "top_k": 1, "tau": 0.5}, {}]
    requests = [Request(p, 15, seed=7, mode=mode, **s) for p, s in zip(prompts, settings, strict=True)]
    for request, updates in zip(requests, serve_updates(warm, requests, rng), strict=True):
        check_logprobs(teacher, request, updates)
    together = [dataclasses.replace(requests[0], prompt=prompt) for prompt in prompts]
    for request, updates in zip(together, serve_updates(warm, together), strict=True):
        check_logprobs(teacher, request, updates)


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_a_running_text_for_either(warm):
    """One chunk a step: the long prompt takes two for each of its models, the short one a single one."""
    rng = np.random.default_rng(1)
    running = Request([3, 1], 40, mode="ar", seed=1)
    long = Request(rng.integers(0, 12, 110).tolist(), 8, mode="exact", seed=2)
    short = Request(rng.integers(0, 12, 10).tolist(), 8, mode="ar", seed=3)
    alone = [serve(warm, [request])[0][0] for request in (running, long, short)]
    slots = [warm.insert(running)]
    warm.step(passes=1)
    slots += [warm.insert(long), warm.insert(short)]
    tokens, first = {slot: [] for slot in slots}, {}
    for step in range(40):
        for update in warm.step(passes=1, chunks=1):
            if update.tokens:
                first.setdefault(update.slot, step)
            tokens[update.slot] += update.tokens
    assert [first[slot] for slot in slots] == [0, 4, 2]
    assert [tokens[slot] for slot in slots] == [alone[0][1:], *alone[1:]]


def test_a_request_that_is_dropped_while_its_prompt_is_read_leaves_no_trace(warm):
    rng = np.random.default_rng(2)
    long = Request(rng.integers(0, 12, 110).tolist(), 8, mode="exact", seed=2, **ASKS)
    others = [Request([5, 2], 20, mode=mode, seed=4, **ASKS) for mode in ("ar", "exact")]
    alone = [serve(warm, [request])[0][0] for request in others]
    kept, slot = warm.insert(others[0]), warm.insert(long)
    before = warm.step(passes=1, chunks=1)
    assert [(update.slot, len(update.tokens)) for update in before] == [(kept, 1), (slot, 0)]
    assert not before[1].is_finished
    assert warm.step(passes=0, chunks=1)[1].prompt_logprobs is None
    warm.free(slot)
    assert warm.insert(others[1]) == slot
    after = {update.slot: update for update in warm.step()}
    assert [before[0].tokens + after[kept].tokens, after[slot].tokens] == alone
    assert len(after[slot].prompt_logprobs.token_N) == 1
    assert warm.free_slots == warm.slots


def test_a_second_call_of_generate_compiles_nothing(student, teacher):
    rng = np.random.default_rng(0)

    def call(batch, length, new, **settings):
        prompts = rng.integers(0, 12, (batch, length))
        return generate(*student, prompts, max_new_tokens=new, seeds=range(batch), k=3, **settings)

    call(4, 5, 9)
    call(4, 5, 9, mode="exact", teacher=teacher)
    with count_compilations() as compiled:
        call(3, 90, 20)
        call(2, 1, 100, mode="exact", teacher=teacher, tau=0.5, frequency_penalty=0.1)
        call(4, 30, 7, confidence=0.4, eos_id=3)
    assert compiled == []


def test_attention_over_a_part_of_the_caches_gives_the_same_tokens(student, teacher, monkeypatch):
    """As on accelerators, where it ends at the longest text: also for a text that was long when another one came."""
    for module in (cache, programs):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    engine = Engine(student=student, teacher=teacher, slots=2, max_length=250, k=K)
    assert engine.programs.lives == [128, 256, 320]
    rng = np.random.default_rng(2)
    long = Request(rng.integers(0, 12, 140).tolist(), 100, seed=1)
    short = [Request(rng.integers(0, 12, 20).tolist(), 12, seed=s, mode=m) for s, m in ((2, "exact"), (3, "student"))]
    tokens, slot = {}, engine.insert(long)
    for step in range(40):
        if step in (2, 15):
            engine.insert(short[step // 15])
            unread = int(engine._state.slots.cached_B["student"][slot])
            engine.step(passes=0)  # reads the new prompt, and nothing of the long text
            assert engine._state.slots.cached_B["student"][slot] == unread
        for update in engine.step(passes=1):
            tokens.setdefault((update.slot == slot, update.slot != slot and step >= 15), []).extend(update.tokens)
    expected = [decode_step_by_step(r, student=student, teacher=teacher, k=K)[0] for r in (long, *short)]
    assert [tokens[True, False], tokens[False, False], tokens[False, True]] == expected


def test_a_dropped_request_frees_its_slot_and_changes_no_other(engine):
    kept, dropped = Request([4, 2], 30, seed=8), Request([9], 30, seed=9)
    alone = serve(engine, [kept])[0][0]
    slot, other = engine.insert(kept), engine.insert(dropped)
    tokens = []
    for update in engine.step(passes=2):
        tokens += update.tokens if update.slot == slot else []
    engine.free(other)
    assert engine.free_slots == 2
    for update in engine.step():
        assert update.slot == slot
        tokens += update.tokens
    assert tokens == alone


def test_a_request_of_logits_that_are_no_numbers_stops_alone(student):
    model, params = student
    table = params["backbone"]["embedding"]["embedding"].at[7].set(jnp.nan)
    damaged = params | {"backbone": params["backbone"] | {"embedding": {"embedding": table}}}
    prompts = [[3, 1], [7, 1], [2]]
    sound = [Request(p, 12, seed=i, end_ids=(7,)) for i, p in enumerate(prompts)]
    engine = Engine(student=(model, damaged), slots=3, max_length=LONGEST, k=K)
    alone = [serve(engine, [request])[0][0] for request in (sound[0], sound[2])]
    slots = [engine.insert(request) for request in sound]
    updates = {update.slot: update for update in engine.step()}
    assert "not finite" in str(updates[slots[1]].error) and updates[slots[1]].is_finished
    assert [updates[slot].tokens for slot in (slots[0], slots[2])] == alone
    # And whoever has its slot next.
    assert [serve(engine, [sound[0]] * 3)[0][i] for i in range(3)] == [alone[0]] * 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": 5}, "k = 5 exceeds the window of 4 tokens"),
        ({"k": 0}, "k = 0"),
        ({"max_new_tokens": 39}, "a prompt of 2 tokens and 39 new ones exceed the 40 positions of a slot"),
        ({"prompt": [1] * 41}, "a prompt of 41 tokens"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [13]}, "prompt has 13"),
        ({"confidence": 1.5}, r"confidence = 1.5 is not in \[0, 1\]"),
        ({"confidence": float("nan")}, "confidence = nan"),
        ({"confidence": 0.5, "mode": "exact"}, "confidence = 0.5 has no effect in mode 'exact'"),
        ({"mode": "fast"}, "mode = 'fast' is not one of student, ar, exact"),
        ({"end_ids": list(range(9))}, "end_ids has 9 ids"),
        ({"seed": 2**32}, "seed has 4294967296"),
        ({"tau": 0.0}, "tau = 0.0"),
        ({"noise": [0.5]}, r"noise has shape \(1,\), expected \(5,\)"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty = inf"),
        ({"frequency_penalty": 1e39}, "frequency_penalty = 1e\\+39 should be a finite number, of at most 1e"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens = nan should be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens = True"),
        ({"max_new_tokens": "5"}, "max_new_tokens = '5'"),
        ({"k": 2.5}, "k = 2.5 should be a whole number"),
        ({"tau": "1"}, "tau = '1' should be one number"),
        ({"tau": None}, "tau = None"),
        ({"tau": [1.0]}, "tau = "),
        ({"prompt": [[1], [1, 2]]}, "prompt should be a list of integers"),
        ({"noise": [[0.1], [0.1, 0.2]]}, "noise should be an array"),
        ({"mode": ["ar"]}, "mode = "),
        ({"end_ids": [13]}, "end_ids has 13"),
        ({"mode": "ar", "top_p": 0.0}, r"top_p = 0.0 is not in \(0, 1\]"),
        ({"mode": "ar", "top_p": "1"}, r"top_p = '1' is not in"),
        ({"mode": "ar", "top_k": -1}, "top_k = -1 should be a whole number, at least 1, or 0 for all"),
        ({"mode": "ar", "top_k": True}, "top_k = True"),
        ({"mode": "ar", "logit_bias": {13: 1.0}}, r"logit_bias has 13, which is not in \[0, 13\)"),
        ({"mode": "ar", "logit_bias": {"1": 1.0}}, "logit_bias should be a list of integers"),
        ({"mode": "ar", "logit_bias": {1: 101}}, "logit_bias has 101 for 1; expected a number from -100 to 100"),
        ({"mode": "ar", "logit_bias": [1]}, r"logit_bias = \[1\] should be numbers by token id"),
        ({"mode": "ar", "logprobs": 21}, "logprobs = 21 should be a whole number from 0 to 20"),
        ({"mode": "ar", "logprobs": True}, "logprobs = True"),
        ({"mode": "ar", "prompt_logprobs": True}, "prompt_logprobs = True needs logprobs"),
        ({"mode": "ar", "prompt_logprobs": 1}, "prompt_logprobs = 1 should be True or False"),
        ({"top_p": 0.9}, "top_p = 0.9 is not possible in mode 'student'; modes ar and exact can"),
        ({"top_k": 2}, "top_k = 2 is not possible in mode 'student'"),
        ({"logit_bias": {1: 1.0}}, "logit_bias = {1: 1.0} is not possible in mode 'student'"),
        ({"logprobs": 0}, "logprobs = 0 is not possible in mode 'student'"),
    ],
)
def test_bad_requests_are_refused_before_they_have_a_slot(engine, change, says):
    free = engine.free_slots
    with pytest.raises((DataError, ConfigError), match=says):
        engine.insert(Request(**{"prompt": [1, 2], "max_new_tokens": 5} | change))
    assert engine.free_slots == free


def test_more_requests_than_slots_are_refused_and_those_that_run_go_on(engine):
    request = Request([4, 2], 6)
    for _ in range(3):
        engine.insert(request)
    with pytest.raises(DataError, match="all 3 slots are taken"):
        engine.insert(request)
    updates = engine.step()
    assert [update.is_finished for update in updates] == [True] * 3 and len({tuple(u.tokens) for u in updates}) == 1


def test_models_that_do_not_fit_are_refused(student, teacher):
    with pytest.raises(DataError, match=r"mode = 'exact' needs teacher=\(model, params\)"):
        Engine(student=student, k=2).insert(Request([1], 2, mode="exact"))
    other = CausalLM(dataclasses.replace(student[0].cfg, vocab_size=20))
    params = init_params(other, jax.random.key(0))
    with pytest.raises(DataError, match="the teacher has a vocabulary of 20 tokens, the student one of 13"):
        Engine(student=student, teacher=(other, params), k=2)
    with pytest.raises(DataError, match="an engine needs student"):
        Engine()
    with pytest.raises(DataError, match="slots = 0 should be a whole number"):
        Engine(student=student, slots=0)
    with pytest.raises(DataError, match=r"slots = 2.5 should be a whole number"):
        Engine(student=student, slots=2.5)
    with pytest.raises(DataError, match=r"teacher should be \(CausalLM, params\)"):
        Engine(teacher=student)
    with pytest.raises(DataError, match=r"student should be \(PushForwardLM, params\)"):
        Engine(student=student[0])
    with pytest.raises(DataError, match="dtype = 'half' is not one of float32, bfloat16"):
        Engine(student=student, dtype="half")
    with pytest.raises(DataError, match="mode = 'fast' is not one of"):
        Engine(student=student).warm_up(["fast"])
    with pytest.raises(DataError, match=r"mode = 'ar' needs teacher=\(model, params\)"):
        Engine(student=student).warm_up(["ar"])
    with pytest.raises(DataError, match="chunks = -1 should be a whole number"):
        Engine(student=student).step(chunks=-1)
    with pytest.raises(DataError, match="slot -1 has no request"):
        Engine(student=student).free(-1)


def test_slots_that_do_not_fit_the_memory_are_refused_with_the_numbers(engine, student, monkeypatch):
    monkeypatch.setattr(memory, "bytes_left", lambda device: 100_000)
    small = Engine(student=student, slots=3, max_length=LONGEST, k=K)
    with pytest.raises(RunError, match=r"3 slots of 128 positions take 0.\d+ GB .* 0.00 GB are left .* would fit"):
        small.insert(Request([1], 2))


def test_slots_are_as_many_as_fit(student, teacher, monkeypatch):
    def engine_of(slots):
        return Engine(student=student, teacher=teacher, slots=slots, max_length=LONGEST, k=K)

    fits = engine_of(3)
    assert fits.memory.programs == 0
    leaves = jax.tree.leaves((student[1], teacher[1]))
    assert fits.memory.weights == sum(leaf.nbytes for leaf in leaves)
    needed = fits.memory.caches + max(fits.programs.temporary_bytes(*key) for key in fits.largest_programs(["ar"]))
    for left, slots in ((needed, 3), (needed - 1, 1)):
        monkeypatch.setattr(memory, "bytes_left", lambda device, left=left: left)
        assert memory.slots_that_fit(engine_of, 3, ["ar"]) == slots
    monkeypatch.setattr(memory, "bytes_left", lambda device: 10_000)
    with pytest.raises(RunError, match="1 slots of 128 positions take"):
        memory.slots_that_fit(engine_of, 3, ["ar"])


def test_memory_is_told_of_what_is_compiled_and_nothing_compiles_again(student, monkeypatch):
    """However many programs there are."""
    monkeypatch.setattr(programs, "_compiled", functools.lru_cache(maxsize=1)(programs._compiled.__wrapped__))
    engine = Engine(student=student, slots=1, max_length=LONGEST, k=K)
    engine.warm_up(["student"])
    monkeypatch.setattr(programs.Programs, "compiled", lambda *_: pytest.fail("compiled again"))
    assert engine.memory.programs > 0


@pytest.mark.parametrize("shape", [{"data": 2, "tensor": 2}, {"data": 1, "fsdp": 2, "tensor": 2}])
def test_a_mesh_gives_the_same_tokens(student, teacher, shape):
    mesh = make_mesh(MeshConfig(**shape), jax.devices()[:4])
    there = [(model, jax.device_put(params, parameter_shardings(params, mesh))) for model, params in (student, teacher)]
    rng = np.random.default_rng(5)
    requests = [random_request(rng) for _ in range(5)] + [Request([4, 2, 4], 9, mode="exact", **ASKS)]
    meshed = Engine(student=there[0], teacher=there[1], slots=3, max_length=LONGEST, k=K)
    assert meshed.slots == 4 and meshed.programs.mesh is mesh
    for request, updates in zip(requests, serve_updates(meshed, requests, rng), strict=True):
        expected = decode_step_by_step(request, student=student, teacher=teacher, k=K)
        assert list(itertools.chain(*(update.tokens for update in updates))) == expected.tokens
        check_logprobs(teacher, request, updates)


@pytest.mark.parametrize("mode", ["student", "ar", "exact"])
def test_caches_are_not_copied(mode):
    """In bytes: what a program needs besides its arguments is a small part of the caches."""
    cfg = ModelConfig(vocab_size=64, mask_id=63, num_layers=4, d_model=64, num_heads=2)
    models = {"student": PushForwardLM(cfg), "teacher": CausalLM(cfg)}
    pairs = {name: (model, init_params(model, jax.random.key(0))) for name, model in models.items()}
    engine = Engine(**pairs, slots=4, max_length=448, k=K)
    live = engine.programs.lives[-1]
    caches = sum(
        x.nbytes if hasattr(x, "nbytes") else x.size * 4 for x in jax.tree.leaves(engine.programs.state.caches)
    )
    used = 1 if mode == "exact" else 2
    assert engine.programs.temporary_bytes("run", mode, live) < 0.3 * caches / used


def test_half_precision_is_that_of_the_blocks_alone(student):
    engine = Engine(student=student, slots=1, max_length=LONGEST, k=K, dtype="bfloat16")
    dtypes = {str(x.dtype) for x in jax.tree.leaves(engine.programs.state.caches)}
    weights = engine.weights["student"]
    kernels = {str(block["mlp_in"]["kernel"].dtype) for block in weights.blocks}
    assert dtypes == kernels == {"bfloat16"}
    assert weights.head_VxD.dtype == weights.rest["noise_encoder"]["mlp_in"]["kernel"].dtype == jnp.float32
    assert len(serve(engine, [Request([1, 2], 12)])[0][0]) == 12


def test_other_slots_need_no_parameters(student):
    request, params = Request([1, 2], 12, seed=3), jax.tree.map(jnp.copy, student[1])
    one = Engine(student=(student[0], params), slots=1, max_length=LONGEST, k=K)
    one.insert(request)
    stacked = weakref.ref(params["backbone"]["blocks"]["mlp_in"]["kernel"])
    del params
    more = one.with_slots(3)
    assert stacked() is None and more.weights is one.weights and (one.free_slots, more.free_slots) == (0, 3)
    assert serve(more, [request] * 3)[0] == serve(one.with_slots(1), [request])[0] * 3
    with pytest.raises(DataError, match="slots = 0"):
        one.with_slots(0)


def test_weights_of_other_parameters_are_others(tiny_config):
    """Also where they share most arrays, and live where others were."""
    params = init_params(PushForwardLM(tiny_config), jax.random.key(9))
    kernel = params["backbone"]["output"]["kernel"]
    for scale in range(1, 12):
        output = params["backbone"]["output"] | {"kernel": jnp.ones_like(kernel) * scale}
        changed = params | {"backbone": params["backbone"] | {"output": output}}
        assert float(cached.weights(tiny_config, changed).head_VxD[0, 0]) == scale
        del output, changed


def test_another_order_of_tied_embeddings_has_another_output_layer(tiny_config):
    """`in_order` gives the same arrays, as these are in vocabulary order in any case."""
    model = CausalLM(dataclasses.replace(tiny_config, tied_embeddings=True))
    params = init_params(model, jax.random.key(9))
    shuffled, same = in_order(model, params, CdfOrder.shuffled(13, 5))
    embedding_VxD = params["backbone"]["embedding"]["embedding"]
    assert same["backbone"]["embedding"]["embedding"] is embedding_VxD
    for cfg in (model.cfg, shuffled.cfg):
        np.testing.assert_array_equal(cached.weights(cfg, params).head_VxD, cfg.ordered_rows(embedding_VxD))


def test_weights_are_cast_once_and_forgotten_with_the_parameters(tiny_config):
    # Copies: Flax may hold what it has initialised until the next collection of garbage.
    params = jax.tree.map(jnp.copy, init_params(PushForwardLM(tiny_config), jax.random.key(9)))
    before = set(cached._MADE)  # of which some may be forgotten meanwhile
    assert cached.weights(tiny_config, params) is cached.weights(tiny_config, params)
    (key,) = set(cached._MADE) - before
    del params
    assert key not in cached._MADE
