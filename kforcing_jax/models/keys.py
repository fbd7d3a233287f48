"""What attention works on, shared by its implementations."""

from typing import NamedTuple

import jax

# The name under which rematerialisation policies know what attention gives.
ATTENDED = "attended"


class KeyValue(NamedTuple):
    """Keys and values of some tokens, both of shape (..., H, C)."""

    key: jax.Array
    value: jax.Array


class Past(NamedTuple):
    """Keys and values (..., B, A, P, H, C) that earlier passes left at each anchor; the first `length` are real."""

    tokens: KeyValue
    length: jax.Array
