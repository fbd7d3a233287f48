"""What the stages of a run say of themselves, read without orbax.

Every checkpoint has a JSON item `progress`: `seconds` of training, what the stage was made from (`made_from`), how many
steps it was to have (`lengths`, see training.changed_steps), what validation has found last, and in the last one of a
stage `weights`, a digest by which later stages name what they were made from.
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
from kforcing_jax.workdir import Workdir, complete_steps, write_json


def checkpoint_steps(workdir: Workdir, stage: str) -> list[int]:
    """Steps of the complete checkpoints of a stage, the newest first; none past its last step."""
    settings = workdir.config.stages.get(stage)
    steps = complete_steps(workdir.checkpoints_path(stage))
    return [step for step in steps if settings is None or step <= settings.last_step]


def is_finished(workdir: Workdir, stage: str) -> bool:
    """Whether the stage has its last checkpoint."""
    return workdir.config.stages[stage].last_step in checkpoint_steps(workdir, stage)


def finished_stages(workdir: Workdir) -> list[str]:
    """Finished stages in the order of training."""
    return [name for name in begun_stages(workdir) if is_finished(workdir, name)]


def unfinished_stages(workdir: Workdir) -> list[str]:
    """Stages that have a checkpoint, but not their last one."""
    return [name for name in begun_stages(workdir) if not is_finished(workdir, name)]


def begun_stages(workdir: Workdir) -> list[str]:
    """Stages that have a checkpoint, in the order of training."""
    return [name for name in ["ar", *workdir.config.students] if checkpoint_steps(workdir, name)]


def progress_path(workdir: Workdir, stage: str, step: int) -> Path:
    """What a checkpoint says of itself, as JSON."""
    return workdir.checkpoints_path(stage) / str(step) / "progress" / "metadata"


def stage_progress(workdir: Workdir, stage: str, step: int | None = None) -> dict:
    """What the newest checkpoint, or that of a step, says of itself; {} where there is none."""
    for there in checkpoint_steps(workdir, stage) if step is None else [step]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(progress_path(workdir, stage, there).read_text())
    return {}


def write_progress(workdir: Workdir, stage: str, step: int, progress: dict) -> None:
    """Has a checkpoint say something else of itself. All processes of a run have to call this together.

    Raises:
      RunError: it cannot be written.
    """
    path = progress_path(workdir, stage, step)
    try:
        write_json(path, progress)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("progress written")


def run_vocabulary(workdir: Workdir, tokens: Corpus | Tokenizer) -> Vocabulary:
    """What the models of a run know of its tokens: in the order that weights have kept, or that the configuration says.

    One order for all stages: students start from their teachers' output layers.
    """
    config = workdir.config
    order = next(filter(None, (kept_order(workdir, stage) for stage in config.stages)), None)
    if order is None and config.model.cdf_order == "shuffled":
        order = _order_of_sources(workdir)
    if order is None and config.model.cdf_order == "shuffled":
        order = CdfOrder.shuffled(tokens.vocab_size, config.seed)
    return Vocabulary(tokens.vocab_size, tokens.mask_id, tokens.eos_id, order)


def kept_order(workdir: Workdir, stage: str) -> CdfOrder | None:
    """The order that the weights of a stage have kept; None for that of the ids."""
    tokens_V = stage_progress(workdir, stage).get("made_from", {}).get("cdf_order")
    return CdfOrder(tokens_V) if tokens_V else None


def _order_of_sources(workdir) -> CdfOrder | None:
    """The order of weights that come from other runs. A student is bound to its order, an AR model to none."""
    for name in [*workdir.config.students, "ar"]:
        source = workdir.source(name)
        order = source and kept_order(*source)
        if order:
            return order
    return None


def made_from(workdir: Workdir, stage: str, corpus: Corpus) -> dict:
    """What a stage is about to be made from, as JSON.

    Digests of the vocabulary, the data and its predecessors' weights, and the order of its tokens on [0, 1).
    """
    parents = [*zip(("teacher", "origin"), predecessors(workdir.config, stage), strict=True)]
    if workdir.config.model.adapter_rank and workdir.config.stages[stage].window:
        parents.append(("base", "ar"))
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


def check_made_from(workdir: Workdir, stage: str, vocabulary: Corpus | Tokenizer) -> None:
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
    _check_source(workdir, stage, before.get("init_from"))
    for parent in filter(None, map(before.get, ("teacher", "origin", "base"))):
        there = stage_progress(workdir, parent["stage"]).get("weights")
        if there is not None and parent["weights"] not in (None, there):
            raise RunError(
                f"stage {stage} of {workdir.path} was trained from another {parent['stage']} "
                f"({parent['weights'][:8]}; there is {there[:8]} now); delete {folder}, or restore that "
                f"{parent['stage']}"
            )


def _check_source(workdir, stage, source):
    """A source that went on training since is fine, and so is one that is gone; one trained again is another."""
    try:
        run = Workdir(source["run"]) if source else None
    except RunError:
        return
    if not run or checkpoint_steps(run, source["stage"])[:1] != [source["step"]]:
        return
    now = stage_progress(run, source["stage"]).get("weights")
    if now not in (None, source["weights"]):
        raise RunError(
            f"stage {stage} of {workdir.path} started from another {source['stage']} of {run.path} "
            f"({source['weights'][:8]}; there is {now[:8]} now); delete {workdir.path / 'stages' / stage}, or restore "
            f"that {source['stage']}"
        )


def weights_digest(params: dict) -> str:
    """SHA-256 of weights. All processes of a run have to call this together."""
    whole = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        # One at a time: together they may not fit one host.
        if not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        whole.update(jax.tree_util.keystr(path).encode())
        whole.update(np.ascontiguousarray(leaf).view(np.uint8).data)  # bfloat16 is no buffer
    return whole.hexdigest()


def _digests(vocabulary) -> dict[str, str]:
    """By the names that errors call them."""
    digests = {
        "vocabulary": getattr(vocabulary, "vocabulary_digest", None) or getattr(vocabulary, "digest", None),
        "data": getattr(vocabulary, "data_digest", None),
    }
    return {name: digest for name, digest in digests.items() if digest}
