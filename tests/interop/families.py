"""Tiny models of the Llama family, by what their config.json says, and folders of them with random weights."""

import json

import ml_dtypes
import numpy as np
import tokenizers as hf
from safetensors.numpy import save_file

from kforcing_jax.interop.config_json import described
from kforcing_jax.interop.llama_weights import weights_of

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _fields(model_type, **fields):
    return {"model_type": model_type} | _SIZES | fields


FAMILIES = {
    "llama": _fields("llama", num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=_LLAMA3),
    "llama_biases": _fields("llama", num_attention_heads=2, head_dim=10, attention_bias=True, mlp_bias=True),
    "llama_old_rope": _fields(
        "llama", rope_theta=500.0, rope_scaling={k: v for k, v in _LLAMA3.items() if k != "rope_theta"}
    ),
    "linear": _fields("llama", rope_theta=300.0, rope_scaling={"type": "linear", "factor": 2.5}),
    "yarn": _fields("llama", num_key_value_heads=1, rope_parameters=_YARN),
    "yarn_scales": _fields(
        "llama", rope_parameters=_YARN | {"mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 16.0, "truncate": False}
    ),
    "mistral": _fields("mistral", num_key_value_heads=2, sliding_window=7),
    "qwen2": _fields("qwen2", num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e6),
    "qwen2_window": _fields(
        "qwen2", num_key_value_heads=4, use_sliding_window=True, sliding_window=9, max_window_layers=0
    ),
    "qwen3": _fields("qwen3", num_key_value_heads=2, head_dim=12),
    "qwen3_biases": _fields("qwen3", num_key_value_heads=4, head_dim=6, attention_bias=True),
}


def random_tensors(fields, seed=0, dtype=np.float32):
    """Weights by their names on the hub, of a spread that every piece of the model shows."""
    found, rng = described(fields), np.random.default_rng(seed)
    tensors = {}
    for weight in weights_of(found.architecture, found.vocab_size):
        for name, shape in weight.stored(found.architecture.num_layers):
            values = (
                rng.normal(size=shape) / np.sqrt(shape[-1]) * 1.5 if len(shape) > 1 else 0.3 * rng.normal(size=shape)
            )
            tensors[name] = (values + (name.endswith("norm.weight"))).astype(dtype)
    return tensors


def write_folder(folder, fields, tensors=None, dtype=np.float32):
    """A folder with config.json and model.safetensors; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors or random_tensors(fields, dtype=dtype), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_shards(folder, tensors, count=3, index=True):
    """The same tensors over several files, with or without an index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = list(tensors)
    places = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = "The cat sat on the mat. The dog sat on the cat, and the mat was gone.\n"


def byte_level_tokenizer(vocab_size=300):
    """A small BPE tokenizer as models of the hub have it, with what chats need."""
    backend = hf.Tokenizer(hf.models.BPE())
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    return backend


def write_tokenizer(folder, vocab_size=300, **settings):
    """tokenizer.json and tokenizer_config.json; returns the backend."""
    backend = byte_level_tokenizer(vocab_size)
    backend.save(str(folder / "tokenizer.json"))
    known = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(known | {"add_bos_token": False} | settings))
    return backend


# Its embedding has more rows than the tokenizer has tokens, as those of Qwen.
TEACHER = _fields("llama", num_key_value_heads=2, tie_word_embeddings=True, vocab_size=320, rope_theta=5e3)


def write_teacher(folder, fields=TEACHER, dtype=np.float32, seed=0):
    """A whole model: weights, and a tokenizer with a chat template."""
    write_folder(folder, fields, random_tensors(fields, seed, dtype))
    write_tokenizer(folder)
    return folder
