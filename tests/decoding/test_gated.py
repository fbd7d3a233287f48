"""A gated student alone in an engine: three modes from one set of weights and one cache, exactness in one pass."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrivals import LONGEST, K, check_logprobs, random_request, serve, serve_updates
from compiling import count_compilations
from flax.traverse_util import flatten_dict
from step_by_step import Decoded, decode_step_by_step, penalised, softmax, uniforms, verified, window_logits

from kforcing_jax.config import MeshConfig
from kforcing_jax.decoding import Engine, Request, generate, programs, stream
from kforcing_jax.errors import DataError
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM, cache, cached, init_params
from kforcing_jax.models.gated import base_params, is_own, own_params, with_own
from kforcing_jax.noise import CdfOrder
from kforcing_jax.sharding import make_mesh, parameter_shardings

PAPERS = ModelConfig(vocab_size=13, mask_id=9, num_layers=2, d_model=16, num_heads=2, adapter_rank=3)
SHUFFLED = dataclasses.replace(PAPERS, cdf_order=CdfOrder.shuffled(13, 5))
LLAMA = ModelConfig(
    vocab_size=13,
    mask_id=9,
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    d_head=6,
    d_mlp=24,
    mlp="swiglu",
    norm="rms_norm",
    qk_norm=True,
    tied_embeddings=True,
    output_bias=False,
    sliding_window=7,
    adapter_rank=-1,
    cdf_order=CdfOrder.shuffled(13, 7),
)


@functools.cache
def gated(cfg=PAPERS):
    """(model, params) of random weights, deltas included."""
    model, rng = PushForwardLM(cfg), np.random.default_rng(0)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(1))
    return model, jax.tree.map(lambda x: 2 * x + 0.2 * rng.normal(size=x.shape).astype(np.float32), params)


def teacher(cfg=PAPERS):
    """(CausalLM, params) of the teacher, as if there was no student."""
    return CausalLM(dataclasses.replace(cfg, adapter_rank=0)), base_params(gated(cfg)[1])


@functools.cache
def engine(cfg=PAPERS, windows=None):
    """One for all tests: what a slot held before is part of what they test."""
    return engine_of(gated(cfg), windows)


def engine_of(student, windows=None, **more):
    """Engines of the same sizes share their programs."""
    return Engine(student=student, slots=3, max_length=LONGEST, k=K, exact_windows=windows, **more)


@functools.cache
def plain_engine(cfg=PAPERS):
    """Of the teacher, as if there was no student."""
    return Engine(teacher=teacher(cfg), slots=3, max_length=LONGEST)


def decode_in_one_pass(request, windows):
    """The oracle of mode exact: what its passes draft, verify and keep, by full forward passes."""
    (student, causal), k, text, kept = (gated(), teacher()), request.k or K, list(request.prompt), []
    drafts, odds, is_ended = [0] * (K - 1), [0.0] * (K - 1), False
    while len(text) < request.end and not is_ended:
        anchors = likely_ends(odds[: k - 1], windows)
        new = verified(causal, request, text, drafts[: k - 1])
        drafts, odds = next_drafts(student, request, text, new, drafts, anchors)
        new = new[: request.end - len(text)]
        ends = [index for index, token in enumerate(new) if token in request.end_ids]
        new, is_ended = new[: ends[0] + 1] if ends else new, bool(ends)
        text += new
        kept.append(len(new))
    return Decoded(text[len(request.prompt) :], len(kept), 0, kept)


def likely_ends(odds, count):
    """Of a pass with drafts of these odds, the `count` likeliest; those that cannot be have probability 0."""
    reached = np.cumprod([1.0, *odds, 0.0])
    ends = np.pad(reached[:-1] - reached[1:], (0, K - 1 - len(odds)))
    return sorted(np.argsort(-ends, kind="stable")[:count].tolist())


def next_drafts(student, request, text, new, drafts, anchors):
    """Off the last anchor that is not after the accepted drafts: its tokens after the new ones, and their odds."""
    accepted, found, odds = len(new) - 1, [], []
    before = [anchor for anchor in anchors if anchor <= accepted]
    if before:
        context = text + new[: before[-1]]
        logits_KxV = window_logits(student, context, uniforms(request, len(context), K), request.tau)
        for logits_V in logits_KxV[accepted - before[-1] + 1 :]:
            found.append(int(penalised(logits_V, request, text + new + found, student).argmax()))
            odds.append(softmax(np.delete(np.float64(logits_V), 9)).max())
    earlier = [*drafts[len(new) :], *[drafts[-1]] * K][len(found) : K - 1]
    return found + earlier, odds + [0.0] * (K - 1 - len(odds))


@pytest.mark.parametrize("windows", [4, 2])
@pytest.mark.parametrize("seed", range(2))
def test_all_modes_share_a_cache_and_are_decoded_as_step_by_step(seed, windows):
    rng = np.random.default_rng(seed)
    requests = [random_request(rng) for _ in range(12)]
    one, causal = engine(windows=windows), teacher()
    assert one.models.names == ("student",) and one.modes == ("student", "ar", "exact")
    for request, updates in zip(requests, serve_updates(one, requests, rng), strict=True):
        if request.mode == "exact":
            expected = decode_in_one_pass(request, windows)
        else:
            expected = decode_step_by_step(request, student=gated(), teacher=causal, k=K)
        assert list(itertools.chain(*(update.tokens for update in updates))) == expected.tokens, request
        assert updates[-1].passes == {"student": expected.student_passes + expected.teacher_passes}, request
        assert updates[-1].kept == tuple(sum(kept > j for kept in expected.kept) for j in range(K + 1)), request
        check_logprobs(causal, request, updates)


SETTINGS = (
    {},
    {"tau": 0.3},
    {"tau": 20.0},
    {"frequency_penalty": 0.7},
    {"top_p": 0.7, "end_ids": (3,)},
    {"top_k": 3, "tau": 2.0, "logit_bias": {2: -100.0, 5: 1.0}},
)


@pytest.mark.parametrize(
    ("cfg", "windows"), [(SHUFFLED, 4), (PAPERS, 2), (PAPERS, 0), (LLAMA, 1)], ids=["all", "two", "none", "llama, one"]
)
def test_exact_decoding_is_the_ar_sample_of_that_seed(cfg, windows):
    """And that of the teacher without a student, with neighbours of all modes that come and go."""
    rng = np.random.default_rng(windows)
    prompts = [rng.integers(0, 13, length).tolist() for length in (1, 3, 19)]
    requests = [
        Request(prompt, int(rng.integers(12, 20)), seed=int(rng.integers(2**32)), mode="ar", **settings)
        for prompt in prompts
        for settings in SETTINGS
    ]
    exact = [dataclasses.replace(r, mode="exact", k=1 + index % K) for index, r in enumerate(requests)]
    expected, _ = serve(plain_engine(cfg), requests)
    found, _ = serve(engine(cfg, windows), requests + exact, rng)
    assert found[: len(requests)] == expected
    assert found[len(requests) :] == expected


@pytest.mark.parametrize("windows", [4, 2, 0])
def test_drafts_that_are_all_right_give_k_tokens_a_pass(windows):
    """Every model here says 5, whatever it sees; only the first pass has no drafts to verify."""
    model, params = gated()
    params = jax.tree.map(jnp.zeros_like, params)
    params["backbone"]["output"] = params["backbone"]["output"] | {"bias": jnp.zeros(13).at[5].set(30.0)}
    tokens, passes = serve(engine_of((model, params), windows), [Request([1, 2], 21, mode="exact")])
    assert tokens == [[5] * 21]
    assert passes == [{"student": 2 * 5 if windows == 0 else 1 + 5}]  # two passes give k + 1 tokens


def test_an_untrained_gated_student_is_exact_too():
    model = PushForwardLM(PAPERS)
    params = init_params(model, jax.random.key(3))
    requests = [Request([3, 1, 4][:length], 24, mode="ar", seed=length) for length in (1, 2, 3)]
    exact = [dataclasses.replace(request, mode="exact") for request in requests]
    alone = Engine(teacher=(model.text_model, base_params(params)), slots=3, max_length=LONGEST)
    tokens, passes = serve(engine_of((model, params)), exact)
    assert tokens == serve(alone, requests)[0]
    assert all(count["student"] <= 24 for count in passes)


def test_a_teacher_of_the_same_arrays_is_the_one_in_the_student_and_another_one_is_its_own():
    model, params = gated()
    request = Request([3, 1], 20, mode="exact", seed=4)
    shared = engine_of((model, params), teacher=(model.text_model, params))
    assert shared.models.names == ("student",)
    apart = engine_of((model, params), teacher=(model.text_model, jax.tree.map(jnp.copy, params)))
    assert apart.models.names == ("student", "teacher") and apart.models.exact_windows == 0
    expected = decode_step_by_step(request, student=gated(), teacher=teacher(), k=K)
    tokens, passes = serve(apart, [request])
    assert tokens == [expected.tokens] == serve(shared, [request])[0]
    assert passes == [{"student": expected.student_passes, "teacher": expected.teacher_passes}]


def test_generate_and_streams_need_no_teacher():
    model, params = gated()
    prompt, settings = [4, 2, 4], {"max_new_tokens": 11, "k": K, "mode": "exact", "exact_windows": 2}
    ar = serve(plain_engine(), [Request(prompt, 11, mode="ar", seed=6)])[0][0]
    assert list(itertools.chain(*stream(model, params, prompt, seed=6, **settings))) == ar
    exact = generate(model, params, [prompt], seeds=[6], **settings)
    assert exact.tokens[0, 3:].tolist() == ar and exact.teacher_passes.tolist() == [0]
    for given in (None, (model.text_model, params)):
        found = generate(model, params, [prompt], max_new_tokens=11, seeds=[6], mode="ar", teacher=given)
        assert found.tokens[0, 3:].tolist() == ar and found.student_passes.tolist() == [11]


def test_weights_and_caches_are_there_once():
    one = engine()
    assert one.memory.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(gated()[1]))
    assert set(one.programs.state.caches) == {"student"}
    assert one.programs.state.slots.draft_BxD.shape == (3, K - 1)
    assert engine(windows=0).programs.state.slots.draft_BxD.shape == (3, 0)


@pytest.mark.parametrize("cfg", [PAPERS, LLAMA], ids=["papers", "llama"])
def test_students_of_one_teacher_share_its_weights_and_not_their_own(cfg):
    params, before = gated(cfg)[1], len(cached._MADE)
    other = with_own(params, jax.tree.map(lambda x: x + 1, own_params(params)))
    one, two = (cached.weights(cfg, of) for of in (params, other))
    teachers = cached.weights(dataclasses.replace(cfg, adapter_rank=0), base_params(params))
    assert one.head_VxD is two.head_VxD is teachers.head_VxD
    leaves = [flatten_dict(whole.blocks[1]) for whole in (one, two, teachers)]
    assert leaves[0].keys() == leaves[1].keys() > leaves[2].keys()
    for path, leaf in leaves[0].items():
        assert (leaf is leaves[1][path]) == (leaf is leaves[2].get(path)) == (not is_own(path)), path
    del other, two, leaves, leaf
    assert len(cached._MADE) <= before + 2


def test_caches_are_not_copied():
    """In bytes: what a program needs besides its arguments is a small part of the caches."""
    cfg = ModelConfig(vocab_size=64, mask_id=63, num_layers=4, d_model=64, num_heads=2, adapter_rank=4)
    model = PushForwardLM(cfg)
    one = Engine(student=(model, init_params(model, jax.random.key(0))), slots=4, max_length=448, k=K)
    caches = sum(x.size * 4 for x in jax.tree.leaves(one.programs.state.caches))
    assert one.programs.temporary_bytes("run", "exact", one.programs.lives[-1]) < 0.3 * caches


def test_nothing_compiles_after_warm_up():
    warm = engine()
    warm.warm_up()
    asks = {"top_p": 0.8, "logit_bias": {3: 1.0}, "logprobs": 2, "prompt_logprobs": True}
    with count_compilations() as compiled:
        requests = [Request([1] * 20, 12, mode=mode, k=2) for mode in ("student", "ar", "exact")]
        serve(warm, [*requests, *(dataclasses.replace(r, **asks) for r in requests if r.mode != "student")])
    assert compiled == []


def test_attention_over_a_part_of_the_caches_gives_the_same_tokens(monkeypatch):
    """As on accelerators: windows lie beyond the longest text, and programs see as far."""
    for module in (cache, programs):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    monkeypatch.setattr("kforcing_jax.decoding.passes.platform", lambda: "gpu")
    one = Engine(student=gated(LLAMA), slots=2, max_length=120, k=K)
    assert one.programs.lives == [128, 192]
    rng = np.random.default_rng(2)
    requests = [Request(rng.integers(0, 12, 100).tolist(), 20, seed=seed, mode="exact") for seed in range(2)]
    expected = [decode_step_by_step(r, student=gated(LLAMA), teacher=teacher(LLAMA), k=K).tokens for r in requests]
    assert serve(one, requests)[0] == expected


@pytest.mark.parametrize("cfg", [PAPERS, LLAMA], ids=["papers", "fewer key/value heads"])
def test_a_mesh_gives_the_same_tokens(cfg):
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    model, params = gated(cfg)
    there = model, jax.device_put(params, parameter_shardings(params, mesh))
    meshed = Engine(student=there, slots=3, max_length=LONGEST, k=K, exact_windows=2)
    assert meshed.programs.mesh is mesh
    requests = [Request([3, seed], 20, seed=seed, mode="exact") for seed in range(5)]
    ar = [dataclasses.replace(request, mode="ar") for request in requests]
    assert serve(meshed, requests + ar)[0] == serve(plain_engine(cfg), ar)[0] * 2


def test_half_precision_depends_on_no_neighbour():
    half = engine_of(gated(), dtype="bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(half.programs.state.caches)} == {"bfloat16"}
    requests = [Request([3, seed], 20, seed=seed, mode="exact") for seed in range(4)]
    alone = [serve(half, [request]) for request in requests]
    tokens, passes = serve(half, requests, np.random.default_rng(0))
    assert [([text], [count]) for text, count in zip(tokens, passes, strict=True)] == alone


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"exact_windows": 5}, "exact_windows = 5 should be a whole number from 0 to k = 4"),
        ({"exact_windows": -1}, "exact_windows = -1 should be a whole number"),
        ({"exact_windows": True}, "exact_windows = True should be"),
        ({"exact_windows": 2, "mode": "ar"}, "exact_windows = 2 has no effect in mode 'ar'"),
    ],
)
def test_windows_that_cannot_be_are_refused(settings, says):
    with pytest.raises(DataError, match=says):
        generate(*gated(), [[1]], max_new_tokens=2, seeds=[0], k=4, **{"mode": "exact"} | settings)


def test_windows_of_models_that_verify_apart_are_refused(student, teacher):
    with pytest.raises(DataError, match="exact_windows = 2 has no effect without a gated student"):
        Engine(student=student, teacher=teacher, k=4, exact_windows=2)
