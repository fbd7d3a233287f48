"""The export command: a finished stage as a file that loads as the same model, one line per mistake."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import refused, run_command
from micro import CONFIG_FILE, micro_config_dict
from trained_runs import chat_run

from kforcing_jax.config import parse
from kforcing_jax.interop import huggingface, official
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.sharding import make_mesh
from kforcing_jax.training import curriculum
from kforcing_jax.training.checkpoints import load_stage
from kforcing_jax.workdir import Workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a finished micro run."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "config.py").write_text(CONFIG_FILE)
    done = run_command("main", f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}")
    assert done.status == 0, done.err
    return folder / "run"


def logits_of(model, params):
    tokens = jnp.array([[0, 1, 2, 3, 0, 1]])
    if isinstance(model, CausalLM):
        return model.apply({"params": params}, tokens)
    noise = jnp.linspace(0.05, 0.95, 12).reshape(1, 6, 2)
    return model.apply({"params": params}, tokens, noise, jnp.array([0.7]))


@pytest.mark.parametrize(
    ("flags", "stage", "kind"),
    [(["--stage=ar"], "ar", CausalLM), (["--stage=k1"], "k1", PushForwardLM), ([], "k2", PushForwardLM)],
)
def test_a_finished_stage_is_written_as_a_file_that_loads_as_the_same_model(run, tmp_path, flags, stage, kind):
    output = tmp_path / "model.safetensors"
    out = run_command("export", f"--workdir={run}", *flags, f"--output={output}")
    assert out.status == 0, out.err
    workdir = Workdir.open(run)
    model, params = load_stage(workdir, stage, workdir.tokenizer())
    loaded_model, loaded = official.load(output)
    assert type(loaded_model) is type(model) is kind
    assert loaded_model.cfg.mask_id == model.cfg.mask_id
    said, config = official.read_note(output), workdir.config
    assert said["seq_len"] == config.data.seq_len and said["prefix_length"] == config.evaluation.prompt_length
    assert said.get("window") == (config.stages[stage].window or None)
    np.testing.assert_array_equal(logits_of(loaded_model, loaded), logits_of(model, params))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert out.out == f"{output}: {kind.__name__} of stage {stage}, {size:,} parameters, vocabulary of 5\n"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.smoke
def test_a_gated_student_of_our_own_backbone_is_a_folder_that_adds_to_the_exported_teacher(tmp_path):
    config = micro_config_dict()
    config.model.adapter_rank = 2
    workdir = Workdir.claim(tmp_path / "run", parse(config))
    curriculum.run(workdir, workdir.corpus(), make_mesh(workdir.config.mesh))
    teacher, student = tmp_path / "ar.safetensors", tmp_path / "k2"
    out = run_command("export", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'k2.safetensors'}")
    refused(out, "model.adapter_rank = 2; write a folder")
    for flags in (["--stage=ar", f"--output={teacher}"], [f"--output={student}"]):
        out = run_command("export", f"--workdir={tmp_path / 'run'}", *flags)
        assert out.status == 0, out.err
    asked = ["--prompt_ids=1,2", "--max_new_tokens=5", "--mode=exact", "--json"]
    here = run_command("generate", f"--checkpoint={student}", f"--base={teacher}", *asked)
    assert here.status == 0, here.err
    there = run_command("generate", f"--workdir={tmp_path / 'run'}", *asked)
    assert json.loads(here.out)["tokens"] == json.loads(there.out)["tokens"]
    refused(run_command("generate", f"--checkpoint={student}", *asked), "give that as the base")


def test_the_template_of_training_comes_along_and_not_the_models(tmp_path):
    path = chat_run(tmp_path, "mine: {{ messages[0].content }}")
    out = run_command("export", f"--workdir={path}", f"--output={tmp_path / 'model'}")
    assert out.status == 0, out.err
    assert huggingface.tokenizer(tmp_path / "model").of_model.chat_template == "mine: {{ messages[0].content }}"


def test_what_there_is_no_stage_or_run_for_is_refused_and_nothing_is_written(run, tmp_path):
    output = f"--output={tmp_path / 'model.safetensors'}"
    unfinished = run_command("export", f"--workdir={run}", "--stage=k8", output)
    refused(unfinished, "--stage=k8 is not a finished stage of this run; finished: ar, k1, k2")
    refused(run_command("export", f"--workdir={tmp_path}", output), f"{tmp_path} is not a run directory")
    refused(run_command("export", output), "--workdir is missing")
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_finished_stage_has_nothing_to_write(run, tmp_path):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    out = run_command("export", f"--workdir={tmp_path}", f"--output={tmp_path / 'model.safetensors'}")
    refused(out, "this run has no finished stage; run kforcing_jax.main on it again")


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("", "--output is missing"),
        (".", "is there, and is not an empty folder"),
        ("file/x.safetensors", "there is no directory {folder}/file"),
        ("missing/x.safetensors", "there is no directory {folder}/missing"),
        ("/dev/null", "--output=/dev/null is there, and is not an empty folder"),
        ("file/model", "there is no directory {folder}/file"),
        ("x.npz", "should end in one of .ckpt, .pt, .safetensors"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_run_is_looked_at(tmp_path, output, says):
    """There is no such run either, and that is not what is reported."""
    (tmp_path / "file").touch()
    output = output and os.path.join(tmp_path, output)
    out = run_command("export", f"--workdir={tmp_path / 'no_run'}", f"--output={output}")
    refused(out, says.format(folder=tmp_path))


def test_a_directory_that_is_not_writable_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("may write everywhere")
    out = run_command("export", f"--workdir={tmp_path}", f"--output={tmp_path / 'model.safetensors'}")
    refused(out, f"the directory {tmp_path} is not writable")


def test_what_only_the_file_system_refuses_is_reported_in_one_line(run):
    out = run_command("export", f"--workdir={run}", f"--output={run / ('x' * 300)}.safetensors")
    refused(out, "File name too long")
