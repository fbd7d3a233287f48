"""The cache as it lies on each platform: written and attended over, it gives the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kforcing_jax.models import cache as caches
from kforcing_jax.models.keys import KeyValue

B, H, S, G = 3, 4, 128, 5


def written_and_attended(monkeypatch, platform, width):
    """A prompt of 20 tokens, then chunks of 5 at other places of each row; the shape, and what the chunks see."""
    monkeypatch.setattr(caches, "platform", lambda: platform)
    keys = iter(jax.random.split(jax.random.key(width), 8))

    def chunk(tokens):
        return jax.random.normal(next(keys), (B, tokens, H, width))

    cache = caches.allocate(B, H, S, width, "float32")
    cache = caches.write(cache, KeyValue(chunk(20), chunk(20)), jnp.zeros(B, jnp.int32))
    start_B = jnp.array([20, 3, 9])
    cache = caches.write(cache, KeyValue(chunk(G), chunk(G)), start_B)
    out = caches.attention(chunk(G), cache, caches.Seen(start_B[:, None] + jnp.arange(G)), 64, "highest")
    return cache.key.shape, out


@pytest.mark.parametrize(
    "width, on_a_tpu",
    [
        (64, (B, 2, S, 128)),
        (32, (B, 1, S, 128)),
        (128, (B, H, S, 128)),
        (48, (B, H, S, 48)),  # no whole number of heads fills 128 lanes
        (16, (B, H, S, 16)),  # fewer heads than fill them
    ],
)
def test_heads_side_by_side_on_a_tpu_see_what_they_see_apart(monkeypatch, width, on_a_tpu):
    shape, out = written_and_attended(monkeypatch, "cpu", width)
    assert shape == (B, H, S, width)
    for platform, expected in ("gpu", shape), ("tpu", on_a_tpu):
        there, same = written_and_attended(monkeypatch, platform, width)
        assert there == expected
        np.testing.assert_allclose(same, out, atol=2e-6)
