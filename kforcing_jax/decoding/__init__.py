"""Decoding: an engine of slots runs a teacher, a student or both over key-value caches; `generate` is its client."""

from kforcing_jax.decoding.engine import Engine, Update
from kforcing_jax.decoding.generate import Generation, decode, generate, stream
from kforcing_jax.decoding.logprobs import Logprobs
from kforcing_jax.decoding.requests import Request

__all__ = ["Engine", "Generation", "Logprobs", "Request", "Update", "decode", "generate", "stream"]
