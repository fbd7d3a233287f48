"""The picture of a training."""

import json

import pytest

from kforcing_jax.errors import RunError
from kforcing_jax.evaluation.curves import write_curves


@pytest.fixture
def workdir(tmp_path):
    """A run of three stages, of which k1 was never validated."""
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for stage, window in (("ar", 0), ("k1", 1), ("k2", 2)):
            for step in (500, 1000):
                record = {"stage": stage, "step": step, "loss": 2.0}
                if stage != "k1":
                    agreement = {f"validation_agreement_{j}": 0.5 for j in range(1, window + 1)}
                    record |= {"validation_loss": 2.1, "validation_block_agreement": 0.3} | agreement
                file.write(json.dumps(record) + "\n")
    (tmp_path / "summary.json").write_text(json.dumps({"stages": {"k2": {"chance": [0.2, 0.2]}}}))
    return tmp_path


def test_the_picture_names_stages_axes_and_offsets(workdir):
    svg = write_curves(workdir, workdir / "curves.svg").read_text()
    for words in ("ar", "k1", "k2", "step", "1,000", "loss, nats per token", "agreement with the AR teacher"):
        assert f">{words}</text>" in svg, words
    for label in ("training", "validation", "offset 1", "offset 2", "whole block", "chance"):
        assert svg.count(f">{label}</text>") == 1, label


def test_the_same_run_gives_the_same_picture(workdir):
    first, again = (write_curves(workdir, workdir / f"{name}.svg").read_bytes() for name in ("a", "b"))
    assert first == again
    assert write_curves(workdir, workdir / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_teacher_or_students_alone_can_be_drawn(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    for stage, kept in (("ar", lines[:2]), ("k2", lines[4:])):
        (workdir / "metrics.jsonl").write_text("".join(kept))
        assert f">{stage}</text>" in write_curves(workdir, workdir / "curves.svg").read_text()


def test_without_steps_there_is_no_picture(tmp_path):
    with pytest.raises(RunError, match="no steps yet"):
        write_curves(tmp_path, tmp_path / "curves.svg")
