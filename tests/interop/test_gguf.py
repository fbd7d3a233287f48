"""GGUF files that the package writes: the same models as in folders, rotated rows and scalings undone."""

import jax
import numpy as np
import pytest
from interop.families import FAMILIES, random_tensors, write_folder

from kforcing_jax.architecture import Rope
from kforcing_jax.errors import DataError
from kforcing_jax.interop import huggingface
from kforcing_jax.interop.config_json import described
from kforcing_jax.interop.fields import Fields
from kforcing_jax.interop.gguf_models import _NAMES, _from_factors
from kforcing_jax.interop.torch_zip import CheckpointFormatError

gguf = pytest.importorskip("gguf")
_THEIRS = {ours: name for name, ours in _NAMES.items()}
_NO_ROPE = {"rope_parameters": None, "rope_theta": 1e4}


def gguf_name(name):
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{_THEIRS[stem]}.{kind}"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_THEIRS[rest]}.{kind}"


def neighbours_together(rows, heads):
    """As llama.cpp keeps queries and keys of Llama: channel c and c + C / 2 side by side."""
    by_half = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return by_half.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, fields, tensors, kind=None, extra=None, tensor_type=None, metadata=None):
    """A file of the model that config.json `fields` describe; returns its path."""
    a, vocab_size, length, _ = described(fields)
    kind = kind or fields["model_type"]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(a.num_layers)
    writer.add_context_length(length)
    writer.add_embedding_length(a.d_model)
    writer.add_feed_forward_length(a.mlp_width)
    writer.add_head_count(a.num_heads)
    writer.add_head_count_kv(a.kv_heads)
    writer.add_key_length(a.head_width)
    writer.add_value_length(a.head_width)
    writer.add_layer_norm_rms_eps(a.norm_epsilon)
    writer.add_rope_freq_base(a.rope.base)
    writer.add_vocab_size(vocab_size)
    for name, value in (metadata or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
        add[type(value)](f"{kind}.{name}" if not name.startswith("general") else name, value)
    for name, tensor in tensors.items():
        if kind == "llama" and ".self_attn." in name and name.split(".")[-2] in ("q_proj", "k_proj"):
            tensor = neighbours_together(tensor, a.num_heads if "q_proj" in name else a.kv_heads)
        quantised = tensor_type is not None and tensor.ndim > 1
        if quantised:
            tensor = gguf.quantize(np.ascontiguousarray(tensor), tensor_type)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(tensor), raw_dtype=tensor_type if quantised else None)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def both(tmp_path, fields, **options):
    tensors = random_tensors(fields)
    folder = write_folder(tmp_path / "folder", fields, tensors)
    return huggingface.load(folder), huggingface.load(write_gguf(tmp_path / "m.gguf", fields, tensors, **options))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama_biases", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
def test_a_file_is_the_folder_it_was_made_from(tmp_path, name, kind):
    fields = FAMILIES[name] | ({"sliding_window": None} if name == "mistral" else {})
    (model, params), (other, others) = both(tmp_path, fields, kind=kind)
    assert other.cfg == model.cfg
    jax.tree.map(np.testing.assert_array_equal, others, params)


def test_a_window_and_a_tied_output(tmp_path):
    (model, _), (other, _) = both(tmp_path, FAMILIES["mistral"], kind="llama", metadata={"attention.sliding_window": 7})
    assert other.cfg.sliding_window == model.cfg.sliding_window == 7 and not other.cfg.tied_embeddings
    tied = write_gguf(tmp_path / "tied.gguf", FAMILIES["qwen2"], random_tensors(FAMILIES["qwen2"]))
    assert huggingface.architecture(tied)[0].tied_embeddings


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_quantised_numbers_are_near_what_they_were(tmp_path, kind):
    (_, params), (_, others) = both(
        tmp_path, FAMILIES["qwen2"] | _SIZES_OF_BLOCKS, tensor_type=gguf.GGMLQuantizationType[kind]
    )
    kernel = ("backbone", "blocks", "mlp_in", "kernel")
    ours, theirs = others, params
    for part in kernel:
        ours, theirs = ours[part], theirs[part]
    assert 0 < np.abs(ours - theirs).max() < {"F16": 0.002, "BF16": 0.01, "Q8_0": 0.02, "Q4_0": 0.3}[kind]


_SIZES_OF_BLOCKS = {"hidden_size": 64, "intermediate_size": 96}


def llama3_factors(rope, head_width):
    """What llama.cpp's converter keeps of Llama 3's scaling."""
    frequencies = rope.base ** (-np.arange(0, head_width, 2) / head_width)
    turns = rope.original_length * frequencies / (2 * np.pi)
    kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return (1 / ((1 - kept) / rope.factor + kept)).astype(np.float32)


@pytest.mark.parametrize(
    "rope",
    [
        Rope(base=5e5, scaling="llama3", factor=8.0, original_length=8192),
        Rope(base=5e5, scaling="llama3", factor=32.0, original_length=8192),
        Rope(base=1e4, scaling="llama3", factor=4.0, original_length=512, low_freq_factor=1.0, high_freq_factor=8.0),
    ],
)
def test_the_scaling_of_llama_3_is_worked_out_from_what_is_kept_of_it(tmp_path, rope):
    fields = FAMILIES["llama"] | _NO_ROPE | {"rope_theta": rope.base, "head_dim": 128, "num_attention_heads": 2}
    factors = {"rope_freqs.weight": llama3_factors(rope, 128)}
    found, _ = huggingface.architecture(write_gguf(tmp_path / "m.gguf", fields, random_tensors(fields), extra=factors))
    assert found.rope == rope


@pytest.mark.parametrize("head_width", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("length", [8192, 5000])
@pytest.mark.parametrize("high", [4.0, 1.2, 3.0, 40.0])
def test_the_scaling_of_narrow_heads_computes_the_same(head_width, length, high):
    rope = Rope(base=5e5, scaling="llama3", factor=8.0, original_length=length, high_freq_factor=high)
    factors = llama3_factors(rope, head_width)
    fields = Fields({})
    found = _from_factors(fields, factors.astype(np.float64), rope.base, head_width)
    assert not fields.problems
    np.testing.assert_allclose(llama3_factors(found, head_width), factors, rtol=1e-3)
    if (length, high) == (8192, 4.0) and head_width > 4:  # two frequencies do not say the factor
        assert found == rope


def test_a_size_of_zero_is_named(tmp_path):
    fields = FAMILIES["llama"] | _NO_ROPE
    path = write_gguf(tmp_path / "m.gguf", fields, random_tensors(fields), metadata={"attention.head_count_kv": 0})
    with pytest.raises(CheckpointFormatError, match=r"attention\.head_count_kv = 0 should be at least 1"):
        huggingface.load(path)


def test_factors_that_are_no_such_scaling_are_refused(tmp_path):
    fields = FAMILIES["llama"] | _NO_ROPE | {"head_dim": 128, "num_attention_heads": 2}
    factors = {"rope_freqs.weight": np.linspace(1, 5, 64, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", fields, random_tensors(fields), extra=factors)
    with pytest.raises(CheckpointFormatError, match=r"rope_freqs\.weight is not a scaling as Llama 3's"):
        huggingface.load(path)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, Rope(scaling="linear", factor=4.0)),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
            Rope(scaling="yarn", factor=4.0, original_length=16, attention_factor=1 + 0.1 * np.log(4)),
        ),
        ({"rope.scaling.type": "none"}, Rope()),
    ],
)
def test_scalings_that_a_file_says(tmp_path, metadata, expected):
    fields = FAMILIES["llama_biases"]
    path = write_gguf(tmp_path / "m.gguf", fields, random_tensors(fields), metadata=metadata)
    assert huggingface.architecture(path)[0].rope == expected


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type = 'longrope'"),
        ({"expert_count": 8}, "expert_count = 8 is not known"),
        ({"rope.dimension_count": 4}, "rope.dimension_count = 4 should be the width of a head, 10"),
        ({"attention.scale": 0.5}, "attention.scale"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, metadata, said):
    fields = FAMILIES["llama_biases"]
    path = write_gguf(tmp_path / "m.gguf", fields, random_tensors(fields), metadata=metadata)
    with pytest.raises(CheckpointFormatError, match=said) as raised:
        huggingface.load(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_another_architecture_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", FAMILIES["qwen2"], random_tensors(FAMILIES["qwen2"]), kind="gemma2")
    with pytest.raises(
        CheckpointFormatError, match=r"general\.architecture = 'gemma2' is not one of llama, qwen2, qwen3"
    ):
        huggingface.load(path)


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_tensors_that_are_not_the_models_are_named(tmp_path, change):
    tensors, extra = random_tensors(FAMILIES["qwen2"]), {}
    if change == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    else:
        extra = {"blk.0.ffn_gate_inp.weight": np.zeros((4, 32), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", FAMILIES["qwen2"], tensors, extra=extra)
    with pytest.raises(CheckpointFormatError, match=f"tensors are {change}"):
        huggingface.load(path)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97])
def test_a_file_that_is_cut_is_refused(tmp_path, share):
    path = write_gguf(tmp_path / "m.gguf", FAMILIES["qwen2"], random_tensors(FAMILIES["qwen2"]))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointFormatError, match="damaged, cut short or no GGUF file") as raised:
        huggingface.load(path)
    assert str(raised.value).startswith(str(path))


def test_types_that_are_not_read_are_named(tmp_path):
    tensors = random_tensors(FAMILIES["qwen2"])
    path = write_gguf(
        tmp_path / "m.gguf", FAMILIES["qwen2"], tensors, extra={"blk.0.other": np.zeros((2, 32), np.int8)}
    )
    with pytest.raises(CheckpointFormatError, match="tensors of type I8 are not read"):
        huggingface.load(path)


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", FAMILIES["qwen2"], random_tensors(FAMILIES["qwen2"]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointFormatError, match="pip install gguf"):
        huggingface.load(path)
    with pytest.raises(DataError, match="pip install gguf"):
        huggingface.tokenizer(path)
