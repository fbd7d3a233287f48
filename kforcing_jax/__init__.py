"""K-Forcing in JAX: distil an autoregressive model into one that emits k tokens per forward pass.

    run = kforcing_jax.load_run("runs/tiny")
    run.generate(["The president said"], max_new_tokens=40)

`load_run` and `generate` are imported when they are first asked for, and JAX with them.

Array names carry their shape. B batch, N context positions, K window length, A anchors (prefix positions
that windows hang from), G tokens in the group at one anchor, P earlier window tokens, S prefix (cache)
length, T tokens, H heads, C head width, D model width, F noise features, V vocabulary, L layers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # As itself: otherwise mypy takes it for the module of the command.
    from kforcing_jax.decoding.generate import generate as generate
    from kforcing_jax.training.runs import load_run

__version__ = "0.1.0"

__all__ = ["__version__", "generate", "load_run"]


def __getattr__(name: str) -> Any:
    if name == "generate":
        from kforcing_jax.decoding import generate

        return generate
    if name == "load_run":
        from kforcing_jax.training.runs import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
