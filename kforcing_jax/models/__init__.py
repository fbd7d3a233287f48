"""The autoregressive teacher and the push-forward student."""

from kforcing_jax.models.lm import CausalLM, PushForwardLM, init_params
from kforcing_jax.models.transformer import ModelConfig

__all__ = ["CausalLM", "ModelConfig", "PushForwardLM", "init_params"]
