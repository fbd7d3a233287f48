"""How tests compile: in a fraction of the time, or as users do."""

import contextlib
import importlib.metadata

# XLA stops at a flag that it does not know, and this one may go with the older code generator that it asks for.
_HAS_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")

# 11 s of CPU time become 3 for a student's training step of two layers (with JAX_DISABLE_MOST_OPTIMIZATIONS).
FAST_FLAGS = "--xla_cpu_use_fusion_emitters=false" if _HAS_EMITTERS else ""
# `compiler_options` of a jit or a compilation whose code, memory or rounding is what is tested.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False} | (
    {"xla_cpu_use_fusion_emitters": True} if _HAS_EMITTERS else {}
)


@contextlib.contextmanager
def count_compilations():
    """A list that grows by a function's name whenever XLA compiles one, or fetches it from the cache."""
    import jax  # whose settings `conftest` makes before it is imported

    compiled = []

    def listen(name, *_, **about):
        if "backend_compile" in name:
            compiled.append(about.get("fun_name", name))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
