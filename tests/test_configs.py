"""The configurations of `configs/`: all of them load, and markov reaches what it promises.

What tiny promises is checked on the run of the notebook, in tests/launch/test_colab.py.
"""

import json
import runpy

import pytest
from commands import REPOSITORY, start_command

from kforcing_jax.config import parse

CONFIGS = sorted((REPOSITORY / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_says_how_it_is_run(path):
    module = runpy.run_path(str(path))
    assert parse(module["get_config"]()).students
    assert f"--config=configs/{path.name}" in module["__doc__"]


@pytest.mark.parametrize("name", ["lm1b", "owt"])
def test_the_smoke_variant_is_the_same_run_in_tiny(name):
    get_config = runpy.run_path(str(REPOSITORY / f"configs/{name}.py"))["get_config"]
    real, smoke = parse(get_config()), parse(get_config("smoke"))
    assert list(real.stages) == list(smoke.stages)
    for field in ("source", "packing", "tokenizer", "vocab_size"):
        assert getattr(real.data, field) == getattr(smoke.data, field)
    assert smoke.stages["k4"].bfloat16_fraction == real.stages["k4"].bfloat16_fraction
    assert smoke.model.d_model < real.model.d_model and smoke.stages["k4"].steps < 10


def run_markov(workdir, *flags):
    """summary.json's stages after `main` has run configs/markov.py."""
    # As a user runs it: the settings that make other tests compile faster would make this one train slower.
    settings = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    done = start_command("main", "--config=configs/markov.py", f"--workdir={workdir}", *flags, **settings)
    print(done.out)
    assert done.status == 0, done.err[-2000:]
    assert (workdir / "report.html").stat().st_size > 10_000
    return json.loads((workdir / "summary.json").read_text())["stages"]


@pytest.mark.smoke
def test_a_short_markov_run_is_on_its_way_to_its_teachers_joint_distribution(tmp_path):
    """A fifth of the steps, on sequences of the same chain: a student that ignores its noise has a TV of SHORT_CHANCE."""
    stages = run_markov(tmp_path, *SHORT)
    for name, tolerance in (("k1", 0.05), ("k2", 0.15)):
        assert stages[name]["joint_tv"] <= stages[name]["joint_tv_null"] + tolerance, name


@pytest.mark.full
def test_markov_students_have_their_teachers_joint_distribution(tmp_path):
    stages = run_markov(tmp_path)
    for name, tolerance in (("k1", 0.01), ("k2", 0.01), ("k4-from-ar", 0.05)):
        assert stages[name]["joint_tv"] <= stages[name]["joint_tv_null"] + tolerance, name
    assert {"joint_tv", "joint_tv_null"} <= stages["k4"].keys()
