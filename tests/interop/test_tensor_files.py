"""Files of torch and of safetensors by one pair of functions: recognised by content, written whole or not at all."""

import resource
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kforcing_jax.errors import ConfigError, RunError
from kforcing_jax.interop import tensor_files
from kforcing_jax.interop.torch_zip import CheckpointFormatError

NUMBERS = np.arange(24, dtype=np.float32).reshape(4, 6)
NOTE = {"seq_len": 64, "tau_min": 0.5}
ARRAYS = {
    "matrix": NUMBERS,
    "transposed": NUMBERS.T,
    "four_axes": NUMBERS.reshape(2, 2, 3, 2),
    "of_jax": jnp.asarray(NUMBERS),
    "empty": np.zeros((0, 3), np.float32),
    "half": NUMBERS.astype(np.float16),
}


@pytest.fixture(params=[".ckpt", ".safetensors"])
def path(request, tmp_path):
    if request.param == ".ckpt":
        pytest.importorskip("torch", reason='torch is not installed (pip install -e ".[torch]")')
    return tmp_path / f"model{request.param}"


def test_what_is_written_is_read_again_whatever_it_is_called(path):
    tensor_files.write(path, ARRAYS, NOTE)
    with tensor_files.opened(path.rename(path.with_name("renamed"))) as content:
        assert content["kforcing_jax"] == NOTE
        assert list(content["state_dict"]) == sorted(ARRAYS) or list(content["state_dict"]) == list(ARRAYS)
        for name, array in ARRAYS.items():
            stored = content["state_dict"][name]
            assert stored.shape == array.shape and stored.read().dtype == array.dtype
            np.testing.assert_array_equal(stored.read(), array)


def test_bfloat16_of_safetensors_is_read(tmp_path):
    from safetensors.numpy import save_file

    array = np.array([1, 1.5, 3], ml_dtypes.bfloat16)
    save_file({"x": array}, tmp_path / "x.safetensors")
    with tensor_files.opened(tmp_path / "x.safetensors") as content:
        np.testing.assert_array_equal(content["state_dict"]["x"].read(), array)
        assert content["kforcing_jax"] == {}


def test_a_path_may_begin_in_the_home_folder(path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    tensor_files.write(f"~/{path.name}", ARRAYS, NOTE)
    with tensor_files.opened(f"~/{path.name}") as content:
        assert content["kforcing_jax"] == NOTE
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_damaged_file_is_refused_in_one_line(path):
    tensor_files.write(path, ARRAYS, NOTE)
    whole = path.read_bytes()
    for length in (0, 5, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointFormatError) as refusal, tensor_files.opened(path):
            pass
        assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)


def test_an_ending_that_says_no_format_is_refused(tmp_path):
    for name in ("model", "model.npz", "model.safetensors.tmp"):
        with pytest.raises(ConfigError, match=r"should end in one of \.ckpt, \.pt, \.safetensors"):
            tensor_files.write(tmp_path / name, ARRAYS, NOTE)
    assert not list(tmp_path.iterdir())


def test_without_torch_its_files_are_refused_with_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"pip install 'kforcing-jax\[torch\]', or name a \.safetensors"):
        tensor_files.write(tmp_path / "model.ckpt", ARRAYS, NOTE)
    tensor_files.write(tmp_path / "model.safetensors", ARRAYS, NOTE)


def test_a_file_that_cannot_be_written_leaves_what_was_there(path):
    path.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(RunError, match=rf"^{path} cannot be written: .*File too large") as refusal:
            tensor_files.write(path, {"x": np.zeros(100_000)}, NOTE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(refusal.value)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == b"before"
    with pytest.raises(RunError, match=r"cannot be written: .*No such file or directory"):
        tensor_files.write(path.parent / "missing" / path.name, ARRAYS, NOTE)
