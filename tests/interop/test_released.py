"""Released files in use: with their tokenizers, in the commands, and as the teacher of a curriculum."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import refused, run_command
from interop.families import write_teacher
from micro import micro_config, micro_config_dict
from vocabularies import vocabulary

from kforcing_jax.config import DataConfig, MeshConfig, parse
from kforcing_jax.data.pretrained import digest
from kforcing_jax.data.tokenizers import train_tokenizer
from kforcing_jax.errors import DataError, RunError
from kforcing_jax.evaluation.released import evaluate_released
from kforcing_jax.interop import huggingface, official
from kforcing_jax.interop.released import check_teacher_of, load_for, open_released, open_teacher
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM, init_params
from kforcing_jax.models.gated import base_params, with_own
from kforcing_jax.sharding import make_mesh
from kforcing_jax.training import curriculum
from kforcing_jax.training.checkpoints import finished_stages, load_stage
from kforcing_jax.training.recipes import Vocabulary, stage_model
from kforcing_jax.workdir import Workdir


def write_released(path, vocab_size, mask_id, student, num_layers=2, d_model=16, num_heads=2, **note):
    cfg = ModelConfig(
        vocab_size=vocab_size, mask_id=mask_id, num_layers=num_layers, d_model=d_model, num_heads=num_heads
    )
    model = (PushForwardLM if student else CausalLM)(cfg)
    shapes, rng = jax.eval_shape(lambda: init_params(model, jax.random.key(0))), np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)
    official.save(path, model, params, **note)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints of the released vocabularies."""
    folder = tmp_path_factory.mktemp("released")
    sizes = {"lm1b": (30_522, 103), "owt": (50_258, 50_257)}
    return {
        (data, kind): write_released(folder / f"{kind}_{data}.safetensors", *size, student=kind == "pflm")
        for data, size in sizes.items()
        for kind in ("ar", "pflm")
    }


BERT = ("lm1b", "bert-base-uncased")
GPT2 = ("owt", "gpt2")


@pytest.mark.parametrize(("data", "name"), [BERT, GPT2])
@pytest.mark.parametrize("kind", ["ar", "pflm"])
def test_a_released_file_continues_a_prompt(files, data, name, kind):
    out = run_command(
        "generate",
        f"--checkpoint={files[data, kind]}",
        f"--tokenizer={vocabulary(name)}",
        "--prompt=The bank also",
        "--max_new_tokens=6",
        *(["--k=2"] if kind == "pflm" else []),
        "--json",
    )
    assert out.status == 0, out.err
    result = json.loads(out.out)
    tokenizer = open_released(files[data, kind], str(vocabulary(name))).tokenizer
    prompt = tokenizer.encode_prompt("The bank also")
    assert result["tokens"][0][: len(prompt)] == prompt
    assert len(result["tokens"][0]) <= len(prompt) + 6
    assert result["passes"][0] <= (6 if kind == "ar" else 3)


def test_ids_need_no_tokenizer(files, monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = [f"--checkpoint={files['lm1b', 'pflm']}", "--max_new_tokens=4"]
    out = run_command("generate", *flags, "--prompt_ids=101,1996", "--json")
    assert out.status == 0 and "bert-base-uncased is not here" in out.err
    assert json.loads(out.out)["tokens"][0][:2] == [101, 1996]
    refused(run_command("generate", *flags, "--prompt=the"), "tokenizer 'bert-base-uncased'", "tokenizer.json")


def test_prefixes_are_completed_and_bad_lines_reported(files, tmp_path):
    lines = ['{"prefix": "[CLS] the bank also reported that it"}', "", "{", '{"prefix": "[CLS] short"}']
    (tmp_path / "prefixes.jsonl").write_text("\n".join(lines) + "\n")
    out = run_command(
        "generate",
        f"--checkpoint={files['lm1b', 'pflm']}",
        f"--tokenizer={vocabulary('bert-base-uncased')}",
        f"--prefix_file={tmp_path / 'prefixes.jsonl'}",
        f"--output_dir={tmp_path / 'out'}",
        "--num_samples=2",
    )
    assert out.status == 0, out.err
    assert [line.split(": ")[0].split(", ")[1] for line in out.err.strip().splitlines()] == [
        "line 2",
        "line 3",
        "line 4",
    ]
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [sample["prefix"] for sample in samples] == ["[CLS] the bank also reported that"] * 2
    assert samples[0]["completion"] != samples[1]["completion"]
    throughput = json.loads((tmp_path / "out/throughput.json").read_text())
    assert (throughput["prefix_len"], throughput["max_new_tokens"], throughput["K_per_step"]) == (6, 122, 4)


def test_a_student_is_evaluated_against_its_teacher(files, tmp_path):
    (tmp_path / "prefixes.jsonl").write_text('{"prefix": "[CLS] the bank also reported that it"}\n' * 2)
    flags = [
        f"--checkpoint={files['lm1b', 'pflm']}",
        f"--tokenizer={vocabulary('bert-base-uncased')}",
        f"--prefix_file={tmp_path / 'prefixes.jsonl'}",
        "--max_new_tokens=6",
        "--k=2",
    ]
    out = run_command(
        "evaluate", *flags, f"--teacher={files['lm1b', 'ar']}", f"--output_dir={tmp_path / 'out'}", "--json"
    )
    assert out.status == 0, out.err
    figures = json.loads(out.out)
    assert len(figures["agreement"]) == len(figures["chance"]) == 2
    assert {"sample_nll_interval", "sample_entropy", "distinct_2", "repetition_4", "throughput"} <= figures.keys()
    low, high = figures["sample_nll_interval"]
    assert low <= figures["sample_nll"] <= high
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == figures
    refused(
        run_command("evaluate", *flags, f"--teacher={files['lm1b', 'pflm']}"), "is a student", "give the AR checkpoint"
    )
    refused(run_command("evaluate", *flags, f"--teacher={files['owt', 'ar']}"), "50258 ids", "30522")
    refused(run_command("evaluate", f"--checkpoint={files['lm1b', 'pflm']}"), "--prefix_file is missing")
    refused(run_command("evaluate", *flags, f"--scorer={tmp_path / 'none'}"), "scorer", "no such folder")


def test_a_tokenizer_of_another_vocabulary_is_refused(files):
    with pytest.raises(DataError, match=r"30522 ids, of which 103 is the mask; .*owt\.safetensors has 50258 and 50257"):
        open_released(files["owt", "ar"], str(vocabulary("bert-base-uncased")))


# The micro configuration's chain has four states and a mask.
@pytest.fixture
def released_teacher(tmp_path):
    return write_released(tmp_path / "ar.safetensors", 5, 4, student=False)


def with_teacher(path, **model):
    config = micro_config_dict()
    config.stages.ar.checkpoint = str(path)
    config.model.update(model)
    return parse(config)


def test_a_released_teacher_takes_the_place_of_training(released_teacher, tmp_path):
    config = with_teacher(released_teacher)
    check_teacher_of(config)
    workdir = Workdir.claim(tmp_path / "run", config)
    corpus = workdir.corpus()
    curriculum.run(workdir, corpus, make_mesh(config.mesh))
    assert finished_stages(workdir) == ["ar", "k1", "k2"]
    model, params = load_stage(workdir, "ar", corpus)
    _, expected = official.load(released_teacher)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert workdir.summary()["stages"]["ar"]["steps"] == 0
    records = [json.loads(line) for line in workdir.metrics_path.read_text().splitlines()]
    assert {record["stage"] for record in records} == {"k1", "k2"}
    # And the first student was taught by it: both start from the same weights.
    tokens_1xN = jnp.zeros((1, 4), jnp.int32)
    assert jnp.isfinite(model.apply({"params": params}, tokens_1xN)).all()
    curriculum.run(workdir, corpus, make_mesh(config.mesh))
    assert len(workdir.metrics_path.read_text().splitlines()) == len(records), "something was trained again"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"d_model": 32}, "has d_model = 16, model.d_model says 32"),
        ({"num_layers": 3}, "has num_layers = 2, model.num_layers says 3"),
        ({"num_heads": 4}, "has num_heads = 2, model.num_heads says 4"),
    ],
)
def test_a_teacher_of_another_shape_is_refused_before_anything_happens(released_teacher, model, message):
    with pytest.raises(RunError, match=message):
        check_teacher_of(with_teacher(released_teacher, **model))


def test_a_teacher_has_to_be_an_ar_model_of_the_datas_vocabulary(released_teacher, tmp_path):
    student = write_released(tmp_path / "student.safetensors", 5, 4, student=True)
    with pytest.raises(RunError, match="is a student, the teacher of a curriculum is an AR model"):
        check_teacher_of(with_teacher(student))
    config = micro_config()
    larger = dataclasses.replace(config.data, markov_states=6)
    model = stage_model(dataclasses.replace(config, data=larger), "ar", Vocabulary(7, 6, None))
    with pytest.raises(RunError, match="has vocab_size = 5, the tokenizer of the data says 7"):
        load_for(released_teacher, model)


def test_an_exported_student_keeps_to_what_its_file_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_released(tmp_path / "k2.safetensors", 13, 12, student=True, window=2, seq_len=12, eos_id=3)
    flags = ["--checkpoint=~/k2.safetensors", "--prompt_ids=1,2", "--json"]
    assert json.loads(run_command("generate", *flags, "--max_new_tokens=6").out)["passes"] == [3]
    refused(run_command("generate", *flags, "--k=3"), "k = 3 exceeds the window", "trained with, 2")
    refused(run_command("generate", *flags, "--max_new_tokens=11"), "2 tokens and 11 new ones", "of 12 positions")
    refused(run_command("generate", *flags, "--top_p=0.9"), "--top_p=0.9 is none", "trained with (1)")
    released = open_released(tmp_path / "k2.safetensors")
    assert (released.window, released.seq_len, released.eos_id, released.tau_range) == (2, 12, 3, None)
    assert released.top_p == 1


@pytest.mark.parametrize("what", ["teacher", "ordinary", "gated"])
def test_a_folder_is_loaded_in_a_dtype_and_onto_a_mesh_at_once(tmp_path, monkeypatch, what):
    teacher = write_teacher(tmp_path / "teacher")
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2])
    if what != "teacher":
        cfg = huggingface.load(teacher)[0].cfg
        model = PushForwardLM(dataclasses.replace(cfg, adapter_rank=2 if what == "gated" else 0))
        params = init_params(model, jax.random.key(0))
        if what == "gated":
            params = with_own(params, huggingface.load(teacher)[1])
        huggingface.save(tmp_path / what, model, params, base=str(teacher), window=2, tau_min=1.0, tau_max=1.0)
    placed = []
    monkeypatch.setattr(jax, "make_array_from_callback", recorded(jax.make_array_from_callback, placed))
    released = open_released(tmp_path / what, needs_tokenizer=False, dtype="bfloat16", mesh=mesh)
    text = base_params(released.params)["backbone"]
    assert text["embedding"]["embedding"].dtype == text["blocks"]["mlp_in"]["kernel"].dtype == "bfloat16"
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(released.params)} == {mesh}
    assert placed and all(sharding.mesh == mesh for sharding in placed)
    assert (released.model.cfg.dtype, released.model.cfg.precision) == ("bfloat16", "highest")
    compared = open_teacher(teacher, released, dtype="bfloat16", mesh=mesh)
    assert compared.params["backbone"]["embedding"]["embedding"].dtype == "bfloat16"


def test_a_gated_student_is_evaluated_against_the_teacher_that_it_has(tmp_path, monkeypatch):
    teacher = write_teacher(tmp_path / "teacher")
    model = PushForwardLM(dataclasses.replace(huggingface.load(teacher)[0].cfg, adapter_rank=2))
    params = with_own(init_params(model, jax.random.key(0)), huggingface.load(teacher)[1])
    note = {"window": 2, "tau_min": 1.0, "tau_max": 1.0, "seq_len": 16, "prefix_length": 4, "base": str(teacher)}
    huggingface.save(tmp_path / "k2", model, params, huggingface.tokenizer(teacher), **note)
    (tmp_path / "prefixes.jsonl").write_text('{"prefix": "The cat sat on"}\n' * 2)
    given = []

    def evaluate(*arguments):
        given.extend(arguments)
        return evaluate_released(*arguments)

    monkeypatch.setattr("kforcing_jax.evaluation.released.evaluate_released", evaluate)
    flags = [f"--checkpoint={tmp_path / 'k2'}", f"--prefix_file={tmp_path / 'prefixes.jsonl'}", "--json"]
    out = run_command("evaluate", *flags)
    assert out.status == 0, out.err
    figures = json.loads(out.out)
    student, completions, none, *others = given
    assert none is None and len(figures["agreement"]) == 2
    assert figures == evaluate_released(student, completions, open_teacher(teacher, student), *others)
    refused(run_command("evaluate", *flags, f"--teacher={teacher}"), "--teacher has no effect", "that has its teacher")


def recorded(function, shardings):
    def called(shape, sharding, *others):
        shardings.append(sharding)
        return function(shape, sharding, *others)

    return called


def test_a_student_of_a_nucleus_decodes_from_that_one_alone(tmp_path):
    trained = dict(window=2, seq_len=12, eos_id=3, tau_min=0.7, tau_max=0.7, top_p=0.9)
    student = write_released(tmp_path / "k2.safetensors", 13, 12, student=True, **trained)
    teacher = write_released(tmp_path / "ar.safetensors", 13, 12, student=False)

    def text(*flags, mode="student"):
        given = [f"--teacher={teacher}"] if mode != "student" else []
        flags = [f"--checkpoint={student}", "--prompt_ids=1,2", "--json", f"--mode={mode}", *given, *flags]
        return run_command("generate", *flags, "--max_new_tokens=8")

    assert text().out == text("--top_p=0.9", "--tau=0.7").out
    refused(text("--top_p=1"), "--top_p=1 is none that the student was trained with (0.9)", "exact take any")
    same = text(mode="exact"), text(mode="ar"), text("--tau=0.7", "--top_p=0.9", mode="ar")
    assert len({str(json.loads(each.out)["tokens"]) for each in same}) == 1
    whole = (text("--top_p=1", "--tau=1", mode=mode) for mode in ("exact", "ar"))
    assert len({str(json.loads(each.out)["tokens"]) for each in whole}) == 1


def test_a_file_knows_its_vocabulary(tmp_path):
    """Two of one size."""
    ours, other = (train_tokenizer(DataConfig(vocab_size=8), [text] * 3) for text in ("abcdef", "uvwxyz"))
    assert ours.vocab_size == other.vocab_size
    for name, tokenizer in (("ours", ours), ("other", other)):
        tokenizer.save(tmp_path / f"{name}.json")
    path = write_released(
        tmp_path / "ar.safetensors", ours.vocab_size, ours.mask_id, student=False, vocabulary=digest(ours.backend)
    )
    released = open_released(path, str(tmp_path / "ours.json"))
    assert released.tokenizer.encode("abc") == ours.encode("abc")
    with pytest.raises(DataError, match="has other tokens than"):
        open_released(path, str(tmp_path / "other.json"))
    load_for(path, released.model, ours)
    with pytest.raises(RunError, match=r"has vocabulary = .*the tokenizer of the data"):
        load_for(path, released.model, other)


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [
        ("generate", ["--mode=ar"], ["--mode=ar", "is a student"]),
        ("generate", ["--stage=k1"], ["--stage has no effect without --workdir"]),
        ("generate", ["--output_dir=x"], ["--output_dir has no effect without --prefix_file"]),
        ("generate", ["--frequency_penalty=nan"], ["--frequency_penalty=nan is not finite"]),
        ("generate", ["--prefix_file={file}", "--output_dir={file}/x"], ["--output_dir={file}/x", "is not a folder"]),
        ("evaluate", ["--prefix_file={file}", "--output_dir={file}"], ["--output_dir={file}", "is not a folder"]),
    ],
)
def test_flags_that_would_have_no_effect_are_refused(files, tmp_path, command, flags, says):
    (tmp_path / "file").write_text("")
    flags = [flag.format(file=tmp_path / "file") for flag in flags]
    if command == "generate" and "--prefix_file" not in flags[0]:
        flags.append("--prompt_ids=1")
    out = run_command(command, f"--checkpoint={files['lm1b', 'pflm']}", *flags)
    refused(out, *(words.format(file=tmp_path / "file") for words in says))
