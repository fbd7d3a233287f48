"""`python -m kforcing_jax.serve`, as a user starts and ends it."""

import json
import re
import socket

import httpx
import jax
import pytest
from commands import refused, run_command
from interop.families import TEACHER, write_teacher
from micro import micro_config
from serving_process import Serving
from trained_runs import chat_run

from kforcing_jax.decoding import memory
from kforcing_jax.errors import ConfigError
from kforcing_jax.interop import official
from kforcing_jax.models import CausalLM, ModelConfig, init_params
from kforcing_jax.serving import plan
from kforcing_jax.sharding import make_mesh
from kforcing_jax.training import curriculum
from kforcing_jax.workdir import Workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished micro run."""
    folder = tmp_path_factory.mktemp("serve") / "micro"
    workdir = Workdir.claim(folder, micro_config())
    curriculum.run(workdir, workdir.corpus(), make_mesh(workdir.config.mesh))
    return folder


@pytest.mark.smoke
def test_it_says_what_it_compiled_and_has_serves_and_ends_with_a_signal(run):
    serving = Serving(f"--workdir={run}", "--slots=2", KFORCING_API_KEY="a-secret")
    said = "".join(serving.lines)
    assert len(re.findall(r"^compiled .+\d\.\d s$", said, re.MULTILINE)) > 6
    assert re.search(r"^memory of a device: weights \d+ MB, slots and their caches \d+ MB, programs \d+ MB", said, re.M)
    assert "2 slots of 8 tokens, modes student, ar, exact, windows of up to 2" in said and serving.name == "micro"
    assert httpx.get(f"{serving.url}/health").json() == {"status": "ready"}
    assert httpx.get(f"{serving.url}/v1/models").status_code == 401
    key = {"Authorization": "Bearer a-secret"}
    fields = {"prompt": "012", "max_tokens": 5, "seed": 3}
    texts = {}
    for mode in ("student", "ar", "exact"):
        answer = httpx.post(f"{serving.url}/v1/completions", json=fields | {"mode": mode}, headers=key, timeout=60)
        texts[mode] = answer.json()["choices"][0]["text"]
    status, later = serving.end()
    assert status == 0 and later == "" and "a-secret" not in said
    assert texts["exact"] == texts["ar"]
    flags = [f"--workdir={run}", "--prompt=012", "--seed=3", "--max_new_tokens=5", "--json"]
    for mode, text in texts.items():
        assert json.loads(run_command("generate", *flags, f"--mode={mode}").out)["text"] == ["012" + text]


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "--workdir"),
        (["--workdir=RUN", "--checkpoint=x.ckpt"], "--workdir"),
        (["--workdir=/nowhere/run"], "no config.json"),
        (["--workdir=RUN", "--k=3"], "largest trained window, 2"),
        (["--workdir=RUN", "--stage=k8"], "k8"),
        (["--workdir=RUN", "--max_length=9"], "8 tokens of the texts of training"),
        (["--workdir=RUN", "--mode=exact", "--stage=ar"], "--mode=exact is not possible"),
        (["--workdir=RUN", "--confidence=2"], "--confidence=2.0"),
        (["--workdir=RUN", "--tensor=3"], "2 key/value heads"),
        (["--workdir=RUN", "--teacher=x.ckpt"], "--teacher has no effect"),
        (["--workdir=RUN", "--num_samples=2"], "--num_samples has no effect"),
        (["--workdir=RUN", "--port=70000"], "port"),
        (["--workdir=RUN", "--host=no.such.host.invalid"], "--host=no.such.host.invalid"),
        (["--workdir=RUN", "--chat_template=/nowhere.jinja"], "/nowhere.jinja"),
        (["--checkpoint=/nowhere.ckpt"], "/nowhere.ckpt"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(run, flags, says):
    flags = [flag.replace("RUN", str(run)) for flag in flags]
    refused(run_command("serve", *flags, *([] if "--port=70000" in flags else ["--port=0"])), says)


@pytest.mark.parametrize(
    "sizes, says",
    [
        ({}, "the 2 key/value heads"),
        ({"num_key_value_heads": 4, "intermediate_size": 50}, "the 50 columns of the MLP"),
        ({"num_key_value_heads": 4, "hidden_size": 34, "head_dim": 8}, "the 34 channels"),
    ],
)
def test_devices_that_do_not_divide_what_they_share_are_refused(tmp_path, sizes, says):
    folder = write_teacher(tmp_path / "model", TEACHER | sizes)
    result = run_command("serve", f"--checkpoint={folder}", "--tensor=4", "--max_length=8", "--slots=1", "--port=0")
    refused(result, f"--tensor=4 does not divide {says} of the model")


def test_slots_are_counted_once_the_stacked_weights_are_gone(tmp_path, monkeypatch):
    folder, shapes = write_teacher(tmp_path / "model", TEACHER | {"intermediate_size": 52}), []

    def counted(engine_of, most):
        shapes.extend(array.shape for array in jax.live_arrays())
        raise ConfigError(f"{most} slots were asked for")

    monkeypatch.setattr(memory, "slots_that_fit", counted)
    result = run_command("serve", f"--checkpoint={folder}", "--port=0", "--max_length=16")
    assert result.status == 2 and "16 slots were asked for" in result.err, result.err
    assert shapes.count((32, 52)) == 2 * 2 and (2, 32, 52) not in shapes


def test_a_run_is_served_with_the_template_of_its_training_and_not_with_the_models(tmp_path, monkeypatch):
    own = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    path = chat_run(tmp_path, own)
    (tmp_path / "flag.jinja").write_text("{{ eos_token }}")
    said = []

    def served(**fields):
        said.append(fields["chat_template"].render([{"role": "user", "content": "hi"}]))
        raise ConfigError("that is all")

    monkeypatch.setattr(plan, "Served", served)
    for flags in ([], [f"--chat_template={tmp_path / 'flag.jinja'}"]):
        refused(run_command("serve", f"--workdir={path}", "--slots=1", "--port=0", *flags), "that is all")
    assert said == ["<|im_start|>hi<|im_end|>", "<|im_end|>"]


def test_a_model_is_called_as_its_folder_or_file(tmp_path, monkeypatch):
    names = []

    def served(**fields):
        names.append(fields["name"])
        raise ConfigError("that is all")

    monkeypatch.setattr(plan, "Served", served)
    folder = write_teacher(tmp_path / "Some-3.2-1B")
    cfg = ModelConfig(vocab_size=5, mask_id=4, num_layers=1, d_model=8, num_heads=1)
    official.save(tmp_path / "ar-1.5.safetensors", CausalLM(cfg), init_params(CausalLM(cfg), jax.random.key(0)))
    for path in (folder, ".", tmp_path / "ar-1.5.safetensors"):
        flags = [f"--checkpoint={path}", "--slots=1", "--max_length=16", "--port=0"]
        assert "that is all" in run_command("serve", *flags, cwd=folder).err
    assert names == ["Some-3.2-1B", "Some-3.2-1B", "ar-1.5"]


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(run):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = run_command("serve", f"--workdir={run}", f"--port={port}")
    refused(result, f"--port={port}", "in use")


@pytest.mark.parametrize("key", ["", " \n", "schlüssel"])
def test_a_key_that_nobody_could_give_is_refused(run, monkeypatch, key):
    monkeypatch.setenv("KFORCING_API_KEY", key)
    refused(run_command("serve", f"--workdir={run}", "--port=0"), "KFORCING_API_KEY")
