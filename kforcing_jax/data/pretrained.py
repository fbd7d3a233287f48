"""Pre-trained vocabularies, by name or from local files.

A name is looked for in the folder `kforcing_jax/tokenizers` of the user's cache, then on the Hugging Face hub (and in
its cache). A path is a folder or a file, in any of the forms in which BERT's and GPT-2's vocabularies go around.
"""

import contextlib
import hashlib
import json
import logging
import os
import urllib.error
import urllib.request
from pathlib import Path

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.implementations import BertWordPieceTokenizer

from kforcing_jax.config import DataConfig
from kforcing_jax.data.tokenizers import Tokenizer, with_mask
from kforcing_jax.errors import DataError

_REPOSITORIES = {"bert-base-uncased": "google-bert/bert-base-uncased", "gpt2": "openai-community/gpt2"}
# Of a vocabulary's tokens in the order of their ids: another file under the same name is noticed.
_DIGESTS = {
    "bert-base-uncased": "0f052197aac305fe42f378b5c61554b7bacb34b8be4af83fec2cfdcdffbc9973",
    "gpt2": "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f",
}
# What a folder may hold, best first.
_LAYOUTS = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_SECONDS_TO_REACH_THE_HUB = 10


def load_pretrained(name: str) -> Tokenizer:
    """The tokenizer called `name`, or read from the path `name`, with a mask as its last id unless it has one.

    Raises:
      DataError: not found, and there is no network; not a tokenizer; or another vocabulary than the name says.
    """
    path, known = Path(name).expanduser(), _short(name)
    # A folder that happens to be called like a known vocabulary is not meant.
    if path.exists() and known not in _DIGESTS:
        return with_mask(_without_settings(_read(path)))
    if name.startswith((".", "/", "~")):
        raise DataError(f"tokenizer {name!r}: no such file or folder")
    kept = _cache_folder(known)
    backend = _without_settings(_read(kept if kept.exists() else _from_hub(name, known)))
    if known in _DIGESTS and digest(backend) != _DIGESTS[known]:
        raise DataError(f"tokenizer {name!r} as found in {kept} or the hub's cache is another vocabulary; replace it")
    return with_mask(backend)


def load_configured(config: DataConfig) -> Tokenizer:
    """The pre-trained tokenizer of a config. Raises DataError also when `data.vocab_size` is not its size."""
    tokenizer = load_pretrained(config.tokenizer)
    if tokenizer.eos_id is None:
        raise DataError(
            f"data.tokenizer = {config.tokenizer!r} has no token that ends a document ([SEP], <|endoftext|> or </s>)"
        )
    if tokenizer.vocab_size != config.vocab_size:
        raise DataError(
            f"data.tokenizer = {config.tokenizer!r} has {tokenizer.vocab_size} ids (mask included), data.vocab_size = "
            f"{config.vocab_size}; set data.vocab_size to {tokenizer.vocab_size}, or give the tokenizer that is meant"
        )
    return tokenizer


def is_vocabulary_of(name: str, backend: hf.Tokenizer) -> bool:
    """Whether that name or path stands for the vocabulary of `backend`, as far as this machine can tell by itself."""
    if _short(name) in _DIGESTS:
        return digest(backend) == _DIGESTS[_short(name)]
    return Path(name).expanduser().exists() and digest(load_pretrained(name).backend) == digest(backend)


def digest(backend: hf.Tokenizer) -> str:
    """SHA-256 of the tokens in the order of their ids, our mask left out."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = sorted((token for token in vocabulary if token != "<mask>"), key=vocabulary.get)
    return hashlib.sha256("\n".join(tokens).encode()).hexdigest()


def _short(name):
    return name.removeprefix("google-bert/").removeprefix("openai-community/")


def _cache_folder(name) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "kforcing_jax" / "tokenizers" / name


def _read(path: Path) -> hf.Tokenizer:
    """The tokenizer of a file, or of the best that a folder has."""
    files = [path] if path.is_file() else _files_of(path)
    try:
        if files[0].suffix == ".txt":
            return BertWordPieceTokenizer(str(files[0]), lowercase=True)._tokenizer
        if len(files) == 2:
            return _byte_level(*files)
        return hf.Tokenizer.from_str(files[0].read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for whatever it does not like
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{files[0]} is not a tokenizer ({reason}); expected tokenizer.json or vocab.txt") from None


def _files_of(folder):
    for names in _LAYOUTS:
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            return files
    wanted = ", ".join(" and ".join(names) for names in _LAYOUTS)
    raise DataError(f"the folder {folder} holds no tokenizer; it should hold one of: {wanted}")


def _byte_level(vocabulary: Path, merges: Path) -> hf.Tokenizer:
    """GPT-2's tokenizer from its two files."""
    pairs = [tuple(line.split()) for line in merges.read_text(encoding="utf-8").split("\n")[1:] if line.strip()]
    backend = hf.Tokenizer(models.BPE(json.loads(vocabulary.read_text(encoding="utf-8")), pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def _without_settings(backend):
    """Files may carry padding and truncation, to the length that somebody else wanted."""
    backend.no_padding()
    backend.no_truncation()
    return backend


def _from_hub(name, known) -> Path:
    import huggingface_hub

    repository = _REPOSITORIES.get(known, name)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return Path(huggingface_hub.hf_hub_download(repository, "tokenizer.json", local_files_only=True))
    except Exception as error:
        missing = error  # not in the hub's cache
    try:
        # The library tries for half a minute where there is no network.
        _reach(huggingface_hub.constants.ENDPOINT)
        return Path(huggingface_hub.hf_hub_download(repository, "tokenizer.json"))
    except Exception as error:  # of the network, the hub, or a name that it does not accept
        reason = " ".join(str(error).split())[:150] or " ".join(str(missing).split())[:150]
        raise DataError(
            f"tokenizer {name!r} is neither a local path nor to be had from the hub ({reason}); copy its "
            f"tokenizer.json, or vocab.txt for BERT, into {_cache_folder(known)}, or give the path of a folder with it"
        ) from None


def _reach(endpoint):
    with contextlib.suppress(urllib.error.HTTPError):  # it answered
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_SECONDS_TO_REACH_THE_HUB)
