"""config.json of the Llama family: what it says, what it leaves out, and all that is refused by name."""

import dataclasses
import json

import pytest
from interop.families import FAMILIES

from kforcing_jax.architecture import LLAMA, Architecture, Rope
from kforcing_jax.data.model_tokenizers import MODEL_TYPES
from kforcing_jax.interop import config_json
from kforcing_jax.interop.config_json import config_fields, described, read_config
from kforcing_jax.interop.torch_zip import CheckpointFormatError

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim"),
)
_ALL = {
    "architectures": ["XForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
_OF_QWEN = {"use_sliding_window": False, "max_window_layers": 21, "rope_theta": 1e6}


def sizes(width, mlp, layers, heads, kv_heads, ids, length):
    numbers = (width, mlp, layers, heads, kv_heads, ids, length)
    names = (*SIZES[1:6], SIZES[0], "max_position_embeddings")
    return dict(zip(names, numbers, strict=True))


# What the files of the hub say, as far as it is more than sizes.
_LLAMA_3_2 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
OF_THE_HUB = {
    "Llama-1": sizes(4096, 11008, 32, 32, None, 32000, 2048) | {"max_sequence_length": 2048, "pad_token_id": 0},
    "Llama-2": sizes(4096, 11008, 32, 32, 32, 32000, 4096) | {"pretraining_tp": 1, "rope_scaling": None},
    "Llama-3": sizes(4096, 14336, 32, 32, 8, 128256, 8192) | {"rope_theta": 5e5, "attention_bias": False},
    "Llama-3.2": sizes(2048, 8192, 16, 32, 8, 128256, 131072)
    | {"head_dim": 64, "mlp_bias": False, "rope_theta": 5e5, "rope_scaling": _LLAMA_3_2, "tie_word_embeddings": True},
    "SmolLM2": sizes(576, 1536, 30, 9, 3, 49152, 8192)
    | {
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_theta": 1e5,
        "transformers.js_config": {"dtype": "q4"},
    },
    "TinyLlama": sizes(2048, 5632, 22, 32, 4, 32000, 2048) | {"attention_bias": False, "pretraining_tp": 1},
    "Mistral-v0.1": sizes(4096, 14336, 32, 32, 8, 32000, 32768) | {"model_type": "mistral", "sliding_window": 4096},
    "Mistral-v0.3": sizes(4096, 14336, 32, 32, 8, 32768, 32768) | {"model_type": "mistral", "sliding_window": None},
    "Qwen1.5": sizes(1024, 2816, 24, 16, 16, 151936, 32768)
    | {"model_type": "qwen2", "sliding_window": 32768, **_OF_QWEN},
    "Qwen2.5": sizes(896, 4864, 24, 14, 2, 151936, 32768)
    | {"model_type": "qwen2", "sliding_window": 32768, "use_mrope": False, **_OF_QWEN},
    "Qwen3": sizes(1024, 3072, 28, 16, 8, 151936, 40960)
    | {"model_type": "qwen3", "head_dim": 128, "attention_bias": False, "sliding_window": None, "rope_scaling": None}
    | _OF_QWEN,
    "Qwen3, written by transformers 5": sizes(1024, 3072, 28, 16, 8, 151936, 40960)
    | {"model_type": "qwen3", "head_dim": 128, "layer_types": ["full_attention"] * 28, "dtype": "bfloat16"}
    | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_window": None},
}


def without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


def of(name, **changes):
    return described(FAMILIES[name] | changes).architecture


def refused(fields):
    with pytest.raises(CheckpointFormatError) as raised:
        described(fields)
    return str(raised.value)


def test_the_pieces_of_each_family():
    llama, qwen2, qwen3, mistral = (of(name) for name in ("llama", "qwen2", "qwen3", "mistral"))
    assert all(getattr(each, name) == value for each in (llama, qwen2, qwen3, mistral) for name, value in LLAMA.items())
    assert (qwen2.qkv_bias, qwen2.attention_out_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_width, qwen3.kv_heads) == (False, True, 12, 2)
    assert (mistral.sliding_window, llama.sliding_window) == (7, 0)
    assert llama.tied_embeddings and not mistral.tied_embeddings
    biases = of("llama_biases")
    assert (biases.qkv_bias, biases.attention_out_bias, biases.mlp_bias) == (True, True, True)
    assert of("qwen3_biases").attention_out_bias


def test_what_is_left_out_is_as_in_the_classes_of_transformers():
    def kept(name, *left_out):
        return described(without(FAMILIES[name], *left_out)).architecture

    assert kept("llama", "num_key_value_heads").kv_heads == 4
    assert kept("qwen3", "head_dim").head_width == 128
    assert kept("llama", "tie_word_embeddings").tied_embeddings is False
    assert kept("llama", "rms_norm_eps").norm_epsilon == 1e-6
    assert kept("mistral", "sliding_window").sliding_window == 4096
    assert kept("qwen2", "rope_theta").rope == Rope(base=1e4)
    assert refused(without(FAMILIES["mistral"], "num_key_value_heads")).startswith(
        "num_attention_heads = 4 is not divisible by num_key_value_heads = 8"
    )
    lengths = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}
    for name, length in lengths.items():
        assert described(without(FAMILIES[name], "max_position_embeddings")).max_length == length


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_heads_of_keys_that_are_null_are_all_heads(name):
    assert of(name, num_key_value_heads=None).kv_heads == 4


def test_a_window_is_that_of_all_layers_or_none():
    assert of("mistral", sliding_window=None).sliding_window == 0
    assert of("qwen2", sliding_window=9).sliding_window == 0  # use_sliding_window is not there
    assert of("qwen2_window").sliding_window == 9
    assert of("qwen2_window", max_window_layers=2).sliding_window == 0
    assert of("qwen2_window", layer_types=["sliding_attention"] * 2, max_window_layers=28).sliding_window == 9
    assert of("qwen2", layer_types=["full_attention"] * 2).sliding_window == 0
    assert of("qwen2_window", layer_types=["full_attention"] * 2).sliding_window == 0
    assert of("llama", layer_types=["full_attention"] * 2) == of("llama")
    assert of("mistral", layer_types=["sliding_attention"] * 2).sliding_window == 7
    assert of("mistral", layer_types=["full_attention"] * 2, sliding_window=None).sliding_window == 0


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("mistral", "full_attention", "layer_types says full_attention, and sliding_window = 7"),
        ("llama", "sliding_attention", "layer_types says sliding_attention, and nothing else"),
        ("qwen2", "sliding_attention", "layer_types says sliding_attention, and nothing else"),
        ("qwen2", "chunked_attention", "layer_types says chunked_attention"),
        ("llama", "linear_attention", "layer_types says linear_attention"),
    ],
)
def test_layers_that_are_not_as_the_window_are_refused(name, kind, said):
    assert said in refused(FAMILIES[name] | {"layer_types": [kind] * 2})


def test_a_window_below_zero_is_named_where_it_has_an_effect():
    assert refused(FAMILIES["mistral"] | {"sliding_window": -1}) == "sliding_window = -1 should be at least 0"
    assert of("qwen2", sliding_window=-1).sliding_window == 0


@pytest.mark.parametrize(
    "changes", [{"max_window_layers": 1}, {"layer_types": ["full_attention", "sliding_attention"]}]
)
def test_a_mix_of_layers_is_refused(changes):
    said = refused(FAMILIES["qwen2_window"] | changes)
    assert "layer_types is a mix of full_attention, sliding_attention" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"model_type": "mixtral"}, "model_type = 'mixtral' is not one of llama, mistral, qwen2, qwen3"),
        ({"model_type": ["llama"]}, "model_type = ['llama'] is not one of"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config (gptq): quantised weights"),
        ({"max_position_embeddings": -5}, "max_position_embeddings = -5 should be at least 0"),
        ({"rope_theta": 10**400}, "should be a number"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor = 0.25"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type = 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "'longrope'"),
        ({"rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]}}, "rope_scaling.mrope_section"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.low_freq_factor is missing"),
        ({"logits_scaling": 8.0}, "logits_scaling = 8.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, "num_experts_per_tok = 2"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"is_causal": False} | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map"),
        ({"sliding_window": 128}, "sliding_window = 128"),  # Llama has none
        ({"hidden_size": "32"}, "hidden_size = '32' should be a whole number"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not divisible by num_key_value_heads = 3"),
        ({"head_dim": 7}, "head_dim = 7 is odd"),
        *(({name: 0}, f"{name} = 0 should be at least 1") for name in SIZES),
        ({"rms_norm_eps": 2.0}, "rms_norm_eps = 2.0"),
        ({"rope_theta": 0.5}, "rope_theta = 0.5"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 0},
            "original_max_position_embeddings = 0",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes, said):
    assert said in refused(FAMILIES["llama_old_rope"] | {"rope_scaling": None} | changes)


def test_all_problems_are_in_one_message():
    said = refused(FAMILIES["llama"] | {"hidden_act": "relu", "logits_scaling": 2, "num_hidden_layers": None})
    assert all(name in said for name in ("hidden_act", "logits_scaling", "num_hidden_layers")) and "\n" not in said


def test_what_changes_nothing_is_ignored():
    of_the_hub = {
        "_name_or_path": "x",
        "architectures": ["LlamaForCausalLM"],
        "attention_dropout": 0.1,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "initializer_range": 0.04,
        "is_llama_config": True,
        "rope_interleaved": False,
        "pretraining_tp": 1,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"dtype": "q4"},
        "transformers_version": "4.42.3",
        "use_cache": True,
    }
    assert described(FAMILIES["llama"] | of_the_hub) == described(FAMILIES["llama"])


@pytest.mark.parametrize("name", OF_THE_HUB)
def test_files_of_the_hub_are_read(name):
    fields = {"model_type": "llama"} | _ALL | OF_THE_HUB[name]
    found = described(fields).architecture
    assert (found.num_layers, found.d_model) == (fields["num_hidden_layers"], fields["hidden_size"])
    assert found.sliding_window == (4096 if name == "Mistral-v0.1" else 0)


@pytest.mark.parametrize("content", [None, "{", "[1]", "[" * 100_000], ids=["none", "cut", "a list", "nested"])
def test_a_file_that_is_no_config_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointFormatError, match=r"config\.json"):
        read_config(path)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_is_written_reads_back(name):
    found = described(FAMILIES[name])
    written = json.loads(json.dumps(config_fields(found.architecture, found.vocab_size, found.max_length)))
    assert described(written) == found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm": "layer_norm"}, "not a backbone of the Llama family .model.norm = 'layer_norm'"),
        ({"mlp": "gelu"}, "model.mlp = 'gelu'"),
        ({"qkv_bias": True, "mlp_bias": True}, "no family of"),
    ],
)
def test_another_backbone_has_no_config(changes, said):
    architecture = Architecture(num_layers=1, d_model=8, num_heads=2, **LLAMA)
    with pytest.raises(CheckpointFormatError, match=said):
        config_fields(dataclasses.replace(architecture, **changes), 10, 8)


def test_data_knows_the_same_families():
    assert tuple(config_json._FAMILIES) == MODEL_TYPES
