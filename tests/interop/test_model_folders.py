"""Teachers and students as folders: what is written reads back, and an adapter knows its base."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from interop.families import FAMILIES, random_tensors, write_folder, write_teacher
from safetensors.numpy import load_file, save_file

from kforcing_jax.config import DataConfig, MeshConfig
from kforcing_jax.data.tokenizers import train_tokenizer
from kforcing_jax.errors import ConfigError
from kforcing_jax.interop import huggingface, model_folders, official, stored_models
from kforcing_jax.interop.safetensor_folders import read_header
from kforcing_jax.interop.torch_zip import CheckpointFormatError
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM, init_params
from kforcing_jax.models.gated import own_params, with_own
from kforcing_jax.noise import CdfOrder
from kforcing_jax.sharding import make_mesh

TRAINED = {"window": 2, "tau_min": 0.5, "tau_max": 1.0, "top_p": 0.9, "seq_len": 64, "eos_id": 2}


def random_params(model, seed=0):
    shapes, rng = jax.eval_shape(lambda: init_params(model, jax.random.key(0))), np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


def order_of(cfg):
    return CdfOrder.shuffled(cfg.vocab_size, 5)


def equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("largest_file", [10**9, 5000])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_teacher_reads_back(tmp_path, name, largest_file):
    folder = write_folder(tmp_path / "theirs", FAMILIES[name])
    model, params = huggingface.load(folder)
    huggingface.save(tmp_path / "ours", model, params, largest_file=largest_file, seq_len=64)
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == (largest_file == 5000)
    again, others = huggingface.load(tmp_path / "ours")
    assert again.cfg == model.cfg
    equal(others, params)
    assert stored_models.digest(folder) == stored_models.digest(tmp_path / "ours")


@pytest.mark.parametrize("name", ["llama", "qwen3"])  # tied, and not
def test_an_order_and_a_mask_are_kept(tmp_path, name):
    found = huggingface.describe(write_folder(tmp_path / "theirs", FAMILIES[name]))
    plain = stored_models.model_config(found, {"mask_id": 60})
    model = CausalLM(dataclasses.replace(plain, cdf_order=order_of(plain)))
    params = random_params(model)
    huggingface.save(tmp_path / "ours", model, params)
    again, others = huggingface.load(tmp_path / "ours")
    assert again.cfg == model.cfg and again.cfg.mask_id == 60
    equal(others, params)


def test_the_tokenizer_comes_along(tmp_path):
    teacher = write_teacher(tmp_path / "teacher")
    tokenizer = huggingface.tokenizer(teacher)
    huggingface.save(tmp_path / "ours", *huggingface.load(teacher), tokenizer, seq_len=64)
    again = huggingface.tokenizer(tmp_path / "ours")
    assert again.of_model == tokenizer.of_model and again.digest == tokenizer.digest
    assert huggingface.chat_template(tmp_path / "ours") == huggingface.chat_template(teacher)


def test_a_tokenizer_that_came_with_no_model_takes_the_template_of_its_data_along(tmp_path):
    model, params = huggingface.load(write_folder(tmp_path / "theirs", FAMILIES["llama"]))
    own = train_tokenizer(DataConfig(tokenizer="characters", vocab_size=61), ["abc"])
    huggingface.save(tmp_path / "ours", model, params, own, chat_template="{{ messages }}")
    assert huggingface.tokenizer(tmp_path / "ours").of_model.chat_template == "{{ messages }}"


@pytest.fixture
def student(tmp_path):
    """Of a model with an order, ordinary."""
    found = huggingface.describe(write_folder(tmp_path / "teacher", FAMILIES["qwen3"]))
    cfg = stored_models.model_config(found, {"mask_id": None})
    model = PushForwardLM(dataclasses.replace(cfg, cdf_order=order_of(cfg)))
    return model, random_params(model)


def test_an_ordinary_student_reads_back(tmp_path, student):
    model, params = student
    huggingface.save(tmp_path / "k2", model, params, **TRAINED)
    again, others = huggingface.load_student(tmp_path / "k2")
    assert again == model
    equal(others, params)
    assert huggingface.read_note(tmp_path / "k2").items() >= TRAINED.items()
    loaded, _, note = huggingface.load_any(tmp_path / "k2")
    assert isinstance(loaded, PushForwardLM) and note["window"] == 2
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    equal(huggingface.load_student(tmp_path / "k2", mesh=mesh)[1], params)


def test_teachers_and_students_are_told_apart(tmp_path, student):
    huggingface.save(tmp_path / "k2", *student, **TRAINED)
    with pytest.raises(CheckpointFormatError, match="holds a student, not an AR model"):
        huggingface.load(tmp_path / "k2")
    with pytest.raises(CheckpointFormatError, match="holds an AR model, not a student"):
        huggingface.load_student(tmp_path / "teacher")
    assert isinstance(huggingface.load_any(tmp_path / "teacher")[0], CausalLM)


def gated(base, rank, order=True, seed=0):
    """A student of a base with random deltas: (model, params)."""
    found = huggingface.describe(base)
    cfg = stored_models.model_config(found, {"adapter_rank": rank})
    cfg = dataclasses.replace(cfg, cdf_order=order_of(cfg) if order else None)
    model = PushForwardLM(cfg)
    text = huggingface.load(base, cdf_order=cfg.cdf_order)[1]
    own = own_params(random_params(model, seed))
    return model, with_own(text, own)


@pytest.mark.parametrize("rank", [3, -1])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_gated_student_is_what_it_adds_to_its_base(tmp_path, name, rank):
    base = write_folder(tmp_path / "base", FAMILIES[name])
    model, params = gated(base, rank)
    huggingface.save(tmp_path / "k2", model, params, base=str(base), **TRAINED)
    tensors, _ = read_header(tmp_path / "k2" / "adapter.safetensors")
    assert set(tensors) == {".".join(path) for path in flatten_dict(own_params(params))}
    assert not (tmp_path / "k2" / "model.safetensors").exists()
    for given in (None, base):
        again, others = huggingface.load_student(tmp_path / "k2", given)
        assert again == model
        equal(others, params)
    note = huggingface.read_note(tmp_path / "k2")
    assert (note["adapter_rank"], note["base"], note["top_p"]) == (rank, str(base), 0.9)
    assert note["base_digest"] == stored_models.digest(base)


@pytest.mark.parametrize("shards", [False, True])
def test_a_gated_student_of_our_own_backbone_adds_to_a_released_file(tmp_path, shards):
    sizes = {"vocab_size": 12, "mask_id": 11, "num_layers": 2, "d_model": 16, "num_heads": 2}
    teacher = CausalLM(ModelConfig(**sizes, cdf_order=CdfOrder.shuffled(12, 5)))
    text = random_params(teacher)
    official.save(tmp_path / "ar.safetensors", teacher, text)
    model = PushForwardLM(dataclasses.replace(teacher.cfg, adapter_rank=3))
    params = with_own(text, own_params(random_params(model, seed=1)))
    huggingface.save(tmp_path / "k2", model, params, **TRAINED)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4]) if shards else None
    again, others, _ = huggingface.load_any(tmp_path / "k2", tmp_path / "ar.safetensors", mesh=mesh)
    assert again == model
    equal(others, params)
    official.save(tmp_path / "other.safetensors", teacher, random_params(teacher, seed=2))
    with pytest.raises(CheckpointFormatError, match="trained on another base than"):
        huggingface.load_student(tmp_path / "k2", tmp_path / "other.safetensors")


def test_no_two_refusals_point_at_each_other(tmp_path):
    cfg = ModelConfig(vocab_size=7, mask_id=6, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1)
    model = CausalLM(cfg)
    with pytest.raises(CheckpointFormatError, match="no other has such a model"):
        huggingface.save(tmp_path / "x", model, random_params(model))
    with pytest.raises(CheckpointFormatError, match="no other layout has all of it"):
        official.save(tmp_path / "x.safetensors", model, random_params(model))


def test_an_adapter_on_another_base_is_refused(tmp_path):
    base = write_folder(tmp_path / "base", FAMILIES["llama"])
    other = write_folder(tmp_path / "other", FAMILIES["llama"], random_tensors(FAMILIES["llama"], seed=1))
    wider = write_folder(tmp_path / "wider", FAMILIES["qwen3"])
    huggingface.save(tmp_path / "k2", *gated(base, 2), **TRAINED)
    for wrong in (other, wider):
        with pytest.raises(CheckpointFormatError, match=f"trained on another base than {wrong}") as raised:
            huggingface.load_student(tmp_path / "k2", wrong)
        assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointFormatError, match="does not name; give that as the base"):
        huggingface.load_student(tmp_path / "k2")
    with pytest.raises(CheckpointFormatError, match=r"has no config\.json, but adapter\.safetensors"):
        huggingface.load(tmp_path / "k2")


def test_the_same_weights_in_half_precision_files_are_the_same_base(tmp_path):
    halves = random_tensors(FAMILIES["llama"], dtype=np.float16)
    base = write_folder(tmp_path / "half", FAMILIES["llama"], halves)
    whole = {name: tensor.astype(np.float32) for name, tensor in halves.items()}
    assert stored_models.digest(base) == stored_models.digest(write_folder(tmp_path / "f32", FAMILIES["llama"], whole))
    model, params = gated(base, 2)
    huggingface.save(tmp_path / "k2", model, params, **TRAINED)
    equal(huggingface.load_student(tmp_path / "k2", tmp_path / "f32")[1], params)


def first_as(change):
    """A change of the first tensor of a file, and none of its notes."""

    def changed(tensors, notes):
        name = min(tensors)
        return tensors | {name: change(tensors[name])}, notes

    return changed


def with_rank(tensors, notes, rank=3):
    note = json.loads(notes["kforcing_jax"]) | {"adapter_rank": rank}
    return tensors, {"kforcing_jax": json.dumps(note)}


DAMAGED_ADAPTERS = {
    "another rank": (with_rank, r"expected \(.*3"),
    "missing": (lambda tensors, notes: (without_last(tensors), notes), "missing"),
    "no note": (lambda tensors, _: (tensors, None), "does not say"),
    "a nested note": (lambda tensors, _: (tensors, {"kforcing_jax": "[" * 100_000}), "damaged"),
    "whole numbers": (first_as(lambda tensor: tensor.astype(np.int32)), "numbers of type I32 are not read"),
    "not finite": (first_as(lambda tensor: tensor * np.nan), r"adapter\.safetensors: backbone.* not finite"),
}


def without_last(tensors):
    return dict(list(tensors.items())[:-1])


@pytest.mark.parametrize("wrong", DAMAGED_ADAPTERS)
def test_an_adapter_that_is_damaged_is_refused(tmp_path, wrong):
    base, (change, said) = write_folder(tmp_path / "base", FAMILIES["llama"]), DAMAGED_ADAPTERS[wrong]
    huggingface.save(tmp_path / "k2", *gated(base, 2), base=str(base), **TRAINED)
    file = tmp_path / "k2" / "adapter.safetensors"
    tensors, notes = change(load_file(file), read_header(file)[1])
    save_file(tensors, file, metadata=notes)
    with pytest.raises(CheckpointFormatError, match=said) as raised:
        huggingface.load_student(tmp_path / "k2")
    assert "\n" not in str(raised.value)


def test_an_adapter_that_is_cut_is_named_once(tmp_path):
    base = write_folder(tmp_path / "base", FAMILIES["llama"])
    huggingface.save(tmp_path / "k2", *gated(base, 2), base=str(base), **TRAINED)
    file = tmp_path / "k2" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointFormatError, match="is cut short") as raised:
        huggingface.load_student(tmp_path / "k2")
    assert str(raised.value).count(str(file)) == 1
    file.write_bytes((29).to_bytes(8, "little") + b'{"__metadata__": ["not one"]}')
    with pytest.raises(CheckpointFormatError, match="its notes are no object"):
        huggingface.load_student(tmp_path / "k2")


def test_another_backbone_has_no_such_folder_and_leaves_none(tmp_path):
    model = CausalLM(ModelConfig(vocab_size=7, mask_id=6, num_layers=1, d_model=8, num_heads=2))
    with pytest.raises(
        CheckpointFormatError, match=r"not a backbone of the Llama family.*write a \.safetensors or \.ckpt"
    ):
        huggingface.save(tmp_path / "x", model, random_params(model))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_has_something_is_left_alone(tmp_path):
    model, params = huggingface.load(write_folder(tmp_path / "theirs", FAMILIES["llama"]))
    with pytest.raises(ConfigError, match="is there, and is not an empty folder"):
        huggingface.save(tmp_path / "theirs", model, params)
    (tmp_path / "empty").mkdir()
    huggingface.save(tmp_path / "empty", model, params)
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["config.json", "model.safetensors"]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    model, params = huggingface.load(write_folder(tmp_path / "theirs", FAMILIES["llama"]))
    monkeypatch.setattr(model_folders, "config_fields", lambda *_: {"x": object()})
    with pytest.raises(TypeError):
        huggingface.save(tmp_path / "ours", model, params)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_other_code_finds_the_teacher_of_a_student(tmp_path, student):
    """In what it looks at there is an AR model with its usual names."""
    huggingface.save(tmp_path / "k2", *student, **TRAINED)
    config = json.loads((tmp_path / "k2" / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["architectures"] == ["Qwen3ForCausalLM"]
    names = set(read_header(tmp_path / "k2" / "model.safetensors")[0])
    assert names >= set(read_header(tmp_path / "teacher" / "model.safetensors")[0])
    assert all(name.startswith("noise_encoder.") for name in names - set(random_tensors(FAMILIES["qwen3"])))


def test_a_base_in_bfloat16_is_known_by_its_rounded_weights(tmp_path):
    base = write_folder(tmp_path / "base", FAMILIES["qwen3"])
    found = huggingface.describe(base)
    cfg = stored_models.model_config(found, {"adapter_rank": 2, "weights_dtype": "bfloat16"})
    model = PushForwardLM(cfg)
    params = with_own(stored_models.load_params(base, cfg), own_params(random_params(model)))
    huggingface.save(tmp_path / "k2", model, params, **TRAINED)
    again, others = huggingface.load_student(tmp_path / "k2", base)
    assert again == model and others["backbone"]["embedding"]["embedding"].dtype == "bfloat16"
    equal(others, params)
    assert huggingface.read_note(tmp_path / "k2")["base_digest"] != stored_models.digest(base)


def test_a_vocabulary_that_was_trained_here_keeps_its_mask(tmp_path):
    tokenizer = train_tokenizer(DataConfig(tokenizer="bpe", vocab_size=280), ["the cat sat on the mat. "] * 9)
    fields = FAMILIES["llama"] | {"vocab_size": tokenizer.vocab_size}
    found = huggingface.describe(write_folder(tmp_path / "theirs", fields))
    model = CausalLM(stored_models.model_config(found, {"mask_id": tokenizer.mask_id}))
    huggingface.save(tmp_path / "ours", model, random_params(model), tokenizer)
    again = huggingface.tokenizer(tmp_path / "ours")
    ids = [(each.mask_id, each.eos_id, each.bos_id, each.vocab_size) for each in (tokenizer, again)]
    assert ids[0] == ids[1] and ids[0][0] is not None
    assert huggingface.load(tmp_path / "ours")[0].cfg.mask_id == tokenizer.mask_id
    assert again.digest == tokenizer.digest
