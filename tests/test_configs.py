"""The configurations of `configs/`: all of them load, and markov reaches what it promises.

What tiny promises is checked on the run of the notebook, in tests/launch/test_colab.py.
"""

import dataclasses
import json
import runpy

import pytest
from commands import REPOSITORY, run_command, start_command
from golden_configs import CONFIGS, golden_path, text_of

from kforcing_jax.config import parse
from kforcing_jax.errors import ConfigError


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_says_how_it_is_run(path):
    module = runpy.run_path(str(path))
    assert parse(module["get_config"]()).students
    assert f"--config=configs/{path.name}" in module["__doc__"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_field_changes_unseen(path):
    assert text_of(path) == golden_path(path).read_text(encoding="utf-8"), (
        "if it is meant: python tests/golden_configs.py, and look at the diff"
    )


@pytest.mark.parametrize("name", ["lm1b", "owt"])
def test_the_smoke_variant_is_the_same_run_in_tiny(name):
    get_config = runpy.run_path(str(REPOSITORY / f"configs/{name}.py"))["get_config"]
    real, smoke = parse(get_config()), parse(get_config("smoke"))
    assert list(real.stages) == list(smoke.stages)
    for field in ("source", "packing", "tokenizer", "vocab_size"):
        assert getattr(real.data, field) == getattr(smoke.data, field)
    assert smoke.stages["k4"].bfloat16_fraction == real.stages["k4"].bfloat16_fraction
    assert smoke.model.d_model < real.model.d_model and smoke.stages["k4"].steps < 10


def test_smollm2_in_tiny_is_the_same_model_and_text_as_with_chats():
    get_config = runpy.run_path(str(REPOSITORY / "configs/smollm2.py"))["get_config"]
    chat, smoke = parse(get_config("chat")), parse(get_config("smoke"))
    assert chat.model == smoke.model and list(chat.stages) == list(smoke.stages)
    assert dataclasses.replace(smoke.data, seq_len=chat.data.seq_len) == chat.data
    for name, stage in chat.stages.items():
        sampled = [(each.checkpoint, each.tau_min, each.tau_max, each.top_p) for each in (stage, smoke.stages[name])]
        assert sampled[0] == sampled[1]
    assert parse(get_config()).data.source == "news"
    with pytest.raises(ConfigError, match="has no variant 'huge'; it has chat and smoke"):
        get_config("huge")


def test_llama_is_filled_in_by_its_teacher_or_as_one_of_8b():
    get_config = runpy.run_path(str(REPOSITORY / "configs/llama.py"))["get_config"]
    usual, large = parse(get_config()), parse(get_config("8b"))
    assert usual.stages == large.stages and (usual.model.num_layers, usual.data.vocab_size) == (4, 96)
    config = large.model  # 8,030,261,248 parameters, says its model card
    blocks = config.num_layers * (config.block_entries + 2 * config.d_model)
    assert blocks + config.d_model * (1 + 2 * large.data.vocab_size) == 8_030_261_248
    with pytest.raises(ConfigError, match="has no variant 'huge'; it has 8b"):
        get_config("huge")


@pytest.mark.parametrize(("name", "variant"), [("tiny", "x4"), ("news", "gpu")])
def test_a_larger_variant_has_the_stages_of_the_file_and_more_of_something(name, variant):
    get_config = runpy.run_path(str(REPOSITORY / f"configs/{name}.py"))["get_config"]
    usual, larger = parse(get_config()), parse(get_config(variant))
    assert list(usual.stages) == list(larger.stages)
    for stage in usual.stages:
        assert larger.stages[stage].steps >= usual.stages[stage].steps
        assert larger.stages[stage].batch_size >= usual.stages[stage].batch_size
    assert usual != larger
    with pytest.raises(ConfigError, match=f"has no variant 'huge'; it has {variant}"):
        get_config("huge")


SHORT_MARKOV = """
import runpy
def get_config():
    config = runpy.run_path("configs/markov.py")["get_config"]()
    config.unlock()
    del config.stages["k4"], config.stages["k4_from_ar"]
    for name, steps in (("ar", 300), ("k1", 400), ("k2", 300)):
        config.stages[name].steps = steps
    config.evaluation.joint_samples = 5000
    config.evaluation.speed_batches = (8,)
    return config
"""


@pytest.mark.smoke
def test_a_short_markov_run_comes_near_its_teachers_joint_distribution(tmp_path):
    """A student that ignores its noise has a TV of 0.7 and more; these come within 0.01 and 0.02 of the null."""
    (tmp_path / "short.py").write_text(SHORT_MARKOV)
    done = run_command("main", f"--config={tmp_path / 'short.py'}", f"--workdir={tmp_path / 'run'}")
    assert done.status == 0, done.err[-2000:]
    check_markov(tmp_path / "run", k1=0.03, k2=0.08)


@pytest.mark.full
def test_markov_students_have_their_teachers_joint_distribution(tmp_path):
    # As a user runs it: the settings that make other tests compile faster would make this one train slower.
    settings = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    done = start_command("main", "--config=configs/markov.py", f"--workdir={tmp_path}", **settings)
    print(done.out)
    assert done.status == 0, done.err[-2000:]
    check_markov(tmp_path, k1=0.01, k2=0.01, **{"k4-from-ar": 0.05})


def check_markov(workdir, **tolerances):
    """Total variations within a tolerance of those of samples of the teacher itself."""
    assert (workdir / "report.html").stat().st_size > 10_000
    stages = json.loads((workdir / "summary.json").read_text())["stages"]
    for name, tolerance in tolerances.items():
        assert stages[name]["joint_tv"] <= stages[name]["joint_tv_null"] + tolerance, name
