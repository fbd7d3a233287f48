"""Model folders as teachers of a curriculum: what a configuration takes over, refuses, and needs no longer."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from commands import refused, run_command
from flax.traverse_util import flatten_dict
from interop.families import BFLOAT16, TEACHER, TEXT, write_folder, write_teacher, write_tokenizer
from micro import micro_config_dict

from kforcing_jax.architecture import Rope
from kforcing_jax.config import parse
from kforcing_jax.errors import ConfigError, RunError
from kforcing_jax.interop import huggingface
from kforcing_jax.interop.released import check_teacher_of, load_for
from kforcing_jax.interop.teachers import with_teacher
from kforcing_jax.interop.torch_zip import CheckpointFormatError
from kforcing_jax.models import CausalLM
from kforcing_jax.sharding import make_mesh
from kforcing_jax.training import curriculum
from kforcing_jax.training.checkpoints import abstract_params, load_stage
from kforcing_jax.training.recipes import Vocabulary, stage_model
from kforcing_jax.training.records import run_vocabulary
from kforcing_jax.workdir import Workdir

CONFIG_FILE = """
from interop.test_teachers import config_of
def get_config():
    return config_of({teacher!r}, {text!r})
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("hub") / "teacher", dtype=np.float16)


def config_of(teacher, text="", **model):
    """The model's fields are left at their defaults."""
    config = micro_config_dict()
    config.data.source, config.data.path, config.data.seq_len = "text_files", str(text) or "x", 16
    config.model.update(dict(num_layers=4, d_model=128, num_heads=4) | model)
    config.evaluation.update(dict(prompt_length=4, new_tokens=8))
    config.stages.ar.checkpoint = str(teacher)
    return config


def write_text(folder):
    path = folder / "text.txt"
    path.write_text("\n\n".join(f"{TEXT.strip()} Number {i}." for i in range(60)))
    return path


def test_a_configuration_takes_over_what_the_teacher_is(teacher):
    config = with_teacher(parse(config_of(teacher)))
    assert (config.model.num_layers, config.model.d_model, config.model.kv_heads) == (2, 32, 2)
    assert (config.model.norm, config.model.mlp, config.model.tied_embeddings) == ("rms_norm", "swiglu", True)
    assert config.model.rope == Rope(base=5e3)
    assert (config.data.tokenizer, config.data.vocab_size) == (str(teacher), 320)
    assert with_teacher(config) == config, "it is what it takes over"


def test_another_teacher_or_none_changes_nothing(tmp_path):
    for path in ("", str(tmp_path / "ar.ckpt")):
        config = parse(config_of(path))
        assert with_teacher(config) == config
    (tmp_path / "ar.safetensors").write_bytes(b"x")
    config = parse(config_of(tmp_path / "ar.safetensors"))
    assert with_teacher(config) == config


def test_all_fields_that_say_something_else_are_named(teacher):
    config = config_of(teacher, num_layers=3, d_mlp=99)
    config.model.rope.base = 123.0
    config.data.vocab_size = 77
    with pytest.raises(ConfigError) as raised:
        with_teacher(parse(config))
    for said in (
        "model.num_layers = 3 should be 2",
        "model.d_mlp = 99 should be 48",
        "model.rope.base = 123.0 should be 5000.0",
        "data.vocab_size = 77 should be 320",
    ):
        assert said in str(raised.value)
    assert "\n" not in str(raised.value) and "d_model" not in str(raised.value)


def test_a_source_without_text_cannot_have_such_a_teacher(teacher):
    config = config_of(teacher)
    config.data.source = "markov"
    with pytest.raises(ConfigError, match=r"data\.source = 'markov' has a vocabulary of its own"):
        with_teacher(parse(config))


def test_fields_may_say_what_the_teacher_says(teacher):
    config = config_of(teacher, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_head=8)
    config.data.vocab_size, config.data.tokenizer = 320, str(teacher)
    assert with_teacher(parse(config)).model.d_head == 0


def test_another_tokenizer_is_refused_and_the_same_elsewhere_taken(teacher, tmp_path):
    copy = write_teacher(tmp_path / "copy")
    config = config_of(teacher)
    config.data.tokenizer = str(copy)
    assert with_teacher(parse(config)).data.tokenizer == str(copy)
    write_tokenizer(copy, vocab_size=265)
    with pytest.raises(ConfigError, match=r"data\.tokenizer = .*copy' should be .*teacher'"):
        with_teacher(parse(config))
    config.data.tokenizer = "gpt2"
    with pytest.raises(ConfigError, match=r"data\.tokenizer = 'gpt2' should be"):
        with_teacher(parse(config))


def test_a_teacher_that_cannot_be_read_is_said_before_anything_happens(tmp_path):
    folder = write_folder(tmp_path / "m", TEACHER)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointFormatError, match="has no weights"):
        check_teacher_of(with_teacher(parse(config_of(folder))))
    out = run_command("main", *_flags(tmp_path, folder), f"--workdir={tmp_path / 'run'}")
    refused(out, "has no weights")
    assert not (tmp_path / "run").exists()


def test_weights_that_nothing_trains_are_bfloat16_where_asked(tmp_path):
    """As they are stored, imported, expected of checkpoints, and held beside what students add in f32."""
    folder = write_teacher(tmp_path / "teacher", dtype=BFLOAT16)
    config = config_of(folder, adapter_rank=2, weights_dtype="bfloat16")
    config, vocabulary = with_teacher(parse(config)), Vocabulary(320, None, 2)
    model, student = (stage_model(config, name, vocabulary) for name in ("ar", "k1"))
    params = flatten_dict(load_for(folder, model))
    expected = flatten_dict(abstract_params(model))
    assert {path: leaf.dtype for path, leaf in params.items()} == {p: leaf.dtype for p, leaf in expected.items()}
    assert {leaf.dtype.name for path, leaf in params.items() if path[-1] != "scale"} == {"bfloat16"}
    assert {leaf.dtype.name for path, leaf in params.items() if path[-1] == "scale"} == {"float32"}
    assert {leaf.dtype.name for leaf in flatten_dict(abstract_params(student)).values()} == {"float32"}
    precise = load_for(folder, CausalLM(dataclasses.replace(model.cfg, weights_dtype="float32")))
    jax.tree.map(np.testing.assert_array_equal, flatten_dict(precise), params)


def test_a_model_of_another_shape_or_vocabulary_is_refused(teacher, tmp_path):
    model, _ = huggingface.load(teacher)
    wider = dataclasses.replace(model.cfg, d_mlp=50)
    with pytest.raises(RunError, match="has d_mlp = 48, the configuration says 50"):
        load_for(teacher, type(model)(wider))
    other = write_teacher(tmp_path / "other")
    write_tokenizer(other, vocab_size=265)
    with pytest.raises(RunError, match="has another vocabulary than the data"):
        load_for(teacher, model, huggingface.tokenizer(other))


def _flags(folder, teacher):
    text = write_text(folder)
    (folder / "config.py").write_text(CONFIG_FILE.format(teacher=str(teacher), text=str(text)))
    return [f"--config={folder / 'config.py'}"]


def claimed(folder, teacher, **model):
    """A work directory as `main` claims it, with the AR stage alone."""
    config = config_of(teacher, write_text(folder), **model)
    for name in ("k1", "k2"):
        del config.stages[name]
    config = with_teacher(parse(config), folder / "run")
    return Workdir.claim(folder / "run", config)


def test_a_run_has_the_teachers_weights_and_needs_the_folder_no_longer(tmp_path):
    folder = write_teacher(tmp_path / "teacher", dtype=np.float16)
    workdir = claimed(tmp_path, folder)
    corpus, mesh = workdir.corpus(), make_mesh(workdir.config.mesh)
    curriculum.run(workdir, corpus, mesh)
    assert workdir.config.model.d_model == 32 and workdir.config.data.tokenizer == str(folder)
    vocabulary = run_vocabulary(workdir, workdir.tokenizer())
    assert (vocabulary.vocab_size, vocabulary.mask_id, vocabulary.eos_id) == (320, None, 2)
    model, params = load_stage(workdir, "ar", corpus)
    expected = huggingface.load(folder, cdf_order=model.cfg.cdf_order)[1]
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    said = json.loads((tmp_path / "run" / "data" / "tokenizer_config.json").read_text())
    assert said["eos_token"] == "<|im_end|>" and "im_start" in said["chat_template"]

    shutil.rmtree(folder)
    again = claimed(tmp_path, folder)
    assert again.config == workdir.config
    curriculum.run(again, again.corpus(), mesh)
    with pytest.raises(CheckpointFormatError, match="cannot be read"):
        check_teacher_of(with_teacher(parse(config_of(folder)), tmp_path / "another run"))


def test_the_teacher_of_another_run_stays_in_its_dtype(tmp_path):
    model = {"adapter_rank": 2, "weights_dtype": "bfloat16"}
    first = claimed(tmp_path, write_teacher(tmp_path / "teacher", dtype=BFLOAT16), **model)
    ar = dataclasses.replace(first.config.stages["ar"], checkpoint="", init_from=str(first.path / "ar"), steps=0)
    second = Workdir.claim(tmp_path / "second", dataclasses.replace(first.config, stages={"ar": ar}))
    mesh = make_mesh(first.config.mesh)
    for workdir in (first, second):
        curriculum.run(workdir, workdir.corpus(), mesh)
    theirs, ours = (load_stage(workdir, "ar", workdir.tokenizer())[1] for workdir in (first, second))
    assert ours["backbone"]["blocks"]["mlp_in"]["kernel"].dtype == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(ConfigError, match=r'model.weights_dtype = "bfloat16" should be "float32"'):
        dataclasses.replace(first.config, stages={"ar": dataclasses.replace(ar, steps=5)})


@pytest.mark.smoke
@pytest.mark.parametrize("rank", [0, 2])
def test_a_curriculum_from_a_folder_by_commands(tmp_path, rank):
    """Trained; then the folder is gone, and a stage is made longer; decoded and exported, and that decoded."""
    folder = write_teacher(tmp_path / "teacher", dtype=np.float16)
    run, flags = f"--workdir={tmp_path / 'run'}", [*_flags(tmp_path, folder), f"--config.model.adapter_rank={rank}"]
    done = run_command("main", *flags, run)
    assert done.status == 0, done.err
    kept = folder.rename(tmp_path / "kept")
    again = run_command("main", *flags, run, "--config.stages.k2.steps=7")
    assert again.status == 0, again.err
    asked = ["--prompt=The cat", "--max_new_tokens=6", "--json"]
    texts = {}
    for mode in ("student", "ar", "exact"):
        out = run_command("generate", run, f"--mode={mode}", *asked)
        assert out.status == 0, out.err
        texts[mode] = json.loads(out.out)["tokens"]
    assert texts["exact"] == texts["ar"]

    for stage in ("ar", "k2"):
        out = run_command("export", run, f"--stage={stage}", f"--output={tmp_path / stage}")
        assert out.status == 0, out.err
    for checkpoint, mode in (("ar", "ar"), ("k2", "student")):
        base = [f"--base={kept}"] if rank and checkpoint == "k2" else []
        out = run_command("generate", f"--checkpoint={tmp_path / checkpoint}", f"--mode={mode}", *base, *asked)
        assert out.status == 0, out.err
        assert json.loads(out.out)["tokens"] == texts[mode]
    if rank:
        other = write_teacher(tmp_path / "other", seed=1)
        refused(
            run_command("generate", f"--checkpoint={tmp_path / 'k2'}", f"--base={other}", *asked), "another base than"
        )


def test_weights_go_straight_onto_the_mesh(teacher):
    config = with_teacher(parse(config_of(teacher)))
    mesh = make_mesh(dataclasses.replace(config.mesh, data=1, fsdp=2, tensor=2))
    model, _ = huggingface.load(teacher)
    kernel = load_for(teacher, model, mesh=mesh)["backbone"]["blocks"]["mlp_in"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 16, 24)}


def test_a_folder_is_decoded_directly(teacher):
    out = run_command("generate", f"--checkpoint={teacher}", "--prompt=The cat", "--max_new_tokens=5", "--json")
    assert out.status == 0, out.err
    tokens = json.loads(out.out)["tokens"][0]
    prompt = huggingface.tokenizer(teacher).encode_prompt("The cat")
    assert tokens[: len(prompt)] == prompt and len(tokens) <= len(prompt) + 5
    refused(run_command("generate", f"--checkpoint={teacher}", "--weights=ema"), "no averaged weights")
    refused(run_command("generate", f"--checkpoint={teacher}", "--mode=exact"), "is an AR model")


def test_prepare_takes_the_tokenizer_along(teacher, tmp_path):
    out = run_command("prepare", *_flags(tmp_path, teacher), f"--config.data.prepared={tmp_path / 'data'}")
    assert out.status == 0, out.err
    assert json.loads((tmp_path / "data" / "tokenizer_config.json").read_text())["kforcing_jax"]["vocab_size"] == 320
