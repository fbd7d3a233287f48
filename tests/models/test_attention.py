"""`group_attention` against dense attention over explicitly laid out tokens."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import OPTIMISED

from kforcing_jax.models import attention
from kforcing_jax.models.attention import block_length, choose_implementation, group_attention
from kforcing_jax.models.keys import Causal, KeyValue, Past, Sliding, UpTo


def dense_attention(q_BxTxHxC, k_BxUxHxC, v_BxUxHxC, mask_BxTxU):
    """Textbook attention: every query against every key, and a mask."""
    scores = jnp.einsum("bthc,buhc->bhtu", q_BxTxHxC, k_BxUxHxC) / np.sqrt(q_BxTxHxC.shape[-1])
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True)) * mask_BxTxU[:, None]
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return jnp.einsum("bhtu,buhc->bthc", weights, v_BxUxHxC)


def window_mask(length, window):
    """Who sees whom when `length` text tokens are followed by a window of `window` tokens for each of them."""
    tokens = [(t, 0) for t in range(length)]
    tokens += [(t, j) for t in range(length) for j in range(1, window + 1)]
    (t, j), (s, i) = np.array(tokens).T[:, :, None], np.array(tokens).T[:, None, :]
    return np.where(i == 0, s <= t, (s == t) & (i <= j))


def of_one_segment(segments_BxN, window):
    """Mask (B, T, T), in the order of `window_mask`, of tokens whose positions have the same segment id."""
    ids_BxT = np.concatenate([segments_BxN, np.repeat(segments_BxN, window, axis=1)], axis=1)
    return ids_BxT[:, :, None] == ids_BxT[:, None, :]


def text_then_windows(x_BxNxGxHxC):
    """Moves the first token of every group to the front: the order of `window_mask`."""
    text, windows = x_BxNxGxHxC[:, :, 0], x_BxNxGxHxC[:, :, 1:]
    return jnp.concatenate([text, windows.reshape(text.shape[0], -1, *text.shape[2:])], axis=1)


def arrays(rng, *shapes):
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def assert_same_values_and_gradients(actual, expected, inputs, rng):
    """Compares two functions and their gradients with respect to every input."""
    cotangent = rng.normal(size=jax.eval_shape(actual, *inputs).shape).astype(np.float32)

    def value_and_gradients(function):
        out, pull_back = jax.vjp(function, *inputs)
        return out, pull_back(cotangent)

    out, gradients = jax.jit(value_and_gradients, static_argnums=0)(actual)
    expected_out, expected_gradients = jax.jit(value_and_gradients, static_argnums=0)(expected)
    np.testing.assert_allclose(out, expected_out, atol=3e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


IMPLEMENTATIONS = ("dense", "blockwise", "splash")


@pytest.mark.parametrize(
    "implementation, batch, length, group, heads, width, segmented",
    [
        ("dense", 2, 5, 1, 3, 4, False),
        ("dense", 1, 6, 5, 1, 6, True),
        ("blockwise", 2, 5, 3, 2, 4, False),
        ("blockwise", 2, 130, 3, 2, 4, True),
        ("blockwise", 1, 200, 1, 1, 4, False),
        ("splash", 1, 128, 5, 2, 4, True),
        ("splash", 2, 256, 1, 1, 4, False),
        ("splash", 1, 384, 3, 1, 8, True),
    ],
)
def test_windows_over_a_text_equal_a_dense_mask(rng, implementation, batch, length, group, heads, width, segmented):
    """Values, and gradients with respect to every input, of each implementation."""
    shape = (batch, length, group, heads, width)
    segments = np.sort(rng.integers(1, 4, size=(batch, length)), axis=1) if segmented else np.ones((batch, length), int)
    reach = Causal(jnp.asarray(segments) if segmented else None)
    mask = window_mask(length, group - 1)[None] & of_one_segment(segments, group - 1)

    def ours(q, k, v):
        text, windows = KeyValue(k[:, :, 0], v[:, :, 0]), KeyValue(k[:, :, 1:], v[:, :, 1:])
        return text_then_windows(group_attention(q, windows, text, reach, None, implementation))

    def dense(q, k, v):
        return dense_attention(text_then_windows(q), text_then_windows(k), text_then_windows(v), mask)

    assert_same_values_and_gradients(ours, dense, arrays(rng, shape, shape, shape), rng)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_past_at_every_position_equals_a_dense_mask(rng, implementation):
    """A later pass of a rollout: two real tokens of three at every position of a text, and two new ones."""
    length, group, capacity, real = 128, 2, 3, 2
    own_shape, past_shape = (1, length, group, 2, 4), (1, length, capacity, 2, 4)
    mask = group_mask(1 + np.arange(length)[None], length, group, capacity, real)

    def ours(q, k, v, prefix_k, prefix_v, *past):
        past = Past(KeyValue(*past), jnp.int32(real))
        return group_attention(q, KeyValue(k, v), KeyValue(prefix_k, prefix_v), Causal(), past, implementation)

    def dense(q, k, v, prefix_k, prefix_v, past_k, past_v):
        keys, values = flat_keys(prefix_k, past_k, k), flat_keys(prefix_v, past_v, v)
        return dense_attention(q.reshape(1, -1, 2, 4), keys, values, mask).reshape(q.shape)

    inputs = arrays(rng, *[own_shape] * 3, *[(1, length, 2, 4)] * 2, *[past_shape] * 2)
    assert_same_values_and_gradients(ours, dense, inputs, rng)


def repeated(keys_xHxC, sharing):
    """A head of keys for every query head."""
    return jnp.repeat(keys_xHxC, sharing, axis=-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sharing, with_past", [(2, False), (3, True)])
def test_query_heads_that_share_keys_equal_heads_with_keys_of_their_own(rng, implementation, sharing, with_past):
    """Windows over a text, and a later pass of a rollout: values, and gradients with respect to every input."""
    length, group, heads, width = 128, 3, 2, 4
    q_shape, own_shape = (1, length, group, heads * sharing, width), (1, length, group, heads, width)
    shapes = [q_shape, own_shape, own_shape, *[(1, length, heads, width)] * 2]
    shapes += [(1, length, 2, heads, width)] * 2 * with_past
    segments = jnp.asarray(np.sort(rng.integers(1, 4, size=(1, length)), axis=1))

    def attend(q, k, v, prefix_k, prefix_v, past=(), *, sharing=1):
        k, v, prefix_k, prefix_v, *past = (repeated(x, sharing) for x in (k, v, prefix_k, prefix_v, *past))
        past = Past(KeyValue(*past), jnp.int32(1)) if past else None
        keys = KeyValue(k, v), KeyValue(prefix_k, prefix_v)
        return group_attention(q, *keys, Causal(segments), past, implementation)

    def shared(q, k, v, prefix_k, prefix_v, *past):
        return attend(q, k, v, prefix_k, prefix_v, past)

    def apart(q, k, v, prefix_k, prefix_v, *past):
        return attend(q, k, v, prefix_k, prefix_v, past, sharing=sharing)

    assert_same_values_and_gradients(shared, apart, arrays(rng, *shapes), rng)


def test_the_gpu_kernel_gets_heads_that_share_keys_as_they_are(rng, monkeypatch):
    """Its public function, here computed by XLA, pairs query heads with heads of keys as the others do."""
    by_xla = jax.nn.dot_product_attention

    def instead(*args, implementation, **settings):
        assert implementation == "cudnn"
        return by_xla(*args, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays(rng, (2, 9, 1, 6, 8), (2, 9, 3, 8), (2, 9, 3, 8)))
    nothing, text = KeyValue(*[jnp.zeros((2, 9, 0, 3, 8), jnp.bfloat16)] * 2), KeyValue(k, v)
    assert choose_implementation(q, nothing, text, Causal(), None, "cudnn") == "cudnn"
    out = group_attention(q, nothing, text, Causal(), None, "cudnn")
    expected = group_attention(q, nothing, text, Causal(), None, "dense")
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), atol=0.03)


@pytest.mark.parametrize("implementation, length", [("dense", 9), ("blockwise", 140), ("splash", 128)])
@pytest.mark.parametrize("width", [1, 3, 6])
def test_a_token_sees_no_farther_back_than_its_sliding_window(rng, implementation, length, width):
    """Windows over a text, whose tokens see the nearest `width` before them, of the text or their own window."""
    group, sharing, heads = 4, 2, 1
    shape, q_shape = (2, length, group, heads, 4), (2, length, group, heads * sharing, 4)
    position = np.concatenate([np.arange(length), np.repeat(np.arange(length), group - 1) + np.tile([1, 2, 3], length)])
    mask = window_mask(length, group - 1) & (position[:, None] - position < width)

    def ours(q, k, v):
        text, windows = KeyValue(k[:, :, 0], v[:, :, 0]), KeyValue(k[:, :, 1:], v[:, :, 1:])
        sliding = Sliding(width, jnp.arange(group))
        return text_then_windows(group_attention(q, windows, text, Causal(), None, implementation, "highest", sliding))

    def dense(q, k, v):
        k, v = repeated(k, sharing), repeated(v, sharing)
        return dense_attention(text_then_windows(q), text_then_windows(k), text_then_windows(v), mask[None])

    assert_same_values_and_gradients(ours, dense, arrays(rng, q_shape, shape, shape), rng)


@pytest.mark.parametrize(
    "length, reach, wanted, chosen",
    [
        (1024, Causal(), "auto", "blockwise"),
        (64, Causal(), "auto", "dense"),
        (64, Causal(), "blockwise", "blockwise"),
        (1024, Causal(), "dense", "dense"),
        (1024, Causal(), "splash", "splash"),
        (1000, Causal(), "splash", "blockwise"),
        (1024, Causal(), "cudnn", "blockwise"),
        (1, Causal(), "splash", "dense"),
        (1024, UpTo(jnp.zeros((1, 1024), int)), "splash", "dense"),
    ],
)
def test_the_implementation_follows_the_wish_the_reach_and_the_length(length, reach, wanted, chosen):
    q = jnp.zeros((1, length, 3, 1, 4))
    own, prefix = jnp.zeros((1, length, 2, 1, 4)), jnp.zeros((1, length, 1, 4))
    keys = KeyValue(own, own), KeyValue(prefix, prefix)
    assert choose_implementation(q, *keys, reach, None, wanted) == chosen


@pytest.mark.parametrize(
    "dtype, sharing, chosen", [("float32", 4, "splash"), ("float32", 7, "blockwise"), ("bfloat16", 7, "splash")]
)
def test_more_rows_over_the_same_keys_than_a_tpu_has_room_for_go_in_blocks(dtype, sharing, chosen):
    text, own, q = ((1, 1024, 4, 128), (1, 1024, 3, 4, 128), (1, 1024, 4, 4 * sharing, 128))
    text, own, q = (jax.ShapeDtypeStruct(shape, dtype) for shape in (text, own, q))
    assert choose_implementation(q, KeyValue(own, own), KeyValue(text, text), Causal(), None, "splash") == chosen


def compiled(implementation, length, group, gradient):
    """The compiled attention of windows over a text, or its gradient."""
    shape = (1, length, group, 2, 16)

    def attend(q, k, v):
        if implementation == "mask":
            mask = window_mask(length, group - 1)[None]
            return dense_attention(text_then_windows(q), text_then_windows(k), text_then_windows(v), mask)
        text, windows = KeyValue(k[:, :, 0], v[:, :, 0]), KeyValue(k[:, :, 1:], v[:, :, 1:])
        return group_attention(q, windows, text, Causal(), None, implementation)

    function = jax.grad(lambda *x: attend(*x).sum(), argnums=(0, 1, 2)) if gradient else attend
    return jax.jit(function).lower(*[jax.ShapeDtypeStruct(shape, jnp.float32)] * 3).compile(OPTIMISED)


def test_blocks_skip_most_of_the_future():
    """Compiled FLOPs of the scores and sums at most 1.3 times those of the pairs that are needed."""
    length, group, heads, width = 512, 5, 2, 16
    pairs = group * length * (length + 1) / 2 + length * group * (group - 1) / 2
    flops = compiled("blockwise", length, group, gradient=False).cost_analysis()["flops"]
    # Softmax and masks take a few operations per pair next to 4 * width for scores and sums.
    assert 4 * width * heads * pairs < flops < (4 * width * 1.3 + 12) * heads * pairs


def test_memory_is_far_below_that_of_a_dense_mask():
    ours, mask = (
        compiled(name, 512, 5, gradient=True).memory_analysis().temp_size_in_bytes for name in ("blockwise", "mask")
    )
    assert 6 * ours < mask


def test_blocks_cover_a_text_with_few_programs():
    for length in (1, 63, 256, 1000, 1024, 8192):
        assert 1 <= -(-length // block_length(length)) <= 8


def group_mask(stop_BxA, prefix_length, group, past_capacity=0, past_length=0):
    """Mask (B, A * G, S + A * (P + G)) of groups over a cached prefix, then (past, own) tokens of every anchor."""
    batch, anchors = stop_BxA.shape
    per_anchor = past_capacity + group
    mask = np.zeros((batch, anchors * group, prefix_length + anchors * per_anchor), bool)
    for b, a, g in itertools.product(range(batch), range(anchors), range(group)):
        row, start = mask[b, a * group + g], prefix_length + a * per_anchor
        row[: stop_BxA[b, a]] = True
        row[start : start + past_length] = True
        row[start + past_capacity : start + past_capacity + g + 1] = True
    return mask


def flat_keys(prefix, past, own):
    """The tokens in the order of `group_mask`'s columns."""
    batch, heads_and_width = prefix.shape[0], prefix.shape[2:]
    per_anchor = jnp.concatenate([past, own], axis=2).reshape(batch, -1, *heads_and_width)
    return jnp.concatenate([prefix, per_anchor], axis=1)


@pytest.mark.parametrize(
    "batch, anchors, group, heads, width, past_capacity, past_length",
    [
        (1, 1, 1, 1, 2, 0, 0),
        (2, 3, 4, 2, 4, 0, 0),
        (2, 3, 1, 2, 4, 3, 0),
        (2, 3, 2, 2, 4, 3, 2),
        (1, 4, 3, 1, 6, 2, 2),
    ],
)
def test_groups_over_a_cache_and_a_past_equal_a_dense_mask(
    rng, batch, anchors, group, heads, width, past_capacity, past_length
):
    prefix_length = 7
    stop = rng.integers(1, prefix_length, size=(batch, anchors))
    stop[0, 0], stop[-1, -1] = 0, prefix_length
    mask = group_mask(stop, prefix_length, group, past_capacity, past_length)
    own_shape = (batch, anchors, group, heads, width)
    prefix_shape = (batch, prefix_length, heads, width)
    past_shape = (batch, anchors, past_capacity, heads, width)

    def ours(q, k, v, prefix_k, prefix_v, *past):
        past = Past(KeyValue(*past), jnp.int32(past_length)) if past else None
        return group_attention(q, KeyValue(k, v), KeyValue(prefix_k, prefix_v), UpTo(jnp.asarray(stop)), past)

    def dense(q, k, v, prefix_k, prefix_v, *past):
        past_k, past_v = past or [jnp.zeros(past_shape)] * 2
        keys, values = flat_keys(prefix_k, past_k, k), flat_keys(prefix_v, past_v, v)
        return dense_attention(q.reshape(batch, -1, heads, width), keys, values, mask).reshape(q.shape)

    past_shapes = [past_shape] * 2 if past_capacity else []
    inputs = arrays(rng, *[own_shape] * 3, *[prefix_shape] * 2, *past_shapes)
    assert_same_values_and_gradients(ours, dense, inputs, rng)


def test_what_lies_beyond_stop_and_beyond_the_past_changes_nothing(rng):
    own, prefix, past = (1, 2, 2, 1, 4), (1, 5, 1, 4), (1, 2, 3, 1, 4)
    q, k, v, prefix_k, prefix_v, past_k, past_v = arrays(rng, *[own] * 3, *[prefix] * 2, *[past] * 2)
    stop = jnp.array([[2, 3]])

    @jax.jit
    def attend(garbage):
        cache = KeyValue(prefix_k.at[:, 3:].set(garbage), prefix_v.at[:, 3:].set(garbage))
        unreal = KeyValue(past_k.at[:, :, 1:].set(garbage), past_v.at[:, :, 1:].set(garbage))
        return group_attention(q, KeyValue(k, v), cache, UpTo(stop), Past(unreal, jnp.int32(1)))

    np.testing.assert_array_equal(attend(0.0), attend(1e6))


def test_scores_of_half_precision_queries_are_computed_in_f32():
    """Two keys whose scores, 256 and 256.5, are one number in bfloat16; in f32 the second weighs 1.65 times as much."""
    q = jnp.array([[16.0, 1.0]], jnp.bfloat16).reshape(1, 1, 1, 1, 2)
    scale = np.sqrt(2.0)
    keys = jnp.array([[16.0, 0.0], [16.0, 0.5]], jnp.bfloat16).reshape(1, 2, 1, 2)
    values = jnp.array([[0.0, 0.0], [1.0, 1.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    nothing = jnp.full((1, 1, 1, 1, 2), -16.0, jnp.bfloat16)
    out = group_attention(q, KeyValue(nothing, 0 * nothing), KeyValue(keys, values), UpTo(jnp.array([[2]])))
    np.testing.assert_allclose(out[0, 0, 0, 0].astype(jnp.float32), 1 / (1 + np.exp(-0.5 / scale)), rtol=2**-8)
