"""The autoregressive teacher and the push-forward student."""

from kforcing_jax.models.backbone import ModelConfig
from kforcing_jax.models.lm import CausalLM, PushForwardLM, init_params

__all__ = ["CausalLM", "ModelConfig", "PushForwardLM", "init_params"]
