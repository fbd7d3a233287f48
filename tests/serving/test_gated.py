"""A server, a command and a run of a gated student: all modes, and no second model."""

import json
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from commands import refused, run_command
from micro import micro_config_dict

from kforcing_jax.config import parse
from kforcing_jax.decoding import Engine, generate
from kforcing_jax.models import CausalLM
from kforcing_jax.serving.metrics import Metrics, Times
from kforcing_jax.sharding import make_mesh
from kforcing_jax.training import checkpoints, curriculum
from kforcing_jax.training.checkpoints import load_stage
from kforcing_jax.training.runs import load_run
from kforcing_jax.workdir import Workdir

SIZES = {"slots": 2, "max_length": 8, "k": 2}
SAMPLED = {"steps": 5, "batch_size": 4, "learning_rate": 1e-2, "tau_min": 0.5, "tau_max": 0.7, "top_p": 0.6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a finished micro run whose students are gated, and sampled as people sample."""
    config = micro_config_dict(**{name: SAMPLED | {"window": k} for name, k in (("k1", 1), ("k2", 2))})
    config.model.adapter_rank, config.evaluation.tau = 2, 0.6
    workdir = Workdir.claim(tmp_path_factory.mktemp("gated") / "micro", parse(config))
    curriculum.run(workdir, workdir.corpus(), make_mesh(workdir.config.mesh))
    return workdir.path


@pytest.fixture(scope="module")
def run(folder):
    return load_run(folder)


def test_a_run_of_a_gated_student_has_its_teacher(run, monkeypatch):
    monkeypatch.setattr("kforcing_jax.training.runs.load_stage", lambda *_: pytest.fail("a second model is read"))
    model, params = run.teacher
    assert isinstance(model, CausalLM) and params is run.params
    settings = {"max_new_tokens": 5, "seeds": [3, 4]}
    ar, exact = (run.generate([[1, 2], [0]], mode=mode, **settings) for mode in ("ar", "exact"))
    two_passes = run.generate([[1, 2], [0]], mode="exact", exact_windows=0, **settings)
    monkeypatch.undo()
    expected = generate(*load_stage(run.workdir, "ar", run.tokenizer), [[1, 2], [0]], tau=0.6, top_p=0.6, **settings)
    for found in (ar, exact, two_passes):
        np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_a_server_of_a_gated_student_has_all_modes(run, module_start):
    engine = Engine(student=(run.model, run.params), **SIZES)
    engine.warm_up()
    server = module_start(engine, tokenizer=None)
    answers = {}
    for mode in ("student", "ar", "exact"):
        asked = {"prompt": [1, 2], "max_tokens": 5, "seed": 3, "mode": mode}
        asked |= {} if mode == "student" else {"logprobs": 2, "top_p": 0.9}
        answers[mode] = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=120).json()
    assert answers["exact"]["choices"][0]["text"] == answers["ar"]["choices"][0]["text"]
    assert answers["ar"]["usage"]["passes"] == 5 and answers["student"]["usage"]["passes"] == 3
    assert all(answer["usage"]["teacher_passes"] == 0 for answer in answers.values())


@pytest.fixture
def loads(monkeypatch):
    """The stages whose weights are read, in order."""
    stages, real = [], checkpoints.load_checkpoint

    def load(workdir, stage, *args, **settings):
        stages.append(stage)
        return real(workdir, stage, *args, **settings)

    monkeypatch.setattr(checkpoints, "load_checkpoint", load)
    return stages


def test_commands_read_a_gated_stage_and_no_teacher_beside_it(folder, loads):
    flags, answers = [f"--workdir={folder}", "--prompt=012", "--num_samples=6", "--max_new_tokens=4", "--json"], []
    for more in (["--mode=ar"], ["--mode=exact"], ["--mode=exact", "--exact_windows=0"]):
        answers.append(json.loads(run_command("generate", *flags, *more).out)["text"])
        assert loads.count("ar") == 1  # the base of the student, or the teacher alone
        loads.clear()
    assert answers[0] == answers[1] == answers[2], "all at what the students were trained with"
    assert json.loads(run_command("generate", *flags, "--mode=ar", "--tau=1", "--top_p=1").out)["text"] != answers[0]
    for same in (["--mode=ar", "--tau=0.6", "--top_p=0.6"], ["--stage=ar"]):
        assert json.loads(run_command("generate", *flags, *same).out)["text"] == answers[0]
    refused(run_command("generate", *flags, "--exact_windows=1"), "--exact_windows has no effect with --mode=student")
    refused(run_command("generate", *flags, "--mode=exact", "--exact_windows=3"), "exact_windows = 3 should be")


def test_the_server_of_a_run_holds_a_gated_student_once(folder, loads, monkeypatch):
    apps = []
    monkeypatch.setattr("kforcing_jax.serving.server.serve", lambda app, bound, *_: (apps.append(app), bound.close()))
    result = run_command("serve", f"--workdir={folder}", "--slots=2", "--port=0", "--exact_windows=1")
    assert result.status == 0 and "modes student, ar, exact, windows of up to 2" in result.err
    served = apps[0].state.service.served
    engine = served.engine
    assert (served.tau_range, served.usual_tau, served.top_p) == ((0.5, 0.7), 0.6, 0.6)
    assert engine.models.names == ("student",) and engine.models.exact_windows == 1
    assert loads == ["k2", "ar"]


def test_in_one_pass_the_first_token_of_a_window_is_no_draft():
    metrics = Metrics("tiny", exact_in_one_pass=True)
    wanted = SimpleNamespace(request=SimpleNamespace(mode="exact", k=None))
    usage = SimpleNamespace(prompt=3, completion=6, passes=4, student_passes=4, teacher_passes=0)
    metrics.ended(Times(0.0), SimpleNamespace(usage=usage, reason="stop", wanted=wanted), (4, 2, 1, 0), 0.3)
    said = metrics.text().decode()
    assert 'vllm:spec_decode_num_draft_tokens_total{model_name="tiny"} 8.0' in said  # k = 3: two a pass
    assert 'vllm:spec_decode_num_accepted_tokens_total{model_name="tiny"} 3.0' in said
