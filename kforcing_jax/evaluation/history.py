"""What the stages of a run said while they trained: metrics.jsonl, read back for plots."""

import collections
import json
import math
from collections.abc import Sequence
from pathlib import Path

from kforcing_jax.evaluation.tables import in_order, is_number

# Points of a plotted line; longer histories are averaged down to this many.
_MOST_POINTS = 250


def read_history(path: Path) -> dict[str, list[dict]]:
    """The records of each stage in the order of their steps, one per step: of training, validation, or both.

    A run that resumes from a checkpoint reports steps again; the records that it had after that checkpoint belong to
    no model any more. A line that is no record, such as one that a kill cut short, is skipped. {} without a file.
    """
    history: dict[str, list[dict]] = collections.defaultdict(list)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            stage, step = str(record["stage"]), int(record["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
        before = history[stage]
        while before and before[-1]["step"] > step:
            before.pop()
        same = before.pop() if before and before[-1]["step"] == step else {}
        before.append(same | record | {"step": step})
    return in_order(history)


def over(records: Sequence[dict], x: str, y: str) -> list[tuple[float, float]]:
    """Points (x, y) of the records that have both, averaged in equal groups when there are too many to see."""
    points = [(record[x], record[y]) for record in records if is_number(record.get(x)) and is_number(record.get(y))]
    size = max(math.ceil(len(points) / _MOST_POINTS), 1)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(_mean(group, 0), _mean(group, 1)) for group in groups]


def _mean(points, axis):
    return sum(point[axis] for point in points) / len(points)
