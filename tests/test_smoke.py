"""The configurations of the paper in tiny, by the commands that a user types, from text to samples."""

import json
import os
import subprocess
import sys

import pytest
from commands import REPOSITORY, run_command
from vocabularies import vocabulary

pytestmark = pytest.mark.smoke


def call(module, *flags):
    """What a command prints that ends well."""
    done = run_command(module, *flags)
    assert done.status == 0, done.err[-2000:]
    return done.out


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """LM1B-shaped data in TFDS's format and a jsonl file, as launch/sample_data.py makes them."""
    folder = tmp_path_factory.mktemp("sample") / "data"
    script = [sys.executable, "launch/sample_data.py", f"--out={folder}", "--sentences=3000"]
    done = subprocess.run(
        script, cwd=REPOSITORY, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize(
    ("config", "path", "tokenizer"),
    [("lm1b", "tfds", "bert-base-uncased"), ("owt", "openwebtext.jsonl", "gpt2")],
)
def test_a_smoke_run_goes_from_text_to_samples(config, path, tokenizer, sample, tmp_path):
    run = f"--workdir={tmp_path / 'run'}"
    flags = [
        f"--config=configs/{config}.py:smoke",
        run,
        f"--config.data.path={sample / path}",
        f"--config.data.tokenizer={vocabulary(tokenizer)}",
    ]
    assert "useful" in call("prepare", *flags)
    out = call("main", *flags)
    assert all(f"\n{stage} " in out for stage in ("ar", "k1", "k2", "k4"))
    _check_figures(json.loads((tmp_path / "run/summary.json").read_text())["stages"])
    generated = json.loads(call("generate", run, "--prompt=the cat", "--k=4", "--json"))
    assert len(generated["tokens"][0]) > 4 and generated["text"][0].lower().startswith("the cat")
    _export_and_use(run, tmp_path, tokenizer)


def _check_figures(stages):
    assert list(stages) == ["ar", "k1", "k2", "k4"]
    assert len(stages["k4"]["agreement"]) == 4
    assert all(stage["tokens_per_second"] > 0 and stage["validation_loss"] < 12 for stage in stages.values())


def _export_and_use(run, folder, tokenizer):
    """The trained models in the released layout: exported, evaluated against each other, completing prefixes."""
    for stage in ("ar", "k4"):
        call("export", run, f"--stage={stage}", f"--output={folder / stage}.safetensors")
    (folder / "prefixes.jsonl").write_text('{"prefix": "the man who was there said that he would"}\n' * 3)
    figures = call(
        "evaluate",
        f"--checkpoint={folder / 'k4.safetensors'}",
        f"--teacher={folder / 'ar.safetensors'}",
        f"--tokenizer={vocabulary(tokenizer)}",
        f"--prefix_file={folder / 'prefixes.jsonl'}",
        "--prefix_length=6",
        "--max_new_tokens=12",
        f"--output_dir={folder / 'samples'}",
        "--json",
    )
    figures = json.loads(figures)
    assert len(figures["agreement"]) == 4 and figures["throughput"]["num_samples"] == 3
    assert len((folder / "samples/samples.jsonl").read_text().splitlines()) == 3
