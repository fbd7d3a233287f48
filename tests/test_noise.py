"""Uniforms, the inverse CDF against a float64 oracle, and noise inversion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from compiling import OPTIMISED

from kforcing_jax.noise import (
    CDF_ERROR_BOUND,
    LARGEST_UNIFORM,
    _Blocks,
    argmax,
    inverse_cdf,
    invert_noise,
    noise_within_bins,
    position_noise,
    sample_uniform,
)

VOCABULARIES = (2, 6, 97, 1000, 50_258)

# As users compile it: the bound is one of optimised code.
_jit = functools.partial(jax.jit, compiler_options=OPTIMISED)


@_jit
def _cdf(logits_xV):
    """F(v) of every token by the sums that a draw looks into."""
    blocks = _Blocks.of(jnp.asarray(logits_xV))
    every = jnp.arange(blocks.ends_xM.shape[-1])
    _, sums_MxW = jax.vmap(lambda i: blocks.within(jnp.full(logits_xV.shape[:-1], i)))(every)
    sums = jnp.moveaxis(sums_MxW, 0, -2).reshape(*logits_xV.shape[:-1], -1)[..., : logits_xV.shape[-1]]
    return sums / blocks.total_x[..., None]


_inverse_cdf, _argmax = _jit(inverse_cdf), _jit(argmax)
_noise_within_bins, _invert_noise = _jit(noise_within_bins), _jit(invert_noise)


def exact_cdf(logits_xV):
    """F(v), f64, of f32 logits."""
    logits_xV = np.asarray(logits_xV, np.float64)
    weights_xV = np.exp(logits_xV - logits_xV.max(axis=-1, keepdims=True))
    sums_xV = weights_xV.cumsum(axis=-1)
    return sums_xV / sums_xV[..., -1:]


def bins(cdf_xV, tokens_x):
    """The interval [lower_x, upper_x) of uniforms of each token."""
    upper_x, below_x = (np.take_along_axis(cdf_xV, np.maximum(tokens_x - i, 0)[..., None], -1)[..., 0] for i in (0, 1))
    return np.where(tokens_x > 0, below_x, 0.0), upper_x


def random_logits(rng, vocab):
    """Flat to peaked, and sorted either way."""
    rows = [scale * rng.normal(size=vocab) for scale in (0, 0.1, 1, 3, 10, 100)]
    return np.stack(rows + [np.sort(row) for row in rows[1:5]] + [-np.sort(-row) for row in rows[1:5]])


def zipf_logits(vocab):
    ranks = np.log(np.arange(1, vocab + 1))
    return np.stack([-ranks, ranks, -1.5 * ranks])


def giant_token_logits(vocab):
    """One token and a tail whose single members are around half an ulp of it: lost or doubled when added one by one."""
    gaps = np.concatenate([np.arange(2, 20, 3), np.log(2.0) * np.linspace(22, 26, 17)])
    logits = np.zeros((3, len(gaps), vocab))
    for row, place in enumerate((0, vocab // 2, vocab - 1)):
        logits[row, :, place] = gaps
    return logits.reshape(-1, vocab)


@pytest.fixture(params=VOCABULARIES)
def vocab(request):
    return request.param


@functools.cache
def hard_logits(vocab):
    """Rows (R, V) of every kind, and their exact CDF."""
    rng = np.random.default_rng(0)
    far_from_zero = rng.normal(size=(4, vocab)) + 1e4
    rows = [random_logits(rng, vocab), zipf_logits(vocab), giant_token_logits(vocab), far_from_zero]
    logits_RxV = np.concatenate(rows).astype(np.float32)
    return logits_RxV, exact_cdf(logits_RxV)


def on_the_grid(u):
    scaled = np.asarray(u, np.float64) * 2**24
    return (scaled == np.round(scaled)).all() and scaled.min() >= 0 and scaled.max() < 2**24


def test_uniforms_lie_in_the_unit_interval_on_the_finest_grid():
    u = sample_uniform(jax.random.key(0), (200_000,))
    assert u.dtype == jnp.float32
    assert on_the_grid(u)
    assert 0.49 < np.mean(np.asarray(u, np.float64) * 2**24 % 2) < 0.51  # the last of the 24 bits is in use
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3


def test_the_extreme_bit_patterns_give_the_ends_of_the_interval(monkeypatch):
    for bits, u in ((0, 0.0), (2**32 - 1, LARGEST_UNIFORM)):
        monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype, bits=bits: jnp.full(shape, bits, dtype))
        assert sample_uniform(jax.random.key(0), ()) == u


SEEDS = np.array([0, 1, 7, 2**31, 2**32 - 1], np.uint32)
RECORDED = [[7020545, 3628835], [1982232, 15213349]]


def positions(start, stop):
    return jnp.broadcast_to(jnp.arange(start, stop), (len(SEEDS), stop - start))


def test_position_noise_depends_only_on_seed_and_position():
    noise = position_noise(SEEDS, positions(0, 40))
    np.testing.assert_array_equal(position_noise(SEEDS, positions(13, 29)), noise[:, 13:29])
    np.testing.assert_array_equal(position_noise(SEEDS[::-1], positions(0, 40)), noise[::-1])
    np.testing.assert_array_equal(position_noise(SEEDS[3:4], jnp.array([[17]])), noise[3:4, 17:18])
    shuffled = np.array([5, 39, 5, 0])
    np.testing.assert_array_equal(jax.jit(position_noise)(SEEDS[1:2], shuffled[None]), noise[1:2, shuffled])


def test_position_noise_differs_between_seeds_and_positions():
    noise = np.asarray(position_noise(SEEDS, positions(0, 1000)))
    assert on_the_grid(noise)
    assert len(np.unique(noise)) > noise.size - 5


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1)])
def test_position_noise_is_uniform_along_positions_and_along_seeds(shape):
    seeds, length = np.arange(shape[0], dtype=np.uint32), shape[1]
    noise = np.ravel(position_noise(seeds, jnp.broadcast_to(jnp.arange(length), shape)))
    assert scipy.stats.kstest(noise, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.06


def test_the_cdf_stays_within_its_error_bound(vocab):
    logits_RxV, exact_RxV = hard_logits(vocab)
    assert np.abs(_cdf(logits_RxV) - exact_RxV).max() < CDF_ERROR_BOUND


def test_the_cdf_never_decreases_and_ends_at_one(vocab):
    """At one within the rounding of a division: XLA may multiply by a reciprocal."""
    cdf_RxV = np.asarray(_cdf(hard_logits(vocab)[0]))
    assert (np.diff(cdf_RxV, axis=-1) >= 0).all()
    np.testing.assert_allclose(cdf_RxV[:, -1], 1, rtol=0, atol=2.0**-23)


def test_a_token_is_exact_except_within_the_bound_of_a_bin_edge(rng, vocab):
    """Uniforms are random, extreme, or right at an edge: any one, and the one with the largest error."""
    logits_RxV, exact_RxV = hard_logits(vocab)
    rows = len(logits_RxV)
    worst_R = np.abs(_cdf(logits_RxV) - exact_RxV).argmax(axis=1)
    edges_RxE = np.stack([exact_RxV[:, rng.integers(vocab)], exact_RxV[np.arange(rows), worst_R]], axis=1)
    extremes_RxE = np.broadcast_to([0.0, 2.0**-24, LARGEST_UNIFORM], (rows, 3))
    u_RxU = np.concatenate([rng.random((rows, 3)), edges_RxE, extremes_RxE], axis=1).astype(np.float32)
    for u_R in np.minimum(u_RxU, np.float32(LARGEST_UNIFORM)).T:
        lower_R, upper_R = bins(exact_RxV, np.asarray(_inverse_cdf(logits_RxV, u_R)))
        assert (lower_R < u_R + CDF_ERROR_BOUND).all() and (u_R - CDF_ERROR_BOUND < upper_R).all()


def test_a_uniform_on_an_exact_edge_belongs_to_the_bin_above():
    u = jnp.arange(4) / 4
    np.testing.assert_array_equal(inverse_cdf(jnp.zeros((4, 4)), u), [0, 1, 2, 3])


IMPOSSIBLE = {
    "first": [0, 1],
    "last": [-1, -2],
    "both ends": [0, -1],
    "every other": slice(None, None, 2),
    "all but one": [i for i in range(20) if i != 7],
    "all but the first": slice(1, None),
    "all but the last": slice(None, -1),
}


@pytest.mark.parametrize("place", IMPOSSIBLE)
@pytest.mark.parametrize("logit", [-np.inf, -200.0])
def test_a_token_of_probability_zero_is_never_drawn(rng, place, logit):
    """-200 underflows in f32 next to logits around 0."""
    logits = rng.normal(size=(300, 20)).astype(np.float32)
    logits[:, IMPOSSIBLE[place]] = logit
    extremes = np.array([0.0, 2.0**-24, LARGEST_UNIFORM], np.float32)
    u = np.where(np.arange(300) < 100, extremes[np.arange(300) % 3], rng.random(300)).astype(np.float32)
    tokens = np.asarray(_inverse_cdf(logits, u))
    assert (logits[np.arange(300), tokens] != logit).all()


def test_a_token_of_probability_zero_is_never_drawn_at_the_edge_where_it_lies(rng):
    """Half the tokens are impossible; every edge of the CDF is tried, and the uniforms next to it."""
    logits = np.where(rng.random(1000) < 0.5, -np.inf, 3 * rng.normal(size=1000)).astype(np.float32)
    edges = np.asarray(_cdf(logits))
    u = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(1))])
    tokens = _inverse_cdf(np.broadcast_to(logits, (3000, 1000)), np.clip(u, 0, np.float32(LARGEST_UNIFORM)))
    assert (logits[np.asarray(tokens)] > -np.inf).all()


@pytest.mark.parametrize("u", [0.0, LARGEST_UNIFORM])
def test_impossible_tokens_at_the_ends_of_a_large_vocabulary_are_never_drawn(rng, u):
    logits = (3 * rng.normal(size=(8, 50_258))).astype(np.float32)
    logits[:, :500] = logits[:, -500:] = -np.inf
    tokens = _inverse_cdf(logits, np.full(8, u, np.float32))
    assert ((tokens >= 500) & (tokens < 50_258 - 500)).all()


def test_tokens_follow_the_distribution_of_the_logits(rng):
    logits = (1.5 * rng.normal(size=12)).astype(np.float32)
    u = sample_uniform(jax.random.key(5), (50_000,))
    tokens = _inverse_cdf(jnp.broadcast_to(logits, (len(u), 12)), u)
    expected = np.diff(exact_cdf(logits), prepend=0) * len(u)
    assert scipy.stats.chisquare(np.bincount(tokens, minlength=12), expected).pvalue > 1e-3


@pytest.mark.parametrize("spread", [0.0, 1e-30, 3.0, 1e30])
def test_argmax_is_the_least_index_of_the_maximum(rng, vocab, spread):
    logits = np.round(spread * rng.normal(size=(32, vocab)), 1).astype(np.float32)
    logits[0] = -np.inf
    np.testing.assert_array_equal(_argmax(logits), logits.argmax(axis=-1))


def test_a_global_setting_changes_no_requests_noise():
    noise = np.asarray(position_noise(SEEDS, positions(0, 50)))
    settings = {"jax_threefry_partitionable": not jax.config.jax_threefry_partitionable, "jax_default_prng_impl": "rbg"}
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        np.testing.assert_array_equal(position_noise(SEEDS, positions(0, 50)), noise)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_the_noise_of_a_seed_and_position_is_what_it_always_was():
    """Recorded, so that a request can be repeated under a later version."""
    noise = np.asarray(position_noise(SEEDS[:2], jnp.array([[0, 1], [0, 12345]])), np.float64) * 2**24
    np.testing.assert_array_equal(noise, RECORDED)


def test_inverse_cdf_keeps_any_leading_axes(rng):
    logits, u = rng.normal(size=(2, 3, 4, 7)).astype(np.float32), rng.random((2, 3, 4)).astype(np.float32)
    tokens = _inverse_cdf(logits, u)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens.reshape(-1), _inverse_cdf(logits.reshape(-1, 7), u.reshape(-1)))


def assert_inverted_noise_gives_the_text_back(logits, tokens, key):
    u = _invert_noise(logits, tokens, key)
    lower, upper = bins(exact_cdf(logits[:, :-1]), tokens[:, 1:])
    wide = upper - lower > 2 * CDF_ERROR_BOUND
    assert wide.any()
    np.testing.assert_array_equal(_inverse_cdf(logits[:, :-1], u)[wide], tokens[:, 1:][wide])


@pytest.mark.parametrize("vocab", [2, 97, 50_258])
def test_inverted_noise_gives_the_text_back(rng, vocab):
    logits = rng.normal(size=(4, 26, vocab)).astype(np.float32)
    tokens = rng.integers(0, vocab, size=(4, 26)).astype(np.int32)
    assert_inverted_noise_gives_the_text_back(logits, tokens, jax.random.key(1))


def test_inverted_noise_gives_the_text_back_in_bins_just_wide_enough(rng):
    """A thousand bins two to ten times the bound wide, above a bin of almost everything: u is near 1, its coarsest."""
    widths = CDF_ERROR_BOUND * np.geomspace(2.1, 10, 1000)
    logits = np.log(np.concatenate([[1 - widths.sum()], rng.permutation(widths)])).astype(np.float32)
    tokens = rng.integers(0, 1001, size=(4, 1001)).astype(np.int32)
    assert_inverted_noise_gives_the_text_back(np.broadcast_to(logits, (4, 1001, 1001)), tokens, jax.random.key(1))


@pytest.mark.parametrize("vocab", [2, 97, 50_258])
def test_inverted_noise_lies_in_the_bin_of_the_token(rng, vocab):
    logits = (2 * rng.normal(size=(64, vocab))).astype(np.float32)
    tokens = rng.integers(0, vocab, size=64)
    lower, upper = bins(exact_cdf(logits), tokens)
    for fraction in (0.0, 0.25, 1.0):
        u = _noise_within_bins(logits, tokens, np.full(64, fraction, np.float32))
        expected = np.minimum(lower + fraction * (upper - lower), LARGEST_UNIFORM)
        np.testing.assert_allclose(u, expected, rtol=0, atol=2 * CDF_ERROR_BOUND)


def test_inverted_noise_is_uniform_when_the_text_comes_from_the_model(rng):
    """And independent of the key that drew the text."""
    logits = (2 * rng.normal(size=(1, 20_000, 6))).astype(np.float32)
    drawn = jax.random.categorical(jax.random.key(2), jnp.asarray(logits[0]))
    text = jnp.concatenate([jnp.zeros((1, 1), int), drawn[None, :-1]], axis=1)
    u = np.asarray(_invert_noise(logits, text, jax.random.key(3)))[0]
    assert u.min() >= 0 and u.max() < 1
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3


def test_other_keys_give_other_noise_in_the_same_bins(rng):
    logits = rng.normal(size=(2, 9, 5)).astype(np.float32)
    text = rng.integers(0, 5, size=(2, 9))
    first, second = (_invert_noise(logits, text, jax.random.key(seed)) for seed in (0, 1))
    assert (first != second).all()
    np.testing.assert_array_equal(_inverse_cdf(logits[:, :-1], first), _inverse_cdf(logits[:, :-1], second))
