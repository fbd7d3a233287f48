"""Random checkpoints that transformers writes: the same logits and the same greedy texts, and ours read by it."""

import jax
import numpy as np
import pytest
from interop.families import FAMILIES, random_tensors, write_folder, write_shards

from kforcing_jax.decoding import generate
from kforcing_jax.interop import huggingface

pytestmark = pytest.mark.extras
torch = pytest.importorskip("torch", reason='torch is not installed (pip install -e ".[oracles]")')
transformers = pytest.importorskip("transformers")

LENGTH = 40


def tokens_of(vocab_size, rows=2, length=LENGTH):
    return np.random.default_rng(7).integers(0, vocab_size, (rows, length))


def saved(folder, fields, seed=0, **options):
    """A random model of transformers' own class, saved by it; returns it."""
    torch.manual_seed(seed)
    fields = dict(fields)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.3
            parameter.add_(spread * torch.randn_like(parameter))
    model.save_pretrained(folder, **options)
    return model


def their_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def our_logits(folder, tokens):
    model, params = huggingface.load(folder)
    return np.asarray(jax.jit(lambda p, t: model.apply({"params": p}, t))(params, tokens))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_logits_are_those_of_transformers(tmp_path, name):
    theirs = saved(tmp_path, FAMILIES[name])
    tokens = tokens_of(theirs.config.vocab_size)
    expected = their_logits(theirs, tokens)
    assert np.abs(our_logits(tmp_path, tokens) - expected).max() < 1e-4 * expected.std()


OTHER_SIZES = {
    "wide heads": FAMILIES["llama"] | {"head_dim": 24, "num_attention_heads": 6, "hidden_size": 36},
    "one kv head, deep": FAMILIES["qwen3"] | {"num_key_value_heads": 1, "num_hidden_layers": 5},
    "other base and eps": FAMILIES["qwen2"] | {"rope_theta": 77.0, "rms_norm_eps": 1e-2, "vocab_size": 130},
    "window of one": FAMILIES["mistral"] | {"sliding_window": 1},
    "yarn on qwen3": FAMILIES["qwen3"] | {"rope_parameters": FAMILIES["yarn"]["rope_parameters"]},
    "yarn's own factor": FAMILIES["mistral"]
    | {"rope_parameters": FAMILIES["yarn"]["rope_parameters"] | {"attention_factor": 1.3, "beta_slow": 2.0}},
}


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_logits_of_other_sizes(tmp_path, name):
    theirs = saved(tmp_path, OTHER_SIZES[name], seed=1)
    tokens = tokens_of(theirs.config.vocab_size)
    expected = their_logits(theirs, tokens)
    assert np.abs(our_logits(tmp_path, tokens) - expected).max() < 1e-4 * expected.std()


def test_shards_that_transformers_writes(tmp_path):
    theirs = saved(tmp_path, FAMILIES["qwen3"], max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = tokens_of(61)
    expected = their_logits(theirs, tokens)
    assert np.abs(our_logits(tmp_path, tokens) - expected).max() < 1e-4 * expected.std()
    (tmp_path / "model.safetensors.index.json").unlink()
    assert np.abs(our_logits(tmp_path, tokens) - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_greedy_texts_are_those_of_transformers(tmp_path, name):
    theirs = saved(tmp_path, FAMILIES[name])
    prompt = tokens_of(61, 1, 6)
    expected = theirs.generate(
        torch.tensor(prompt), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    model, params = huggingface.load(tmp_path)
    ours = generate(model, params, prompt.tolist(), max_new_tokens=24, k=1, tau=1e-6, seeds=[0])
    assert ours.tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["llama", "llama_biases", "mistral", "qwen2_window", "qwen3", "yarn_scales"])
@pytest.mark.parametrize("largest_file", [10**9, 9000])
def test_transformers_reads_what_we_write(tmp_path, name, largest_file):
    tensors = random_tensors(FAMILIES[name])
    model, params = huggingface.load(write_folder(tmp_path / "theirs", FAMILIES[name], tensors))
    huggingface.save(tmp_path / "ours", model, params, largest_file=largest_file, seq_len=64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    tokens = tokens_of(61)
    expected = our_logits(tmp_path / "theirs", tokens)
    assert np.abs(their_logits(theirs, tokens) - expected).max() < 1e-4 * expected.std()


def test_shards_without_an_index_are_the_model_too(tmp_path):
    tensors = random_tensors(FAMILIES["yarn"])
    folder = write_folder(tmp_path, FAMILIES["yarn"], tensors)
    expected = our_logits(folder, tokens_of(61))
    np.testing.assert_array_equal(our_logits(write_shards(folder, tensors, index=False), tokens_of(61)), expected)
