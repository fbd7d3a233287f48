"""Files of torch.save without torch: what is read is exact, what is not is refused, and nothing is ever run."""

import argparse
import builtins
import collections
import datetime
import os
import pathlib
import pickle
import sys
import types
import typing
import zipfile

import ml_dtypes
import numpy as np
import pytest
from interop.archives import Object, Parameter, Tensor, described, global_name, write_archive, write_checkpoint

from kforcing_jax.errors import UserError
from kforcing_jax.interop import tensor_files, torch_zip
from kforcing_jax.interop.torch_zip import CheckpointFormatError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.ckpt"


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason='torch is not installed (pip install -e ".[torch]")')


def content_of(path):
    with tensor_files.opened(path) as content:
        return content


def read_x(path):
    """The tensor x of a file."""
    with tensor_files.opened(path) as content:
        return content["x"].read()


def read_one(path, tensor, data, **kwargs):
    """The single tensor of a file."""
    return read_x(write_checkpoint(path, {"x": tensor}, {tensor.storage: data}, **kwargs))


NUMBERS = np.arange(24, dtype=np.float32)
WHOLE = Tensor("0", 24, 0, (24,), (1,))


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


DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_every_dtype_is_read_in_either_byte_order(path, byteorder):
    for kind, dtype in DTYPES.items():
        values = np.array([0, 1, 3, 100]).astype(dtype)
        bytes_of_each = values.view(np.uint8).reshape(4, -1)
        raw = (bytes_of_each if byteorder == "little" else bytes_of_each[:, ::-1]).tobytes()
        read = read_one(path, Tensor("0", 4, 0, (4,), (1,), kind), raw, byteorder=byteorder)
        assert read.dtype == dtype and read.dtype.isnative
        np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("constructor", ["_rebuild_parameter", "_rebuild_parameter_with_state"])
def test_a_parameter_is_its_tensor(path, constructor):
    write_checkpoint(path, {"x": Parameter(WHOLE, constructor)}, {"0": NUMBERS.tobytes()})
    np.testing.assert_array_equal(read_x(path), NUMBERS)


def test_only_the_storages_of_tensors_that_are_read_are_touched(path, monkeypatch):
    tensors, storages = described({name: NUMBERS for name in "abc"})
    write_checkpoint(path, tensors, storages)
    touched, opened = [], zipfile.ZipFile.open
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda self, name, *a: touched.append(name) or opened(self, name, *a))
    with tensor_files.opened(path) as content:
        content["b"].read()
    assert [name for name in touched if "/data/" in name] == ["archive/data/1"]


class RunsOnLoad:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function, named",
    [
        (os.system, f"{os.system.__module__}.system"),
        (builtins.eval, "builtins.eval"),
        (builtins.exec, "builtins.exec"),
        (builtins.getattr, "builtins.getattr"),
        (builtins.__import__, "builtins.__import__"),
    ],
)
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(path, function, named):
    proof = path.with_name("executed")
    command = f"touch {proof}" if function is os.system else f"open({str(proof)!r}, 'w')"
    attack = RunsOnLoad(function, command)
    for content in (attack, {"state_dict": {"x": attack}}):
        write_archive(path, {"data.pkl": pickle.dumps(content)})
        with pytest.raises(CheckpointFormatError, match=named):
            content_of(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    "module, name",
    [
        ("subprocess", "Popen"),
        ("nt", "system"),
        ("__builtin__", "eval"),
        ("builtins", "dict.fromkeys"),
        ("importlib", "import_module"),
        ("pickle", "loads"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("torchvision", "Tensor"),
        ("kforcing_jax.workdir", "Workdir"),
    ],
)
def test_a_name_outside_the_list_is_refused_by_name(path, module, name):
    write_archive(path, {"data.pkl": b"\x80\x02" + global_name(module, name) + b")R."})
    with pytest.raises(CheckpointFormatError, match=f"holds {module}.{name}, which is not a tensor"):
        content_of(path)


def stack_global(module, name):
    """A name as newer pickles give it, which may hold anything."""
    return b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93"


def test_a_refused_name_cannot_write_to_the_terminal(path):
    write_archive(path, {"data.pkl": stack_global("os", "\x1b[2Jsys\ntem") + b"."})
    with pytest.raises(CheckpointFormatError) as refusal:
        content_of(path)
    assert str(refusal.value).isprintable()


EXPECTED_IN_CHECKPOINTS = [
    ("omegaconf.dictconfig", "DictConfig"),
    ("omegaconf.base", "ContainerMetadata"),
    ("transformers.models.bert.tokenization_bert_fast", "BertTokenizerFast"),
    ("tokenizers", "Tokenizer"),
    ("pytorch_lightning.utilities.parsing", "AttributeDict"),
    ("torch", "device"),
    ("torch", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("typing", "Any"),
    ("collections", "defaultdict"),
    ("pathlib", "PosixPath"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
    ("__builtin__", "set"),
]


@pytest.mark.parametrize("module, name", EXPECTED_IN_CHECKPOINTS)
def test_an_object_of_a_harmless_package_becomes_a_placeholder_that_takes_everything(path, module, name):
    write_checkpoint(path, {"x": Object(module, name), "y": [Object(module, name)]})
    content = content_of(path)
    assert isinstance(content["x"], torch_zip.Placeholder)
    assert torch_zip.describe(content["x"]) == torch_zip.describe(content["y"][0]) == f"{module}.{name}"


@pytest.mark.parametrize(
    "operations",
    [
        b")\x81",  # NEWOBJ
        b")}\x92",  # NEWOBJ_EX
        b"K\x01\x85R",  # REDUCE
        b")RK\x01K\x02s",  # SETITEM
        b")R(K\x01K\x02u",  # SETITEMS
        b")RK\x01a",  # APPEND
        b")R(K\x01K\x02e",  # APPENDS
        b")R(K\x01K\x02\x90",  # ADDITEMS
        b")R}b",  # BUILD
        b")R}}\x86b",  # BUILD with slots
    ],
)
def test_a_placeholder_takes_every_operation_of_a_pickle(path, operations):
    write_archive(path, {"data.pkl": b"\x80\x04comegaconf\nDictConfig\n" + operations + b"."})
    assert torch_zip.describe(content_of(path)) == "omegaconf.DictConfig"


def test_a_placeholder_can_be_a_key(path):
    as_key = b"\x80\x02}ctyping\nAny\nK\x01s."
    write_archive(path, {"data.pkl": as_key})
    assert list(map(torch_zip.describe, content_of(path))) == ["typing.Any"]


def test_nothing_is_imported_for_a_placeholder(path, monkeypatch):
    """The name of a module whose import would be seen."""
    (path.parent / "lightning_utilities.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.delitem(sys.modules, "lightning_utilities", raising=False)
    write_checkpoint(path, {"x": Object("lightning_utilities", "Anything")})
    content_of(path)
    assert "lightning_utilities" not in sys.modules


@pytest.mark.parametrize(
    "name", ["collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2", "torch\nFloatStorage", "omegaconf\nX"]
)
@pytest.mark.parametrize("state", [b"}\x8c\x01aK\x01s", b"}}\x8c\x03newK\x01s\x86"], ids=["attributes", "slots"])
def test_a_pickle_cannot_change_what_it_is_given(path, name, state):
    """An assignment to a class or function that all files share would outlive the file."""
    write_archive(path, {"data.pkl": b"\x80\x04c" + name.encode() + b"\n" + state + b"b."})
    with pytest.raises(CheckpointFormatError, match="damaged"):
        content_of(path)


def test_a_dotted_name_does_not_reach_into_a_known_one(path):
    write_archive(path, {"data.pkl": stack_global("collections", "OrderedDict.fromkeys") + b")R."})
    assert torch_zip.describe(content_of(path)) == "collections.OrderedDict.fromkeys"


@pytest.mark.parametrize("kind", ["ComplexFloatStorage", "QInt8Storage", "UntypedStorage"])
def test_a_tensor_of_a_dtype_that_numpy_lacks_is_a_placeholder_of_its_storage(path, kind):
    write_checkpoint(path, {"x": WHOLE._replace(kind=kind)})
    assert torch_zip.describe(content_of(path)["x"]) == f"torch.{kind}"


def says(path, message):
    """The whole message of the refusal is the path and then this, in one line."""
    with pytest.raises(CheckpointFormatError) as refusal:
        content_of(path)
    assert isinstance(refusal.value, UserError) and isinstance(refusal.value, ValueError)
    text = str(refusal.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    assert message in text, text


def test_a_file_that_is_no_archive_is_refused(path):
    path.write_bytes(b"\x93NUMPY\x01\x00")
    says(path, "not a file of torch.save or safetensors")


def test_a_text_is_shown_for_what_it_is(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    says(path, "not a file of torch.save or safetensors but text: 'version https://git-lfs")


def test_an_empty_file_is_refused(path):
    path.touch()
    says(path, "the file is empty")


def test_a_file_cut_short_is_refused(path):
    write_checkpoint(path, {"x": WHOLE}, {"0": NUMBERS.tobytes()})
    path.write_bytes(path.read_bytes()[:-100])
    says(path, "cut short or damaged (a zip archive without its end); copy or download it again")


def test_every_cut_of_a_file_is_refused_in_one_line(path):
    write_checkpoint(path, {"x": WHOLE}, {"0": NUMBERS.tobytes()})
    whole = path.read_bytes()
    for length in range(0, len(whole), 29):
        path.write_bytes(whole[:length])
        says(path, "")


def test_a_file_of_the_old_format_is_refused_with_the_way_out(torch, path):
    torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    says(path, "written in the format before torch 1.6; load it with torch and torch.save it again")


def test_an_archive_without_a_pickle_is_refused(path):
    write_archive(path, {"model.json": b"{}"})
    says(path, "a zip archive without a data.pkl, so not a torch checkpoint")
    np.savez(path.with_suffix(".npz"), x=NUMBERS)
    says(path.with_suffix(".npz"), "a zip archive without a data.pkl")


def test_a_directory_and_a_missing_file_are_refused(path):
    says(path, "cannot be read: No such file or directory")
    path.mkdir()
    says(path, "cannot be read: Is a directory")


def test_a_file_that_may_not_be_read_is_refused(path, monkeypatch):
    def denied(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(zipfile, "ZipFile", denied)
    says(path, "cannot be read: Permission denied")


def test_a_pickle_cut_short_is_refused(path):
    write_archive(path, {"data.pkl": pickle.dumps({"state_dict": {}})[:-5]})
    says(path, "damaged checkpoint")


@pytest.mark.parametrize(
    "operations",
    [
        b"Nr\xff\xff\xff\x7f.",  # a memo index, for which the unpickler would make a table of 32 GB
        b"Np2147483647\n.",
        b"\x96\xff\xff\xff\xff\x7f\x00\x00\x00.",  # a length of 550 GB
        b"\x8e\xff\xff\xff\xff\x7f\x00\x00\x00.",
    ],
)
def test_a_pickle_cannot_take_more_memory_than_its_own_size(path, operations):
    write_archive(path, {"data.pkl": b"\x80\x05" + operations})
    says(path, "damaged checkpoint")


@pytest.mark.parametrize("pid", [b"K\x01Q", b"(U\x07storageK\x01U\x010U\x03cpuK\x01tQ", b"P0\n"])
def test_a_storage_that_is_not_described_as_one_is_refused(path, pid):
    write_archive(path, {"data.pkl": b"\x80\x02" + pid + b"."})
    says(path, "")


def test_a_storage_cut_short_is_refused(path):
    with pytest.raises(CheckpointFormatError, match="storage 0 is cut short"):
        read_one(path, WHOLE, NUMBERS.tobytes()[:-1])


def test_a_damaged_storage_is_refused(path):
    write_checkpoint(path, {"x": WHOLE}, {"0": NUMBERS.tobytes()})
    path.write_bytes(path.read_bytes().replace(NUMBERS.tobytes(), NUMBERS[::-1].tobytes()))
    with pytest.raises(CheckpointFormatError, match=rf"{path}: damaged checkpoint \(BadZipFile: Bad CRC-32"):
        read_x(path)


def test_a_storage_that_is_not_there_is_refused(path):
    write_checkpoint(path, {"x": WHOLE._replace(storage="7")})
    with pytest.raises(CheckpointFormatError, match="archive/data/7"):
        read_x(path)


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
    with pytest.raises(CheckpointFormatError, match="reaches outside its storage"):
        read_one(path, Tensor("0", 24, offset, shape, strides), NUMBERS.tobytes())


def test_a_shape_that_is_not_made_of_integers_is_refused(path):
    with pytest.raises(CheckpointFormatError, match="not made of integers"):
        read_one(path, WHOLE._replace(shape=("24",)), NUMBERS.tobytes())


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
        parameter=torch.nn.Parameter(base.T),
        bfloat16=base.bfloat16(),
        half=base.half(),
        double=base.double(),
        int64=torch.arange(-3, 5),
        bool=base > 0,
    )
    state._metadata = {"": {"version": 1}}  # as Module.state_dict leaves it
    torch.save({"state_dict": state, "epoch": 3}, path)
    with tensor_files.opened(path) as content:
        read = {name: tensor.read() for name, tensor in content["state_dict"].items()}
    assert list(read) == list(state)
    for name, tensor in state.items():
        expected = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach()
        assert read[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(read[name].astype(expected.numpy().dtype), expected.numpy(), err_msg=name)
    assert read["bfloat16"].dtype == ml_dtypes.bfloat16
    assert [read[name].dtype for name in ("half", "double", "int64")] == [np.float16, np.float64, np.int64]


def test_objects_that_torch_saves_beside_tensors_do_not_matter(torch, path, monkeypatch):
    """What full checkpoints hold: configs, tokenizers, paths, annotations, numpy and torch objects."""
    from tokenizers import AddedToken, Tokenizer, models

    config = types.ModuleType("omegaconf")
    config.DictConfig = type("DictConfig", (dict,), {"__module__": "omegaconf"})
    monkeypatch.setitem(sys.modules, "omegaconf", config)
    others = {
        "config": config.DictConfig(lr=0.1),
        "tokenizer": [Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), AddedToken("a")],
        "path": [pathlib.PurePosixPath("/x"), datetime.datetime(2026, 1, 1), argparse.Namespace(a=1)],
        "containers": [collections.defaultdict(list, a=[1]), collections.Counter("aab"), collections.deque([1])],
        "annotations": [typing.Any, typing.Optional[int], type(None), dict],  # noqa: UP045
        "builtins": [{1}, frozenset([1]), slice(1, 2), range(3), b"\xff", bytearray(b"x"), 1j, 2**80, ..., None],
        "numpy": [np.arange(3), np.float32(1), np.dtype("f4"), np.random.default_rng(0)],
        "torch": [torch.bfloat16, torch.device("cpu"), torch.Size([1]), torch.nn.Linear(2, 2)],
        "tensors": [torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse(), torch.ones(2).char()],
    }
    torch.save({"state_dict": {"x": torch.ones(2)}, "others": others, frozenset([1]): 2}, path)
    monkeypatch.delitem(sys.modules, "omegaconf")
    with tensor_files.opened(path) as content:
        np.testing.assert_array_equal(content["state_dict"]["x"].read(), [1, 1])
        assert torch_zip.describe(content["others"]["config"]) == "omegaconf.DictConfig"
