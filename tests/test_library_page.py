"""The programs of docs/library.md, run as they stand there."""

import re
import shlex
import subprocess
import sys

import pytest
from commands import REPOSITORY, run_command

PAGE = (REPOSITORY / "docs/library.md").read_text(encoding="utf-8")
PROGRAMS = dict(re.findall(r'^```python title="([^"]+)"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL))
# What makes minutes of a command seconds.
_SMALL = (
    *("model.num_layers=1", "model.d_model=16", "model.num_heads=1", "data.seq_len=24", "stages.k8=none"),
    *(f"stages.{stage}.{field}" for stage in ("ar", "k1", "k2", "k4") for field in ("steps=2", "batch_size=2")),
    *("evaluation.rows=2", "evaluation.samples=2", "evaluation.batch_size=2", "evaluation.prompt_length=4"),
    *("evaluation.new_tokens=8", "evaluation.speed_batches=1", "evaluation.speed_rounds=1"),
    *("evaluation.confidences=", "logging.log_every=1", "logging.validation_rows=2", "logging.sample_tokens=0"),
)
SMALL = [f"--config.{field}" for field in _SMALL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader has put the page's programs, with poems beside them."""
    folder = tmp_path_factory.mktemp("reader")
    for name, text in PROGRAMS.items():
        (folder / name).write_text(text, encoding="utf-8")
    poem = "The president said that in the end nothing is lost.\nIn the end, the {} said so too.\n"
    names = ("baker", "miller", "smith", "tailor", "king", "queen", "poet", "judge")
    (folder / "poems.txt").write_text("\n***\n".join(map(poem.format, names)), encoding="utf-8")
    return folder


def train(folder, *given):
    (config,) = [word for word in given if word.startswith("--config=")]
    there = f"--config={REPOSITORY / config.removeprefix('--config=')}"
    result = run_command("main", there, *(word for word in given if word != config), *SMALL, cwd=folder)
    assert result.status == 0, result.err
    return result


def output(folder, program):
    done = subprocess.run([sys.executable, program], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_is_opened_and_continues_prompts(folder):
    source = ("--config.data.source=text_files", "--config.data.path=poems.txt")
    train(folder, "--config=configs/tiny.py", "--workdir=runs/tiny", *source, "--config.data.document_separator=***")
    first, *texts = output(folder, "use_a_run.py").splitlines()
    assert first == "k4: 4 tokens per pass, step 2"
    assert len(texts) >= 2 and "The president said" in texts[0]


def test_a_loop_of_ones_own_teaches_a_student(folder):
    teacher, student = output(folder, "train_a_student.py").splitlines()
    assert float(re.search(r"'loss': ([\d.]+)", teacher)[1]) < 0.5  # after the first token, nothing is random
    assert float(re.search(r"'agreement_2': ([\d.]+)", student)[1]) > 0.6


def test_parts_of_ones_own_are_used_without_editing_anything(folder):
    (command,) = re.findall(r"python -m kforcing_jax\.main (.*)", re.sub(r"\\\n\s*", "", PAGE))
    result = train(folder, *shlex.split(command))
    assert "tracking poems" in result.out and re.search(r"^k4 2 [\d.]+$", result.out, re.MULTILINE)
    tokenizer = (folder / "runs/poems/data/tokenizer.json").read_text(encoding="utf-8")
    assert '"*"' not in tokenizer  # the stars part poems, and are in none
