"""Folders of the Llama family: the logits that transformers gave, in every form of files, and what is refused."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import REPOSITORY
from interop.families import BFLOAT16, FAMILIES, random_tensors, write_folder, write_shards
from safetensors.numpy import save_file

from kforcing_jax.config import MeshConfig
from kforcing_jax.decoding import generate
from kforcing_jax.errors import UserError
from kforcing_jax.interop import huggingface
from kforcing_jax.interop.config_json import described
from kforcing_jax.interop.llama_weights import weights_of
from kforcing_jax.interop.torch_zip import CheckpointFormatError
from kforcing_jax.models import init_params
from kforcing_jax.noise import CdfOrder
from kforcing_jax.sharding import make_mesh

RECORDED = Path(__file__).parent / "data" / "huggingface"
NAMES = sorted(path.parent.name for path in RECORDED.glob("*/logits.npz"))


def logits_of(model, params, tokens):
    return np.asarray(model.apply({"params": params}, tokens), np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_that_transformers_gave(name):
    recorded = np.load(RECORDED / name / "logits.npz")
    model, params = huggingface.load(RECORDED / name)
    difference = np.abs(logits_of(model, params, recorded["tokens"]) - recorded["logits"]).max()
    assert difference < 1e-4 * recorded["logits"].std()


def test_the_recorded_models_are_those_of_the_table():
    assert NAMES and all(json.loads((RECORDED / name / "config.json").read_text()) == FAMILIES[name] for name in NAMES)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_parameters_are_those_that_the_model_asks_for(tmp_path, name):
    model, params = huggingface.load(write_folder(tmp_path / name, FAMILIES[name]))
    expected = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), expected)
    assert model.cfg.mask_id is None


@pytest.mark.parametrize("index", [True, False])
def test_several_files_are_one_model(tmp_path, index):
    tensors = random_tensors(FAMILIES["qwen3"])
    whole = huggingface.load(write_folder(tmp_path / "whole", FAMILIES["qwen3"], tensors))[1]
    folder = write_shards(write_folder(tmp_path / "parts", FAMILIES["qwen3"], tensors), tensors, index=index)
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(folder)[1], whole)


def test_a_whole_file_comes_before_an_index(tmp_path):
    """As in transformers; the index is left from what was there before."""
    whole, before = (random_tensors(FAMILIES["qwen3"], seed) for seed in (1, 2))
    folder = write_shards(write_folder(tmp_path, FAMILIES["qwen3"]), before)
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    norm = huggingface.load(folder)[1]["backbone"]["final_norm"]["scale"]
    np.testing.assert_array_equal(norm, whole["model.norm.weight"])


def test_a_model_without_its_output_layer_has_names_without_a_prefix(tmp_path):
    tensors = random_tensors(FAMILIES["llama"])
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    there = [
        huggingface.load(write_folder(tmp_path / name, FAMILIES["llama"], each))[1]
        for name, each in (("prefix", tensors), ("bare", bare))
    ]
    jax.tree.map(np.testing.assert_array_equal, *there)


def test_an_output_layer_that_is_the_embedding_again_is_one(tmp_path):
    tensors = random_tensors(FAMILIES["llama"])
    again = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    huggingface.load(write_folder(tmp_path / "same", FAMILIES["llama"], again))
    again["lm_head.weight"] = again["lm_head.weight"] + 1
    with pytest.raises(CheckpointFormatError, match=r"left over.*lm_head\.weight"):
        huggingface.load(write_folder(tmp_path / "other", FAMILIES["llama"], again))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, BFLOAT16])
def test_weights_of_other_types_are_read_as_f32(tmp_path, dtype):
    tensors = random_tensors(FAMILIES["qwen2"], dtype=dtype)
    params = huggingface.load(write_folder(tmp_path, FAMILIES["qwen2"], tensors))[1]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    norm = params["backbone"]["final_norm"]["scale"]
    np.testing.assert_array_equal(norm, tensors["model.norm.weight"].astype(np.float32))


def test_bfloat16_stays_where_it_is_asked_for():
    recorded = np.load(RECORDED / "qwen3" / "logits.npz")
    model, params = huggingface.load(RECORDED / "qwen3", dtype="bfloat16")
    dtypes = {
        jax.tree_util.keystr(path, simple=True).endswith("scale"): leaf.dtype
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    assert dtypes == {True: jnp.float32, False: jnp.bfloat16}
    assert model.cfg.dtype == "bfloat16"
    difference = np.abs(logits_of(model, params, recorded["tokens"]) - recorded["logits"]).max()
    assert difference < 0.3 * recorded["logits"].std()


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="float16"):
        huggingface.load(RECORDED / "qwen3", dtype="float16")


@pytest.mark.parametrize("name", ["llama", "linear"])
def test_weights_lie_on_a_mesh_as_if_put_there(name):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    alone, split = huggingface.load(RECORDED / name)[1], huggingface.load(RECORDED / name, mesh=mesh)[1]
    jax.tree.map(np.testing.assert_array_equal, alone, split)
    assert not split["backbone"]["blocks"]["mlp_in"]["kernel"].sharding.is_fully_replicated


@pytest.mark.parametrize("name", ["llama", "linear"])  # tied and not
def test_another_order_of_tokens_is_the_same_function(name):
    tokens = np.load(RECORDED / name / "logits.npz")["tokens"]
    order = CdfOrder.shuffled(FAMILIES[name]["vocab_size"], 3)
    plain, ordered = huggingface.load(RECORDED / name), huggingface.load(RECORDED / name, cdf_order=order)
    assert ordered[0].cfg.cdf_order == order
    np.testing.assert_allclose(logits_of(*ordered, tokens), logits_of(*plain, tokens), atol=1e-5)
    if name == "linear":
        columns = ordered[1]["backbone"]["output"]["kernel"]
        np.testing.assert_array_equal(columns, plain[1]["backbone"]["output"]["kernel"][:, order.tokens_V])


def test_it_decodes_greedily_what_its_logits_say():
    model, params = huggingface.load(RECORDED / "mistral")
    prompt = np.load(RECORDED / "mistral" / "logits.npz")["tokens"][0, :5].tolist()
    tokens = generate(model, params, [prompt], max_new_tokens=12, k=1, tau=1e-6, seeds=[0]).tokens
    likeliest = logits_of(model, params, tokens[:, :-1]).argmax(-1)
    assert tokens[0, 5:].tolist() == likeliest[0, 4:].tolist()


def test_weights_are_never_in_memory_twice(tmp_path):
    """In a process of its own, by its anonymous memory: pages of mapped files are the system's."""
    fields = FAMILIES["llama"] | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    fields |= {"num_attention_heads": 8, "vocab_size": 4096}
    found = described(fields)
    stored = dict(each for w in weights_of(found.architecture, found.vocab_size) for each in w.stored(12))
    write_folder(tmp_path, fields, {name: np.ones(shape, BFLOAT16) for name, shape in stored.items()})
    script = f"""
import threading, jax
from kforcing_jax.interop import huggingface
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
jax.block_until_ready(jax.numpy.zeros(8))
before, peak, stop = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch); thread.start()
params = jax.block_until_ready(huggingface.load({str(tmp_path)!r})[1])
stop.set(); thread.join()
print((max(peak, anonymous()) - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=True
    )
    assert 0.9 < float(done.stdout) < 1.15


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def refused(folder):
    with pytest.raises(CheckpointFormatError) as raised:
        huggingface.load(folder)
    message = str(raised.value)
    assert "\n" not in message and message.startswith(str(folder)) and isinstance(raised.value, UserError)
    with pytest.raises(CheckpointFormatError):
        huggingface.check(folder)
    return message


def cut(file, share=0.6):
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def test_a_folder_without_weights_is_refused(tmp_path):
    folder = write_folder(tmp_path / "model", FAMILIES["llama"])
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has no weights" in (said := refused(folder)) and "pytorch_model.bin is of another layout" in said


def test_a_folder_without_config_is_refused(tmp_path):
    folder = write_folder(tmp_path / "model", FAMILIES["llama"])
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder)


def test_what_is_not_there_is_refused(tmp_path):
    assert "no such folder" in refused(tmp_path / "nowhere")


def test_a_missing_shard_is_named(tmp_path):
    folder = write_shards(write_folder(tmp_path / "m", FAMILIES["llama"]), random_tensors(FAMILIES["llama"]))
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors of 3 is missing" in refused(folder)


@pytest.mark.parametrize("share", [0.6, 0.001, 0])
def test_a_shard_that_is_cut_is_named(tmp_path, share):
    folder = write_shards(write_folder(tmp_path / "m", FAMILIES["llama"]), random_tensors(FAMILIES["llama"]))
    cut(folder / "model-00002-of-00003.safetensors", share)
    assert "model-00002-of-00003.safetensors is cut short" in refused(folder)


def test_an_index_that_names_what_a_file_has_not_is_refused(tmp_path):
    folder = write_shards(write_folder(tmp_path / "m", FAMILIES["llama"]), random_tensors(FAMILIES["llama"]))
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    places["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00003.safetensors"
    index.write_text(json.dumps(places))
    assert "has no model." in refused(folder)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    assert "not a file beside it" in refused(folder)
    for content in ("[]", "{}", "", '{"weight_map": {"model.norm.weight": 3}}', "[" * 100_000):
        index.write_text(content)
        assert "no index of safetensors" in refused(folder)


WRONG_TENSORS = {
    "missing": (lambda t: without(t, "model.layers.1.mlp.up_proj.weight"), r"missing.*layers\.1\.mlp\.up_proj\.weight"),
    "left over": (lambda t: t | {"model.layers.0.mlp.extra.weight": np.zeros(3)}, r"left over.*mlp\.extra\.weight"),
    "another layer": (lambda t: t | {"model.layers.2.input_layernorm.weight": np.ones(32)}, r"left over.*layers\.2"),
    "shape": (lambda t: t | {"model.norm.weight": np.ones(31, np.float32)}, r"model\.norm\.weight has shape \(31,\)"),
    "vocabulary": (lambda t: t | {"model.embed_tokens.weight": np.ones((60, 32))}, r"shape \(60, 32\), expected \(61,"),
    "quantised": (lambda t: t | {"model.norm.weight": np.ones(32, np.int8)}, r"type I8 are not read"),
    "a student": (lambda t: t | {"noise_encoder.norm.weight": np.ones(32)}, "holds a student"),
}


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_tensors_that_are_not_the_models_are_named(tmp_path, wrong):
    change, said = WRONG_TENSORS[wrong]
    folder = write_folder(tmp_path / "m", FAMILIES["llama"], change(random_tensors(FAMILIES["llama"])))
    assert re.search(said, refused(folder))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300], ids=["nan", "infinite", "too large for f32"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value):
    tensors = random_tensors(FAMILIES["llama"], dtype=np.float64)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    with pytest.raises(
        CheckpointFormatError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"
    ):
        huggingface.load(write_folder(tmp_path, FAMILIES["llama"], tensors))


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = write_shards(
        write_folder(tmp_path / "m", FAMILIES["llama"]), random_tensors(FAMILIES["llama"]), index=False
    )
    save_file({"model.norm.weight": np.ones(32, np.float32)}, folder / "other.safetensors")
    assert "model.norm.weight is in" in refused(folder)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    folder = write_folder(tmp_path / "m", FAMILIES["llama"])
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
    assert "safetensors file" in refused(folder)
    header = b"[" * 100_000
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "is damaged" in refused(folder)
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(9))
    assert "not as many bytes" in refused(folder)


def test_architecture_says_what_is_loaded():
    architecture, vocab_size = huggingface.architecture(RECORDED / "qwen3")
    model, _ = huggingface.load(RECORDED / "qwen3")
    assert vocab_size == model.cfg.vocab_size == 61
    assert all(getattr(model.cfg, f.name) == getattr(architecture, f.name) for f in dataclasses.fields(architecture))
    assert (architecture.qk_norm, architecture.head_width, architecture.kv_heads) == (True, 12, 2)
