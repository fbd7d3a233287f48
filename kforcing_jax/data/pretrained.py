"""Pre-trained vocabularies, by name or from local files.

A name is looked for in the folder `kforcing_jax/tokenizers` of the user's cache, then on the Hugging Face hub (and in
its cache). A path is a folder or a file, in any of the forms in which BERT's and GPT-2's vocabularies go around.
"""

import contextlib
import hashlib
import json
import logging
import urllib.error
import urllib.request
from pathlib import Path

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.implementations import BertWordPieceTokenizer

from kforcing_jax.config import DataConfig
from kforcing_jax.data.choices import KNOWN_TOKENIZERS
from kforcing_jax.data.model_tokenizers import has_model, load_model_tokenizer, model_files
from kforcing_jax.data.places import cache_folder, expanded
from kforcing_jax.data.tokenizers import SPECIAL_NAMES, Tokenizer, with_mask
from kforcing_jax.errors import DataError

# A letter that few vocabularies have.
_RARE = "\ua66e"
# What a folder may hold, best first.
_LAYOUTS = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_SETTINGS = "tokenizer_config.json"
_SECONDS_TO_REACH_THE_HUB = 10
_log = logging.getLogger("kforcing_jax")


def load_pretrained(name: str) -> Tokenizer:
    """The tokenizer called `name`, or read from the path `name`, with a mask as its last id unless it has one.

    That of a model of the Llama family, in its folder or GGUF file, is as the model has it: without a mask.

    Raises:
      DataError: not found, and there is no network; not a tokenizer; or another vocabulary than the name says.
    """
    path, known = expanded(name), _short(name)
    # A folder that happens to be called like a known vocabulary is not meant.
    if has_model(name) and known not in KNOWN_TOKENIZERS:
        return load_model_tokenizer(name)
    if path.exists() and known not in KNOWN_TOKENIZERS:
        return _with_mask(path, _without_settings(_read(path)))
    if name.startswith((".", "/", "~")):
        raise DataError(f"tokenizer {name!r}: no such file or folder")
    kept = _kept(known)
    backend = _without_settings(_read(kept if kept.exists() else _from_hub(name, known)))
    if known in KNOWN_TOKENIZERS and digest(backend) != KNOWN_TOKENIZERS[known].digest:
        raise DataError(f"tokenizer {name!r} as found in {kept} or the hub's cache is another vocabulary; replace it")
    return _with_mask(name, backend)


def local_files(name: str) -> list[str]:
    """The files of a tokenizer that is given by its path; none of one that has a name.

    Raises:
      DataError: a folder holds no tokenizer.
    """
    path = expanded(name)
    if has_model(name) and _short(name) not in KNOWN_TOKENIZERS:
        return list(map(str, model_files(name)))
    if _short(name) in KNOWN_TOKENIZERS or not path.exists():
        return []
    files = [path] if path.is_file() else _files_of(path)
    return [str(file) for file in (*files, files[0].with_name(_SETTINGS)) if file.is_file()]


def load_configured(config: DataConfig) -> Tokenizer:
    """The pre-trained tokenizer of a config. Raises DataError also when `data.vocab_size` is not its size."""
    tokenizer = load_pretrained(config.tokenizer)
    if tokenizer.eos_id is None:
        raise DataError(
            f"data.tokenizer = {config.tokenizer!r} has no token that ends a document: <eos>, </s>, [SEP], "
            "<|endoftext|>, <|end_of_text|> or [EOS]"
        )
    if tokenizer.vocab_size != config.vocab_size:
        raise DataError(
            f"data.tokenizer = {config.tokenizer!r} has {tokenizer.vocab_size} ids (mask included), data.vocab_size = "
            f"{config.vocab_size}; set data.vocab_size to {tokenizer.vocab_size}, or give the tokenizer that is meant"
        )
    with contextlib.suppress(DataError):  # said when the text has any such thing
        if not tokenizer.encode(_RARE):
            _log.warning(
                "data.tokenizer = %r leaves out what is outside its vocabulary without a trace: no token is for that",
                config.tokenizer,
            )
    return tokenizer


def is_vocabulary_of(name: str, backend: hf.Tokenizer) -> bool:
    """Whether that name or path stands for the vocabulary of `backend`, as far as this machine can tell by itself."""
    if _short(name) in KNOWN_TOKENIZERS:
        return digest(backend) == KNOWN_TOKENIZERS[_short(name)].digest
    return (expanded(name).exists() or has_model(name)) and digest(load_pretrained(name).backend) == digest(backend)


def digest(backend: hf.Tokenizer) -> str:
    """SHA-256 of the tokens in the order of their ids, our mask left out."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = sorted((token for token in vocabulary if token != "<mask>"), key=vocabulary.__getitem__)
    return hashlib.sha256("\n".join(tokens).encode()).hexdigest()


def _short(name):
    return name.removeprefix("google-bert/").removeprefix("openai-community/")


def _kept(name) -> Path:
    return cache_folder("tokenizers") / name


def _with_mask(name, backend):
    try:
        return with_mask(backend)
    except DataError as error:
        raise DataError(f"tokenizer {str(name)!r}: {error}") from None


def _read(path: Path) -> hf.Tokenizer:
    """The tokenizer of a file, or of the best that a folder has."""
    files = [path] if path.is_file() else _files_of(path)
    try:
        if files[0].suffix == ".txt":
            return _word_pieces(files[0])
        if len(files) == 2:
            return _byte_level(*files)
        return _from_json(files[0])
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception for whatever it does not like
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{files[0]} is not a tokenizer ({reason}); expected tokenizer.json or vocab.txt") from None


def _from_json(file: Path) -> hf.Tokenizer:
    content = file.read_text(encoding="utf-8")
    backend = hf.Tokenizer.from_str(content)
    # The library numbers added tokens itself, where their ids do not follow those of the model.
    for token in json.loads(content).get("added_tokens") or []:
        found = backend.token_to_id(token["content"])
        if found != token["id"]:
            raise DataError(
                f"{file}: {token['content']} has id {token['id']} and would be read as {found}, because the ids have "
                "gaps or are there twice; number its tokens anew"
            )
    return backend


def _files_of(folder):
    for names in _LAYOUTS:
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            return files
    wanted = ", ".join(" and ".join(names) for names in _LAYOUTS)
    raise DataError(f"the folder {folder} holds no tokenizer; it should hold one of: {wanted}")


def _settings(file: Path) -> dict:
    """What the tokenizer_config.json beside a vocabulary says."""
    path = file.with_name(_SETTINGS)
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return dict(settings)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a JSON object ({error}); mend it or take it away") from None


def _word_pieces(vocabulary: Path) -> hf.Tokenizer:
    """BERT's tokenizer from its vocabulary; lower case unless that has capitals, or the settings say otherwise."""
    settings = _settings(vocabulary)
    words = [word for word in vocabulary.read_text(encoding="utf-8").split("\n") if not word.startswith("[")]
    lowercase = settings.get("do_lower_case")
    return BertWordPieceTokenizer(
        str(vocabulary),
        lowercase=all(word == word.lower() for word in words) if lowercase is None else lowercase,
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )._tokenizer


def _byte_level(vocabulary: Path, merges: Path) -> hf.Tokenizer:
    """GPT-2's tokenizer from its two files, the second with or without a line for its version."""
    tokens = json.loads(vocabulary.read_text(encoding="utf-8"))
    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    backend = hf.Tokenizer(models.BPE(tokens, pairs))  # type: ignore[arg-type]  # it says itself which are no pairs
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=_settings(vocabulary).get("add_prefix_space", False)
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([name for name in SPECIAL_NAMES if name in tokens])
    return backend


def _without_settings(backend):
    """Files may carry padding and truncation, to the length that somebody else wanted."""
    backend.no_padding()
    backend.no_truncation()
    return backend


def _from_hub(name, known) -> Path:
    import huggingface_hub

    repository = KNOWN_TOKENIZERS[known].repository if known in KNOWN_TOKENIZERS else name
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
            f"tokenizer.json, or vocab.txt for BERT, into {_kept(known)}, or give the path of a folder with it"
        ) from None


def _reach(endpoint):
    with contextlib.suppress(urllib.error.HTTPError):  # it answered
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_SECONDS_TO_REACH_THE_HUB)
