"""The configurations of the paper in tiny, by the commands that a user types, from text to samples."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vocabularies import vocabulary

REPOSITORY = Path(__file__).parents[1]

pytestmark = pytest.mark.smoke


def command(module, *flags):
    return [sys.executable, "-m", f"kforcing_jax.{module}", *map(str, flags)]


def call(module, *flags):
    done = subprocess.run(
        command(module, *flags), cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def environment():
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory):
    """The commands of a run compile the same programs."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cache.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """LM1B-shaped data in TFDS's format and a jsonl file, as launch/sample_data.py makes them."""
    folder = tmp_path_factory.mktemp("sample") / "data"
    script = [sys.executable, "launch/sample_data.py", f"--out={folder}", "--sentences=3000"]
    done = subprocess.run(script, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize(
    ("config", "path", "tokenizer"),
    [("lm1b", "tfds", "bert-base-uncased"), ("owt", "openwebtext.jsonl", "gpt2")],
)
def test_a_smoke_run_goes_from_text_to_samples_and_survives_a_kill(config, path, tokenizer, sample, tmp_path):
    flags = [
        f"--config=configs/{config}.py:smoke",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={sample / path}",
        f"--config.data.tokenizer={vocabulary(tokenizer)}",
    ]
    assert "useful" in call("prepare", *flags)
    _kill_in_stage("k1", flags, tmp_path / "run")
    out = call("main", *flags)
    assert all(f"\n{stage} " in out for stage in ("ar", "k1", "k2", "k4"))
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in steps if record["stage"] == "ar") == 5
    assert sum(record["stage"] == "ar" and record["step"] == 5 for record in steps) == 1, "a finished stage ran again"
    _check_figures(json.loads(call("evaluate", f"--workdir={tmp_path / 'run'}", "--json"))["stages"])
    generated = json.loads(call("generate", f"--workdir={tmp_path / 'run'}", "--prompt=the cat", "--k=4", "--json"))
    assert len(generated["tokens"][0]) > 4 and generated["text"][0].lower().startswith("the cat")
    _export_and_use(tmp_path, tokenizer)


def _kill_in_stage(stage, flags, workdir):
    process = subprocess.Popen(
        command("main", *flags), cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not list((workdir / "stages" / stage / "checkpoints").glob("[0-9]*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workdir / "report.html").exists()


def _check_figures(stages):
    assert list(stages) == ["ar", "k1", "k2", "k4"]
    assert len(stages["k4"]["agreement"]) == 4
    assert all(stage["tokens_per_second"] > 0 and stage["validation_loss"] < 12 for stage in stages.values())


def _export_and_use(tmp_path, tokenizer):
    """The trained models in the released layout: exported, evaluated against each other, completing prefixes."""
    for stage in ("ar", "k4"):
        call("export", f"--workdir={tmp_path / 'run'}", f"--stage={stage}", f"--output={tmp_path / stage}.ckpt")
    (tmp_path / "prefixes.jsonl").write_text('{"prefix": "the man who was there said that he would"}\n' * 3)
    figures = call(
        "evaluate",
        f"--checkpoint={tmp_path / 'k4.ckpt'}",
        f"--teacher={tmp_path / 'ar.ckpt'}",
        f"--tokenizer={vocabulary(tokenizer)}",
        f"--prefix_file={tmp_path / 'prefixes.jsonl'}",
        "--prefix_length=6",
        "--max_new_tokens=12",
        f"--output_dir={tmp_path / 'samples'}",
        "--json",
    )
    figures = json.loads(figures)
    assert len(figures["agreement"]) == 4 and figures["throughput"]["num_samples"] == 3
    assert len((tmp_path / "samples/samples.jsonl").read_text().splitlines()) == 3
