"""What a configuration chooses by name: losses, objectives, schedules, optimisers, trackers. New ones are entries here.

An entry says where it is, as module:attribute, and is imported when it is needed: configurations are read before
anything heavy is. In place of a name, a configuration may also say module:attribute itself, so that one's own needs no
entry: `--config.stages.k1.loss=my_losses:focal`. Sources of text have their table in `data/choices.py`.
"""

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from kforcing_jax.errors import ConfigError


class Table(Mapping[str, str]):
    """Names, and the module:attribute that each stands for. `kind` is what errors call an entry: "a loss"."""

    def __init__(self, kind: str, entries: Mapping[str, str]):
        self._kind, self._entries = kind, dict(entries)

    def __getitem__(self, name: str) -> str:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def check(self, field: str, name: str) -> None:
        """Raises ConfigError, calling the field by its name, for a name that is no entry and no module:attribute.

        Whether there is such a module is not looked at: a run can be read where it could not be trained.
        """
        if name not in self._entries and not is_own(name):
            raise ConfigError(
                f"{field} = {name!r} is not one of {', '.join(self)}, nor module:attribute of {self._kind} of your own"
            )

    def find(self, name: str) -> Any:
        """What the name stands for, imported now. Raises ConfigError when that fails."""
        return imported(self._entries.get(name, name), self._kind)


def is_own(name: str) -> bool:
    """Whether the name is module:attribute, of something that has no entry."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def check_module(field: str, name: str) -> None:
    """Raises ConfigError when the module of module:attribute cannot be found; it is not imported."""
    module = name.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise ConfigError(
            f"{field} = {name!r}: there is no module {module}; {module.replace('.', '/')}.py should be in the current "
            "folder, or installed"
        )


def imported(name: str, kind: str) -> Any:
    """What module:attribute is. Raises ConfigError when there is none, or its module fails."""
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ConfigError:  # it says itself what is missing
        raise
    except Exception as error:  # it is somebody's code: anything can be raised
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name!r} cannot be imported as {kind}: {type(error).__name__}: {reason}") from None
    if not hasattr(found, attribute):
        raise ConfigError(f"{name!r} is not {kind}: module {module} has no {attribute}")
    return getattr(found, attribute)


# (logits_xV, targets_x) -> loss_x: of a student's token, in nats; see `training.losses.cross_entropy`.
LOSSES = Table(
    "a loss",
    {"cross_entropy": "kforcing_jax.training.losses:cross_entropy"},
)
# (model, teacher, stage, eos_id) -> Objective: the whole of what a stage minimises, see `training.objectives`; the AR
# teacher's own teacher is None.
OBJECTIVES = Table(
    "an objective",
    {
        "language_modelling": "kforcing_jax.training.objectives:language_modelling",
        "distillation": "kforcing_jax.training.objectives:distillation",
    },
)
# (stage, steps) -> (step) -> rate: the learning rate after the warm-up, see `training.optimizer`.
SCHEDULES = Table(
    "a schedule",
    {
        "constant": "kforcing_jax.training.optimizer:constant",
        "cosine": "kforcing_jax.training.optimizer:cosine",
        "linear": "kforcing_jax.training.optimizer:linear",
        "wsd": "kforcing_jax.training.optimizer:warmup_stable_decay",
    },
)
# (stage) -> optax.GradientTransformation, which clipping comes before, see `training.optimizer`.
OPTIMIZERS = Table(
    "an optimizer",
    {
        "adamw": "kforcing_jax.training.optimizer:adamw",
        "muon": "kforcing_jax.training.optimizer:muon",
    },
)
# () -> Tracker: where curves go besides metrics.jsonl, see `training.trackers`.
TRACKERS = Table(
    "a tracker",
    {
        "tensorboard": "kforcing_jax.training.trackers.tensorboard:TensorBoard",
        "wandb": "kforcing_jax.training.trackers.weights_and_biases:WeightsAndBiases",
    },
)
