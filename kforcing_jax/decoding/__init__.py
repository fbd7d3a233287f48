"""Decoding: `generate` runs a teacher or a student over a KV cache."""

from kforcing_jax.decoding.generate import Generation, generate

__all__ = ["Generation", "generate"]
