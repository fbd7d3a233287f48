"""The tokenizer that comes along with a model, in its folder or GGUF file: with the model's ids, and without a mask."""

import contextlib
from pathlib import Path

import tokenizers as hf

from kforcing_jax.data.beside_tokenizers import TEMPLATE, read_object, read_text, template_in, token_in
from kforcing_jax.data.gguf_files import is_gguf, read_gguf
from kforcing_jax.data.gguf_tokenizers import gguf_tokenizer
from kforcing_jax.data.models import is_known, located
from kforcing_jax.data.places import expanded
from kforcing_jax.data.tokenizers import OURS, SETTINGS, SPECIAL, ModelTokens, Tokenizer
from kforcing_jax.errors import DataError

# Values of `model_type` in the config.json of models that are read here.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"


def has_model(path: str | Path) -> bool:
    """Whether a path is the folder, or the GGUF file, of a model of the Llama family."""
    if is_known(path):
        return True
    file = expanded(path)
    with contextlib.suppress(DataError):
        return is_gguf(file) or (file.is_dir() and read_object(file / _CONFIG).get("model_type") in MODEL_TYPES)
    return False


def load_model_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in the folder or GGUF file of a model.

    Raises:
      DataError: there is none, or it cannot be read; or it has more ids than the model.
    """
    file = located(path)
    try:
        tokenizer = _of_gguf(file) if is_gguf(file) else _of_folder(file)
    except DataError as error:
        said = str(error)
        raise DataError(said if said.startswith(str(file)) else f"{path}: {said}") from None
    largest = max(tokenizer.backend.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= tokenizer.vocab_size:
        raise DataError(
            f"{path}: the tokenizer has ids up to {largest}, its model {tokenizer.vocab_size} ids; take the tokenizer "
            "that the model was trained with"
        )
    return tokenizer


def model_files(path: str | Path) -> list[Path]:
    """Of the tokenizer of a model, those that are there."""
    file = located(path)
    names = (_TOKENIZER, SETTINGS, TEMPLATE, _CONFIG)
    return [file] if file.is_file() else [file / name for name in names if (file / name).is_file()]


def chat_template(path: str | Path) -> str | None:
    """How messages become the text of a model (Jinja), from its folder or GGUF file; None where it has no template.

    Raises:
      DataError: it cannot be read.
    """
    file = located(path)
    if is_gguf(file):
        return read_gguf(file).values.get("tokenizer.chat_template")
    return template_in(file)


def _of_gguf(file) -> Tokenizer:
    content = read_gguf(file)
    embedding = content.tensors.get("token_embd.weight")
    if embedding is None:
        raise DataError("no tensor token_embd.weight, whose rows are the ids")
    return Tokenizer(*gguf_tokenizer(content.values, embedding.shape[0]))


def _of_folder(folder) -> Tokenizer:
    if not (folder / _TOKENIZER).is_file():
        others = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()]
        hint = f"; {others[0]} alone is not read: save the fast tokenizer of transformers there" if others else ""
        raise DataError(f"the folder has no {_TOKENIZER}{hint}")
    text = read_text(folder / _TOKENIZER)
    try:
        backend = hf.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{folder / _TOKENIZER} is not a tokenizer ({' '.join(str(error).split())[:200]})") from None
    backend.no_padding()
    backend.no_truncation()
    return Tokenizer(backend, _said(folder, backend))


def _said(folder, backend) -> ModelTokens:
    config, settings = read_object(folder / _CONFIG), read_object(folder / SETTINGS)
    if OURS in settings:
        try:
            return ModelTokens.of_settings(settings)
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / SETTINGS} is damaged: {OURS} has no {error}") from None
    tokens = {name: token_in(settings, name, folder) for name in SPECIAL}
    for name in ("bos_token", "eos_token"):
        tokens[name] = tokens[name] or _token_of(backend, config.get(f"{name}_id"))
    adds_bos, before = settings.get("add_bos_token"), _put_before(backend)
    if adds_bos is None:  # what is put around a text says it, and which token that is
        adds_bos = before not in (None, tokens["eos_token"])
        tokens["bos_token"] = before if adds_bos else tokens["bos_token"]
    known = {name: token for name, token in tokens.items() if token and backend.token_to_id(token) is not None}
    vocab_size = config.get("vocab_size")
    if type(vocab_size) is not int or vocab_size < 1:
        raise DataError(f"{folder / _CONFIG} says vocab_size = {vocab_size!r}, expected the ids of the model")
    return ModelTokens(vocab_size, tuple(known.items()), bool(adds_bos), chat_template(folder))


def _token_of(backend, ids) -> str | None:
    """Some models have several ends; the first is the usual one."""
    first = ids[0] if isinstance(ids, list) and ids else ids
    return backend.id_to_token(first) if type(first) is int and first >= 0 else None


def _put_before(backend) -> str | None:
    """What the tokenizer puts before every text, where that is a token of its own."""
    first = backend.encode("").ids[:1]
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    return backend.id_to_token(first[0]) if special.issuperset(first) and first else None
