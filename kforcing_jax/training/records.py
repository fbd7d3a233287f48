"""What the stages of a run say of themselves, read without orbax.

Every checkpoint has a JSON item `progress`: `seconds` of training, what the stage was made from (`made_from`), and in
the last one of a stage `weights`, a digest by which later stages name what they were made from.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from kforcing_jax.config import predecessors
from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.errors import RunError
from kforcing_jax.noise import CdfOrder
from kforcing_jax.training.recipes import Vocabulary
from kforcing_jax.workdir import Workdir


def complete_steps(directory: Path) -> list[int]:
    """Steps of complete checkpoints, the newest first: orbax gives a directory this name when all is in it."""
    return sorted((int(child.name) for child in directory.glob("*") if child.name.isdecimal()), reverse=True)


def stage_progress(workdir: Workdir, stage: str) -> dict:
    """What the newest checkpoint says of itself; {} where there is none."""
    directory = workdir.checkpoints_path(stage)
    for step in complete_steps(directory):
        with contextlib.suppress(OSError, ValueError):
            return json.loads((directory / str(step) / "progress" / "metadata").read_text())
    return {}


def run_vocabulary(workdir: Workdir, tokens: Corpus | Tokenizer) -> Vocabulary:
    """What the models of a run know of its tokens: in the order that weights have kept, or that the configuration says.

    One order for all stages: students start from their teachers' output layers.
    """
    config = workdir.config
    kept = [stage_progress(workdir, stage).get("made_from", {}).get("cdf_order") for stage in config.stages]
    order = next((CdfOrder(tokens_V) for tokens_V in kept if tokens_V), None)
    if order is None and config.model.cdf_order == "shuffled":
        order = CdfOrder.shuffled(tokens.vocab_size, config.seed)
    return Vocabulary(tokens.vocab_size, tokens.mask_id, tokens.eos_id, order)


def made_from(workdir: Workdir, stage: str, corpus: Corpus) -> dict:
    """What a stage is about to be made from, as JSON.

    Digests of the vocabulary, the data and its predecessors' weights, and the order of its tokens on [0, 1).
    """
    parents = zip(("teacher", "origin"), predecessors(workdir.config, stage), strict=True)
    order = run_vocabulary(workdir, corpus).cdf_order
    return (
        _digests(corpus)
        | {"cdf_order": order and order.tokens_V.tolist()}
        | {
            role: {"stage": parent, "weights": stage_progress(workdir, parent).get("weights")}
            for role, parent in parents
            if parent
        }
    )


def check_made_from(workdir: Workdir, stage: str, vocabulary):
    """Raises RunError when a stage that has a checkpoint was made from something else than there is now.

    What is not there, or was made before stages kept this, is not compared. `vocabulary` is a corpus, or a tokenizer
    where there is no data to compare.
    """
    before, folder = stage_progress(workdir, stage).get("made_from", {}), workdir.path / "stages" / stage
    for name, now in _digests(vocabulary).items():
        if before.get(name) not in (now, None):
            raise RunError(
                f"stage {stage} of {workdir.path} was trained with another {name} ({before[name][:8]}; that of "
                f"{workdir.data_path} is {now[:8]}); put back that data, or delete {folder}"
            )
    for parent in filter(None, map(before.get, ("teacher", "origin"))):
        now = stage_progress(workdir, parent["stage"]).get("weights")
        if None not in (now, parent["weights"]) and now != parent["weights"]:
            raise RunError(
                f"stage {stage} of {workdir.path} was trained from another {parent['stage']} "
                f"({parent['weights'][:8]}; there is {now[:8]} now); delete {folder}, or restore that {parent['stage']}"
            )


def weights_digest(params: dict) -> str:
    """SHA-256 of weights. All processes of a run have to call this together."""
    whole = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        # One at a time: together they may not fit one host.
        if not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        whole.update(jax.tree_util.keystr(path).encode())
        whole.update(np.ascontiguousarray(leaf).data)
    return whole.hexdigest()


def _digests(vocabulary) -> dict[str, str]:
    """By the names that errors call them."""
    digests = {
        "vocabulary": getattr(vocabulary, "vocabulary_digest", None) or getattr(vocabulary, "digest", None),
        "data": getattr(vocabulary, "data_digest", None),
    }
    return {name: digest for name, digest in digests.items() if digest}
