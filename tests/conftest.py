"""Tiny models shared by the tests, and the XLA settings that suit tests.

Compiling takes most of the time here: less optimisation and an older code generator take a quarter of it. Eight
devices, so that sharded steps can be tested; what names no mesh runs on the first one. What several tests or the
commands that they start compile is compiled once a session.
"""

import atexit
import os
import shutil
import tempfile

from compiling import FAST_FLAGS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {FAST_FLAGS}".strip())
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # pytest-xdist's workers have that of their parent
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="kforcing_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that ask for torch are among those that `-m extras` runs, where the first step of CI has skipped them."""
    for item in items:
        if "torch" in item.fixturenames or hasattr(item.module, "torch"):
            item.add_marker("extras")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny_config():
    return ModelConfig(vocab_size=13, mask_id=9, num_layers=2, d_model=16, num_heads=2)


@pytest.fixture(scope="session")
def causal_lm(tiny_config):
    """(model, params) of a CausalLM."""
    model = CausalLM(tiny_config)
    return model, _perturbed(jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 2), int)))


@pytest.fixture(scope="session")
def push_forward_lm(tiny_config):
    """(model, params) of a PushForwardLM."""
    model = PushForwardLM(tiny_config)
    inputs = jnp.zeros((1, 2), int), jnp.zeros((1, 2, 1)), jnp.ones(1)
    return model, _perturbed(jax.jit(model.init)(jax.random.key(2), *inputs))


def _perturbed(variables):
    """Random biases and scales, which start at 0 and 1 and so would hide a misplaced one; and kernels large
    enough for tokens to depend on the text and the noise.
    """
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf: 2 * leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), variables["params"]
    )
