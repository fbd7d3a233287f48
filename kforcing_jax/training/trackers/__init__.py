"""Where curves go besides metrics.jsonl: `registry.TRACKERS` names them, a file each is here."""

from kforcing_jax.training.trackers.fan import Trackers, check_trackers, open_trackers
from kforcing_jax.training.trackers.tracker import TrackedRun, Tracker

__all__ = ["TrackedRun", "Tracker", "Trackers", "check_trackers", "open_trackers"]
