"""Reading released checkpoints: what is read is exact, and what is not a checkpoint is refused and never run."""

import builtins
import collections
import os
import pickle
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kforcing_jax.interop import official
from kforcing_jax.models import CausalLM, PushForwardLM


class Tensor(NamedTuple):
    """A tensor as a torch checkpoint describes it: a view of a numbered storage."""

    storage: str
    count: int
    offset: int
    shape: tuple
    strides: tuple
    kind: str = "FloatStorage"


def _global(module, name):
    return b"c" + f"{module}\n{name}\n".encode()


def _plain(value):
    """Pickle operations that push a value, without the header and the stop."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _tuple(*parts):
    return b"(" + b"".join(parts) + b"t"


def _pickled(value):
    """The operations that torch.save writes for a value (torch itself is not needed)."""
    if isinstance(value, Tensor):
        storage = _tuple(
            _plain("storage"), _global("torch", value.kind), *map(_plain, (value.storage, "cpu", value.count))
        )
        args = [storage + b"Q", *map(_plain, (value.offset, value.shape, value.strides, False))]
        hooks = _global("collections", "OrderedDict") + b")R"
        return _global("torch._utils", "_rebuild_tensor_v2") + _tuple(*args, hooks) + b"R"
    if isinstance(value, dict):
        return b"}(" + b"".join(_pickled(key) + _pickled(item) for key, item in value.items()) + b"u"
    return _plain(value)


def write_checkpoint(path, content, storages, byteorder="little"):
    """A zip archive with the layout of torch.save."""
    write_archive(path, {"data.pkl": b"\x80\x02" + _pickled(content) + b"."}, storages, byteorder)
    return path


def write_archive(path, files, storages=None, byteorder="little"):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"archive/{name}", data)
        archive.writestr("archive/byteorder", byteorder)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)


def read_one(path, tensor, data, **kwargs):
    """The single tensor of a checkpoint."""
    write_checkpoint(path, {"state_dict": {"x": tensor}}, {tensor.storage: data}, **kwargs)
    return official.read_state_dict(path)["x"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.ckpt"


NUMBERS = np.arange(24, dtype=np.float32)


@pytest.mark.parametrize(
    "offset, shape, strides, expected",
    [
        (0, (4, 6), (6, 1), NUMBERS.reshape(4, 6)),
        (0, (6, 4), (1, 6), NUMBERS.reshape(4, 6).T),
        (5, (3,), (1,), NUMBERS[5:8]),
        (12, (2, 2), (6, 2), NUMBERS.reshape(4, 6)[2:, :4:2]),
        (23, (), (), NUMBERS[23]),
        (0, (0, 3), (3, 1), np.zeros((0, 3))),
        (3, (2, 4), (0, 1), np.stack([NUMBERS[3:7]] * 2)),
    ],
    ids=["contiguous", "transposed", "offset", "strided", "scalar", "empty", "expanded"],
)
def test_a_view_of_a_storage_is_read_exactly(path, offset, shape, strides, expected):
    read = read_one(path, Tensor("0", 24, offset, shape, strides), NUMBERS.tobytes())
    np.testing.assert_array_equal(read, expected)
    assert read.shape == shape and read.dtype == np.float32


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("FloatStorage", np.float32),
        ("DoubleStorage", np.float64),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64),
        ("IntStorage", np.int32),
        ("ShortStorage", np.int16),
        ("CharStorage", np.int8),
        ("ByteStorage", np.uint8),
        ("BoolStorage", np.bool_),
    ],
)
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_every_dtype_is_read_in_either_byte_order(path, kind, dtype, byteorder):
    values = np.array([0, 1, 3, 100]).astype(dtype)
    bytes_of_each = values.view(np.uint8).reshape(4, -1)
    raw = (bytes_of_each if byteorder == "little" else bytes_of_each[:, ::-1]).tobytes()
    read = read_one(path, Tensor("0", 4, 0, (4,), (1,), kind), raw, byteorder=byteorder)
    assert read.dtype == dtype and read.dtype.isnative
    np.testing.assert_array_equal(read, values)


class RunsOnLoad:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "function, named",
    [(os.system, f"{os.system.__module__}.system"), (builtins.eval, "builtins.eval"), (builtins.exec, "builtins.exec")],
)
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(path, function, named, nested):
    proof = path.with_name("executed")
    command = f"touch {proof}" if function is os.system else f"open({str(proof)!r}, 'w')"
    attack = RunsOnLoad(function, command)
    content = {"state_dict": {"x": attack}} if nested else attack
    write_archive(path, {"data.pkl": pickle.dumps(content)})
    with pytest.raises(official.CheckpointFormatError, match=named):
        official.load(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    "module, name",
    [
        ("torch._utils", "_rebuild_parameter"),
        ("torch", "load"),
        ("torch", "Tensor"),
        ("collections", "defaultdict"),
        ("collections.OrderedDict", "fromkeys"),
        ("numpy", "FloatStorage"),
    ],
)
def test_any_other_global_is_refused_by_name(path, module, name):
    write_archive(path, {"data.pkl": b"\x80\x02" + _global(module, name) + b")R."})
    with pytest.raises(official.CheckpointFormatError, match=f"{module}.{name}"):
        official.load(path)


def test_a_dotted_name_does_not_reach_into_an_allowed_global(path):
    attack = b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93."
    write_archive(path, {"data.pkl": attack})
    with pytest.raises(official.CheckpointFormatError, match=r"OrderedDict\.fromkeys"):
        official.load(path)


def test_a_file_that_is_no_archive_is_refused_by_path(path):
    path.write_bytes(b"not a zip")
    with pytest.raises(official.CheckpointFormatError, match=f"{path}: not a torch zip checkpoint"):
        official.load(path)


def test_an_archive_without_a_pickle_is_refused(path):
    write_archive(path, {"model.json": b"{}"})
    with pytest.raises(official.CheckpointFormatError, match=r"without a data\.pkl"):
        official.load(path)


def test_a_pickle_cut_short_is_refused(path):
    whole = pickle.dumps({"state_dict": {}})
    write_archive(path, {"data.pkl": whole[:-5]})
    with pytest.raises(official.CheckpointFormatError, match="damaged checkpoint"):
        official.load(path)


def test_a_storage_cut_short_is_refused(path):
    with pytest.raises(official.CheckpointFormatError, match="storage 0 is cut short"):
        read_one(path, Tensor("0", 24, 0, (24,), (1,)), NUMBERS.tobytes()[:-1])


def test_a_storage_that_is_not_there_is_refused(path):
    write_checkpoint(path, {"state_dict": {"x": Tensor("7", 24, 0, (24,), (1,))}}, {"0": NUMBERS.tobytes()})
    with pytest.raises(official.CheckpointFormatError, match="archive/data/7"):
        official.read_state_dict(path)


@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (0, (25,), (1,)),
        (1, (24,), (1,)),
        (0, (2, 2), (24, 1)),
        (-1, (2,), (1,)),
        (5, (3,), (-1,)),
        (24, (), ()),
        (0, (2, 2), (30, -10)),
    ],
)
def test_a_tensor_that_reaches_outside_its_storage_is_refused(path, offset, shape, strides):
    with pytest.raises(official.CheckpointFormatError, match="reaches outside its storage"):
        read_one(path, Tensor("0", 24, offset, shape, strides), NUMBERS.tobytes())


@pytest.mark.parametrize("content", [[], {}, {"state_dict": 3}, {"state_dict": {"x": 3}}, {"weights": {}}])
def test_a_checkpoint_without_a_state_dict_is_refused(path, content):
    write_checkpoint(path, content, {})
    with pytest.raises(official.CheckpointFormatError, match='no "state_dict" of tensors'):
        official.load(path)


def released_tensors(vocab=7, d=4, heads=1, layers=2, student=True, prefix="backbone."):
    """A random state dict with the names and shapes of the released models."""
    shapes = {"vocab_embed.embedding": (vocab, d), "rotary_emb.inv_freq": (d // heads // 2,)}
    for i in range(layers):
        block = f"blocks.{i}."
        shapes |= {block + "norm1.weight": (d,), block + "norm2.weight": (d,)}
        shapes |= {block + "attn_qkv.weight": (3 * d, d), block + "attn_out.weight": (d, d)}
        shapes |= {block + "mlp.0.weight": (4 * d, d), block + "mlp.0.bias": (4 * d,)}
        shapes |= {block + "mlp.2.weight": (d, 4 * d), block + "mlp.2.bias": (d,)}
    if student:
        encoder = "noise_encoder."
        shapes |= {encoder + "combined_proj.weight": (d, 2 * d), encoder + "combined_proj.bias": (d,)}
        shapes |= {encoder + "norm.weight": (d,), encoder + "norm.bias": (d,)}
        shapes |= {encoder + "mlp.0.weight": (4 * d, d), encoder + "mlp.0.bias": (4 * d,)}
        shapes |= {encoder + "mlp.2.weight": (d, 4 * d), encoder + "mlp.2.bias": (d,)}
    shapes |= {"output_layer.norm_final.weight": (d,)}
    shapes |= {"output_layer.linear.weight": (vocab, d), "output_layer.linear.bias": (vocab,)}
    rng = np.random.default_rng(0)
    tensors = {prefix + name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    half = d // heads // 2
    tensors[prefix + "rotary_emb.inv_freq"] = (10_000.0 ** (-np.arange(half) / half)).astype(np.float32)
    return tensors


def assert_same_tree(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def contiguous(storage, array):
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Tensor(storage, array.size, 0, array.shape, strides)


def test_load_reads_a_checkpoint_written_in_the_released_layout(path):
    tensors = released_tensors()
    described = {name: contiguous(str(i), array) for i, (name, array) in enumerate(tensors.items())}
    write_checkpoint(
        path,
        {"epoch": 3, "state_dict": described},
        {str(i): array.tobytes() for i, array in enumerate(tensors.values())},
    )
    model, params = official.load(path)
    expected_model, expected_params = official.from_state_dict(tensors)
    assert model == expected_model
    assert_same_tree(params, expected_params)


@pytest.mark.parametrize("student, kind", [(False, CausalLM), (True, PushForwardLM)])
def test_a_noise_encoder_makes_a_push_forward_lm(student, kind):
    model, params = official.from_state_dict(released_tensors(student=student))
    inputs = (jnp.zeros((1, 2, 1)), jnp.ones(1)) if student else ()
    expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int), *inputs)["params"]
    assert type(model) is kind
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_sizes_come_from_the_shapes():
    model, _ = official.from_state_dict(released_tensors(vocab=11, d=16, heads=2, layers=3))
    cfg = model.cfg
    assert (cfg.vocab_size, cfg.d_model, cfg.num_heads, cfg.num_layers) == (11, 16, 2, 3)


def test_names_may_come_without_the_prefix():
    with_prefix, without = (official.from_state_dict(released_tensors(prefix=prefix)) for prefix in ("backbone.", ""))
    assert with_prefix[0] == without[0]
    assert_same_tree(with_prefix[1], without[1])


@pytest.mark.parametrize("vocab, mask_id", [(30_522, 103), (50_258, 50_257), (50_257, 50_256), (7, 6)])
def test_the_mask_id_follows_from_the_vocabulary_size(vocab, mask_id):
    tensors = released_tensors(vocab=vocab, d=2, layers=1, student=False)
    assert official.from_state_dict(tensors)[0].cfg.mask_id == mask_id


def test_a_given_mask_id_is_used():
    assert official.from_state_dict(released_tensors(), mask_id=2)[0].cfg.mask_id == 2
    assert official.from_state_dict(released_tensors(), mask_id=0)[0].cfg.mask_id == 0


def test_a_mask_id_outside_the_vocabulary_is_refused():
    with pytest.raises(official.CheckpointFormatError, match="mask_id = 7"):
        official.from_state_dict(released_tensors(), mask_id=7)


@pytest.mark.parametrize("name", released_tensors(layers=1, prefix=""))
def test_a_missing_tensor_is_named(name):
    tensors = released_tensors(layers=1)
    del tensors["backbone." + name]
    with pytest.raises(official.CheckpointFormatError, match=f"tensor {name} is missing"):
        official.from_state_dict(tensors)


@pytest.mark.parametrize("name", released_tensors(layers=1, prefix=""))
def test_a_tensor_with_an_axis_too_many_is_named(name):
    tensors = released_tensors(layers=1)
    tensors["backbone." + name] = tensors["backbone." + name][None]
    with pytest.raises(official.CheckpointFormatError, match=rf"tensor {name} has shape \(1, "):
        official.from_state_dict(tensors)


def test_a_tensor_of_the_wrong_size_is_named_with_the_right_one():
    tensors = released_tensors()
    tensors["backbone.blocks.1.mlp.0.bias"] = np.zeros(15, np.float32)
    expected = r"tensor blocks.1.mlp.0.bias has shape \(15,\), expected \(16,\)"
    with pytest.raises(official.CheckpointFormatError, match=expected):
        official.from_state_dict(tensors)


def test_a_gap_in_the_block_numbers_is_refused():
    tensors = {name: array for name, array in released_tensors(layers=3).items() if ".blocks.1." not in name}
    with pytest.raises(official.CheckpointFormatError, match=r"blocks are numbered \[0, 2\]"):
        official.from_state_dict(tensors)


@pytest.mark.parametrize("half_head", [0, 3, 9])
def test_rotary_frequencies_that_do_not_fit_the_width_are_refused(half_head):
    """A width of 16 has no heads of width 0, 6 or 18."""
    tensors = released_tensors(d=16)
    tensors["backbone.rotary_emb.inv_freq"] = np.ones(half_head, np.float32)
    with pytest.raises(official.CheckpointFormatError, match="head"):
        official.from_state_dict(tensors)


def test_rotary_frequencies_of_another_base_are_refused():
    """The models rotate with base 10,000; weights trained with another one would load and talk nonsense."""
    tensors = released_tensors(d=16)
    tensors["backbone.rotary_emb.inv_freq"] = (500_000.0 ** (-np.arange(8) / 8)).astype(np.float32)
    with pytest.raises(official.CheckpointFormatError, match="inv_freq"):
        official.from_state_dict(tensors)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs torch, an optional extra: pip install 'kforcing-jax[torch]'")


def test_what_torch_saves_is_read_bit_for_bit(torch, path):
    """Views that share one storage (plain, transposed, offset, strided) and every dtype that weights come in."""
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    state = collections.OrderedDict(
        base=base,
        transposed=base.T,
        offset=base.reshape(-1)[11:20],
        strided=base[1::2, ::3],
        expanded=base[0].expand(3, 8),
        scalar=base[2, 3],
        empty=base[:0],
        bfloat16=base.bfloat16(),
        half=base.half(),
        double=base.double(),
        int64=torch.arange(-3, 5),
        bool=base > 0,
    )
    torch.save({"state_dict": state, "epoch": 3}, path)
    read = official.read_state_dict(path)
    assert list(read) == list(state)
    for name, tensor in state.items():
        expected = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        assert read[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(read[name].astype(expected.numpy().dtype), expected.numpy(), err_msg=name)
    assert read["bfloat16"].dtype == ml_dtypes.bfloat16
    assert [read[name].dtype for name in ("half", "double", "int64")] == [np.float16, np.float64, np.int64]


def test_load_reads_what_torch_saves(torch, path):
    tensors = released_tensors()
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    embedding = torch.from_numpy(np.ascontiguousarray(tensors["backbone.vocab_embed.embedding"].T)).T
    state["backbone.vocab_embed.embedding"] = embedding
    assert not embedding.is_contiguous()
    torch.save({"state_dict": state}, path)
    model, params = official.load(path)
    expected_model, expected_params = official.from_state_dict(tensors)
    assert model == expected_model
    assert_same_tree(params, expected_params)
