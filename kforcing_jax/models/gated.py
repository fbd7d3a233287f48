"""Gated students: a teacher's weights, untouched, and beside them what only noise rows have.

A student's parameters are then one tree of two kinds of leaves: those of the teacher, and its own, which are the noise
encoder and a delta for every matrix. Only the latter are trained, averaged, kept and exported.
"""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from kforcing_jax.config import FULL_RANK


def is_own(path: tuple[str, ...]) -> bool:
    """Whether a leaf, by its path of names, is the student's own."""
    return "noise_encoder" in path or any(name.endswith("_delta") for name in path)


def own_params(params: Mapping[str, Any]) -> dict:
    """The part of a gated student's parameters that the teacher does not have; arrays or their shapes."""
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(params).items() if is_own(path)})


def base_params(params: Mapping[str, Any]) -> dict:
    """The part that is the teacher's."""
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(params).items() if not is_own(path)})


def with_own(params: Mapping[str, Any], own: Mapping[str, Any]) -> dict:
    """Parameters of a gated student: of its teacher, or of a student of the same teacher, with other own ones."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(own))


def in_weights_dtype(dtype: str, params: Mapping[str, Any]) -> dict:
    """Parameters with the teacher's matrices and biases in a dtype; scales, and a student's own, as they are."""
    return unflatten_dict(
        {
            path: leaf if path[-1] == "scale" or is_own(path) else leaf.astype(dtype)
            for path, leaf in flatten_dict(params).items()
        }
    )


def delta_size(rank: int, inputs: int, outputs: int) -> int:
    """Entries of what a student of an adapter rank adds to a matrix, which every noise row multiplies with."""
    return inputs * outputs if rank == FULL_RANK else rank * (inputs + outputs)
