"""Released checkpoints: read exactly, full ones too, written so that the released code loads them, or refused."""

import collections
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop.archives import Object, described, released_tensors, write_checkpoint
from interop.families import FAMILIES, write_folder

from kforcing_jax.interop import official
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM, init_params
from kforcing_jax.noise import CdfOrder

PARITY = Path(__file__).parents[1] / "parity"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.ckpt"


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason='torch is not installed (pip install -e ".[torch]")')


def assert_same_tree(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_load_reads_a_checkpoint_written_in_the_released_layout(path):
    tensors = released_tensors()
    state, storages = described(tensors)
    write_checkpoint(path, {"epoch": 3, "state_dict": state}, storages)
    model, params = official.load(path)
    expected_model, expected_params = official.from_state_dict(tensors)
    assert model == expected_model
    assert_same_tree(params, expected_params)


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_the_state_dict_may_be_the_whole_file(path, prefix):
    tensors = released_tensors(prefix=prefix)
    write_checkpoint(path, *described(tensors))
    assert_same_tree(official.load(path)[1], official.from_state_dict(tensors)[1])


@pytest.mark.parametrize(
    "content, found",
    [
        ([], "it is list"),
        ({}, "it is empty"),
        ({"state_dict": 3}, '"state_dict" is int'),
        ({"state_dict": {}}, '"state_dict" is empty'),
        ({"state_dict": {"x": 3}}, "x is int"),
        ({"state_dict": {3: 3}}, "a name is int"),
        ({"weights": {"x": 1}}, "weights is dict"),
        ({"state_dict": Object("omegaconf", "DictConfig")}, '"state_dict" is omegaconf.DictConfig'),
        ({"state_dict": {"backbone.x": Object("torch", "load")}}, "backbone.x is torch.load"),
    ],
)
def test_a_checkpoint_without_a_state_dict_is_refused_with_what_is_there(path, content, found):
    write_checkpoint(path, content)
    with pytest.raises(official.CheckpointFormatError) as refusal:
        official.load(path)
    assert str(refusal.value) == f'{path}: no "state_dict" of tensors in this checkpoint ({found})'


def write_full(path, tensors, shadows=None, **others):
    """A full training checkpoint; of its optimizer not one storage is in the file."""
    state, storages = described(tensors)
    ema, ema_storages = described(shadows or {}, first_storage=1000)
    absent = {name: tensor._replace(storage="absent") for name, tensor in state.items()}
    content = {
        "epoch": 3,
        "state_dict": state,
        "optimizer_states": [{"state": {0: absent}, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"config": Object("omegaconf.dictconfig", "DictConfig")},
        **({} if shadows is None else {"ema": {"decay": 0.9, "shadow_params": list(ema.values())}}),
        **others,
    }
    write_checkpoint(path, content, storages | ema_storages)


def test_a_full_checkpoint_is_read_and_its_optimizer_is_not(path):
    tensors = released_tensors()
    write_full(path, tensors)
    model, params = official.load(path)
    expected_model, expected_params = official.from_state_dict(tensors)
    assert model == expected_model
    assert_same_tree(params, expected_params)


OTHER_MODULES = {
    "noise.sigma": np.zeros(2, np.float32),
    "ar_teacher.backbone.vocab_embed.embedding": np.zeros((3, 3), np.float32),
    "teacher.noise_encoder.norm.weight": np.zeros(9, np.float32),
}


def test_modules_beside_the_backbone_are_not_the_model(path):
    tensors = released_tensors(student=False)
    write_full(path, OTHER_MODULES | tensors)
    for model, params in (official.load(path), official.from_state_dict(OTHER_MODULES | tensors)):
        assert isinstance(model, CausalLM)
        assert_same_tree(params, official.from_state_dict(tensors)[1])


def averages(tensors):
    """Other values for everything that is trained, as EMA lists them: in order, without the rotary buffer."""
    return {name: array + 1 for name, array in tensors.items() if not name.endswith("inv_freq")}


@pytest.mark.parametrize("student", [False, True])
def test_averaged_weights_take_the_place_of_the_last_ones(path, student):
    tensors = released_tensors(student=student)
    write_full(path, OTHER_MODULES | tensors, averages(tensors))
    assert_same_tree(official.load(path)[1], official.from_state_dict(tensors)[1])
    expected = official.from_state_dict(tensors | averages(tensors))
    assert_same_tree(official.load(path, weights="ema")[1], expected[1])


def test_averages_that_are_not_there_or_do_not_fit_are_refused(path):
    tensors = released_tensors()
    shadows = list(averages(tensors).values())

    def refused(says, **content):
        write_full(path, tensors, **content)
        with pytest.raises(official.CheckpointFormatError, match=rf"{path}: {says}"):
            official.load(path, weights="ema")

    def numbered(arrays):
        return dict(enumerate(arrays))

    refused(r'no averaged weights \("ema"\) in this checkpoint')
    refused("no averaged weights", ema={"decay": 0.9})
    refused("no averaged weights", ema=Object("torch", "Tensor"))
    refused("ema has 27 weights, the model 28", shadows=numbered(shadows[1:]))
    refused("ema has 29 weights, the model 28", shadows=numbered([*shadows, shadows[0]]))
    wrong = numbered([*shadows[:3], shadows[3].T[:2], *shadows[4:]])
    refused(r"ema has shape \(2, 4\) for backbone.blocks.0.attn_out.weight, expected \(4, 4\)", shadows=wrong)
    objects = {"decay": 0.9, "shadow_params": [Object("torch", "Size")] * 28}
    refused("ema has torch.Size for backbone.vocab_embed.embedding", ema=objects)


def test_weights_of_another_kind_are_not_a_choice(path):
    write_full(path, released_tensors())
    with pytest.raises(ValueError, match="weights = 'best' is not one of state_dict, ema"):
        official.load(path, weights="best")


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


def test_a_missing_tensor_is_named():
    whole = released_tensors(layers=1, prefix="")
    for name in whole:
        with pytest.raises(official.CheckpointFormatError, match=f"tensor {name} is missing"):
            official.from_state_dict({other: array for other, array in whole.items() if other != name})


def test_a_tensor_with_an_axis_too_many_is_named():
    whole = released_tensors(layers=1, prefix="")
    for name, array in whole.items():
        with pytest.raises(official.CheckpointFormatError, match=rf"tensor {name} has shape \(1, "):
            official.from_state_dict(whole | {name: array[None]})


WRAPPED = {
    "DataParallel": "module.backbone.",
    "torch.compile": "_orig_mod.backbone.",
    "both": "_orig_mod.module.backbone.",
    "within": "backbone._orig_mod.",
    "Lightning": "model.",
}


@pytest.mark.parametrize("prefix", WRAPPED.values(), ids=WRAPPED)
def test_what_wrappers_add_to_names_is_known(path, prefix):
    expected_model, expected = official.from_state_dict(released_tensors())
    tensors = released_tensors(prefix=prefix)
    write_full(path, OTHER_MODULES | tensors if "backbone" in prefix else tensors, averages(tensors))
    model, params = official.load(path)
    assert model == expected_model
    assert_same_tree(params, expected)
    tensors |= averages(tensors)
    assert_same_tree(official.load(path, weights="ema")[1], official.from_state_dict(tensors)[1])


def test_each_block_may_be_wrapped():
    tensors = released_tensors()
    wrapped = {re.sub(r"(blocks\.\d+)", r"\1._orig_mod", name): array for name, array in tensors.items()}
    assert wrapped.keys() != tensors.keys()
    assert_same_tree(official.from_state_dict(wrapped)[1], official.from_state_dict(tensors)[1])


def test_names_of_something_else_are_shown():
    tensors = {f"net.{name}": array for name, array in released_tensors().items()}
    with pytest.raises(official.CheckpointFormatError, match=r"missing; of 29 the first are net\.backbone\.vocab_"):
        official.from_state_dict(tensors)


def test_a_file_of_a_model_folder_is_told_so(tmp_path):
    folder = write_folder(tmp_path, FAMILIES["llama"])
    with pytest.raises(official.CheckpointFormatError, match=r"missing; .*; for a model of the Llama family, name its"):
        official.load(folder / "model.safetensors")


def test_two_tensors_of_one_name_are_refused():
    tensors = released_tensors()
    twice = {"module." + name: array for name, array in tensors.items()} | tensors
    with pytest.raises(official.CheckpointFormatError, match=r"two tensors are called backbone\.vocab_embed"):
        official.from_state_dict(twice)


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


@pytest.mark.parametrize("name", ["blocks.x.norm1.weight", "blocks.", "blocks.01.norm1.weight"])
def test_a_block_without_a_proper_number_is_refused(name):
    with pytest.raises(official.CheckpointFormatError, match="blocks are numbered"):
        official.from_state_dict(released_tensors() | {"backbone." + name: np.zeros(4, np.float32)})


def test_a_model_without_width_is_refused():
    tensors = released_tensors() | {"backbone.vocab_embed.embedding": np.zeros((7, 0), np.float32)}
    with pytest.raises(official.CheckpointFormatError, match="head"):
        official.from_state_dict(tensors)


def recorded(name):
    """Weights of the released modules, recorded from their own code, in its order."""
    return dict(np.load(PARITY / f"weights_{name}.npz"))


RECORDED = ["ar", "pflm1", "pflm2", "pflm4"]


@pytest.mark.parametrize("name", RECORDED)
def test_to_state_dict_gives_back_what_from_state_dict_took(name):
    tensors = recorded(name)
    state = official.to_state_dict(*official.from_state_dict(tensors))
    assert list(state) == list(tensors)
    for key, array in tensors.items():
        assert state[key].dtype == np.float32
        np.testing.assert_array_equal(state[key], array, err_msg=key)


@functools.cache
def our_model(kind, mask_id=96):
    model = kind(ModelConfig(vocab_size=97, mask_id=mask_id, num_layers=3, d_model=24, num_heads=2))
    return model, jax.jit(init_params, static_argnums=0)(model, jax.random.key(1))


FORMATS = ["ckpt", "pt", "safetensors"]


@pytest.fixture(params=FORMATS)
def output(request, tmp_path):
    if request.param != "safetensors":
        request.getfixturevalue("torch")
    return tmp_path / f"saved.{request.param}"


NOTE = dict(
    mask_id=3,
    eos_id=5,
    vocabulary="abc",
    seq_len=64,
    prefix_length=6,
    window=2,
    tau_min=0.5,
    tau_max=1.0,
    top_p=0.9,
)


# Gated students are in no such file, see test_model_folders.
OF_ADAPTERS = {"adapter_rank", "weights_dtype", "base", "base_digest"}


@pytest.mark.parametrize("kind", [CausalLM, PushForwardLM])
def test_what_is_saved_loads_as_the_same_model_with_what_was_said_of_it(output, kind):
    model, params = our_model(kind, mask_id=3)
    official.save(output, model, params, **NOTE)
    assert official.read_note(output) == NOTE
    assert NOTE.keys() | {"cdf_order"} == official.NOTES.keys() - OF_ADAPTERS
    loaded_model, loaded = official.load(output)
    assert loaded_model == model
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert_same_tree(loaded, params)
    assert official.load(output, mask_id=5)[0].cfg.mask_id == 5
    assert list(output.parent.iterdir()) == [output]


def test_files_are_in_vocabulary_order_and_the_order_of_a_model_beside_them(tmp_path):
    """So that other code reads them; every column finds its token again."""
    model, params = our_model(PushForwardLM)
    order = CdfOrder.shuffled(97, seed=1)
    shuffled = official.in_order(model, params, order)
    kernel, moved = (each["backbone"]["output"]["kernel"] for each in (params, shuffled[1]))
    np.testing.assert_array_equal(moved, kernel[:, order.tokens_V])
    for name, array in official.to_state_dict(model, params).items():
        np.testing.assert_array_equal(official.to_state_dict(*shuffled)[name], array)
    official.save(tmp_path / "x.safetensors", *shuffled)
    loaded_model, loaded = official.load(tmp_path / "x.safetensors")
    assert loaded_model.cfg.cdf_order == order
    assert_same_tree(loaded, shuffled[1])


def test_an_order_of_another_vocabulary_is_refused(path):
    state, storages = described(released_tensors())
    write_checkpoint(path, {"state_dict": state, "kforcing_jax": {"cdf_order": [1, 0]}}, storages)
    with pytest.raises(official.CheckpointFormatError, match="cdf_order has 2 ids, its vocabulary 7"):
        official.load(path)


@pytest.mark.parametrize(
    ("name", "value"), [("window", "2"), ("tau_min", 0.0), ("top_p", 1.5), ("seq_len", -1), ("size", 3)]
)
def test_a_note_that_is_not_what_it_should_be_is_neither_written_nor_believed(path, name, value):
    model, params = our_model(CausalLM)
    with pytest.raises(ValueError, match=name):
        official.save(path.with_suffix(".safetensors"), model, params, **{name: value})
    assert not list(path.parent.iterdir())
    state, storages = described(released_tensors())
    write_checkpoint(path, {"state_dict": state, "kforcing_jax": {name: str(value)}}, storages)
    for read in (official.load, official.read_note):
        with pytest.raises(official.CheckpointFormatError, match=f"^{path}: .*{name}"):
            read(path)


def test_files_of_others_say_nothing(path):
    write_checkpoint(path, *described(released_tensors()))
    assert official.read_note(path) == {}


def test_half_precision_holds_the_frequencies_of_the_released_head_width(torch, path):
    model = CausalLM(ModelConfig(vocab_size=97, mask_id=96, num_layers=1, d_model=128, num_heads=2))
    params = init_params(model, jax.random.key(1))
    state = {name: torch.from_numpy(array) for name, array in official.to_state_dict(model, params).items()}
    for dtype in (torch.bfloat16, torch.float16):
        torch.save({"state_dict": {name: tensor.to(dtype) for name, tensor in state.items()}}, path)
        assert official.load(path)[0] == model


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    model, params = our_model(CausalLM)
    params = jax.tree.map(lambda leaf: leaf, params)  # a copy to change
    params["backbone"]["embedding"]["embedding"] = params["backbone"]["embedding"]["embedding"].at[0, 0].set(value)
    with pytest.raises(official.CheckpointFormatError, match=r"vocab_embed\.embedding holds values that are not"):
        official.from_state_dict(official.to_state_dict(model, params))


@pytest.mark.parametrize("name", RECORDED)
def test_torch_reads_what_is_saved_bit_for_bit(torch, path, name):
    """A released file, read here and written again, is for torch the file that it was."""
    tensors = recorded(name)
    released = path.with_name("released.ckpt")
    torch.save({"state_dict": {key: torch.from_numpy(array) for key, array in tensors.items()}}, released)
    official.save(path, *official.load(released))
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(tensors)
    for key, array in tensors.items():
        tensor = checkpoint["state_dict"][key]
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        np.testing.assert_array_equal(tensor.numpy(), array, err_msg=key)


@pytest.mark.parametrize("head_width", [2, 16, 32, 64, 128])
def test_rotary_frequencies_are_those_that_torch_computes(torch, head_width):
    model = CausalLM(ModelConfig(vocab_size=5, mask_id=4, num_layers=1, d_model=head_width, num_heads=1))
    state = official.to_state_dict(model, init_params(model, jax.random.key(0)))
    expected = 1.0 / (10000 ** (torch.arange(0, head_width, 2).float() / head_width))
    np.testing.assert_array_equal(state["backbone.rotary_emb.inv_freq"], expected.numpy())


def released_module(torch, vocab, d, heads, layers, student):
    """The tensors that the released modules register, by their names; what they compute is no matter here."""
    nn = torch.nn

    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Parameter(torch.empty(vocab, d))

    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("inv_freq", torch.empty(d // heads // 2))

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(d))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1 = Norm()
            self.attn_qkv, self.attn_out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
            self.norm2 = Norm()
            self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))

    class NoiseEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.combined_proj, self.norm = nn.Linear(2 * d, d), nn.LayerNorm(d)
            self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_final, self.linear = Norm(), nn.Linear(d, vocab)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.vocab_embed, self.rotary_emb = Embedding(), Rotary()
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            if student:
                self.noise_encoder = NoiseEncoder()
            self.output_layer = Output()

    return Model()


@pytest.mark.parametrize("kind", [CausalLM, PushForwardLM])
def test_the_released_modules_load_what_is_saved(torch, path, kind):
    """By the steps of the released loader: torch.load, "state_dict", the prefix off, a strict load_state_dict."""
    model, params = our_model(kind)
    official.save(path, model, params)
    checkpoint = torch.load(path, map_location="cpu")
    state = {name.replace("backbone.", ""): v for name, v in checkpoint.get("state_dict", checkpoint).items()}
    module = released_module(torch, vocab=97, d=24, heads=2, layers=3, student=kind is PushForwardLM)
    module.load_state_dict(state, strict=True)
    assert list(module.state_dict()) == list(state)
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), official.to_state_dict(model, params)["backbone." + name])


def test_load_reads_what_torch_saves_of_a_module_in_training(torch, path):
    """Module.state_dict with its metadata, Parameters, an optimizer that has stepped, and averages of the weights."""
    module = released_module(torch, vocab=7, d=4, heads=1, layers=2, student=True)
    module.load_state_dict({name: torch.from_numpy(a) for name, a in released_tensors(prefix="").items()})
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    sum(weight.sum() for weight in module.parameters()).backward()
    optimizer.step()
    state = collections.OrderedDict(("backbone." + name, tensor) for name, tensor in module.state_dict().items())
    shadows = [torch.nn.Parameter(weight.detach() + 1) for weight in module.parameters()]
    ema = {"decay": 0.9, "num_updates": 1, "shadow_params": shadows}
    torch.save({"state_dict": state, "optimizer_states": [optimizer.state_dict()], "ema": ema}, path)

    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    assert_same_tree(official.load(path)[1], official.from_state_dict(arrays)[1])
    averaged = official.from_state_dict(arrays | averages(arrays))
    assert_same_tree(official.load(path, weights="ema")[1], averaged[1])


def test_load_reads_a_transposed_tensor_that_torch_saves(torch, path):
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
