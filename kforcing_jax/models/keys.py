"""What groups of tokens see: keys and values, and how far an anchor reaches into a prefix."""

from typing import NamedTuple

import jax

# The name under which rematerialisation policies know what attention gives.
ATTENDED = "attended"


class KeyValue(NamedTuple):
    """Keys and values of some tokens, both of shape (..., H, C); H are the heads of keys and values."""

    key: jax.Array
    value: jax.Array


class Past(NamedTuple):
    """Keys and values (..., B, A, P, H, C) that earlier passes left at each anchor; the first `length` are real."""

    tokens: KeyValue
    length: jax.Array


class Sliding(NamedTuple):
    """A token sees `width` tokens, itself included. Query g of a group sits `ahead_G` positions after its anchor."""

    width: int
    ahead_G: jax.Array


class Causal(NamedTuple):
    """The anchors are the prefix's own positions: anchor a sees keys 0..a, of its segment where ids are given."""

    segments_BxS: jax.Array | None = None


class UpTo(NamedTuple):
    """Every anchor sees the first `length_BxA` keys of the prefix."""

    length_BxA: jax.Array


class Text(NamedTuple):
    """The prefix is being read: the first token of every group is the text itself, and groups see their segment."""

    segments_BxN: jax.Array | None = None


class Known(NamedTuple):
    """The prefix was read before: its keys and values (L, B, S, H, C), and which of them each anchor sees."""

    keys: KeyValue
    reach: Causal | UpTo
