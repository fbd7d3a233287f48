"""The tokenizer that a GGUF file carries, rebuilt: byte-level BPE, and the BPE of SentencePiece."""

from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers

from kforcing_jax.data.tokenizers import ModelTokens
from kforcing_jax.errors import DataError

_PREFIX = "tokenizer.ggml."
# Kinds of tokens: text never becomes control tokens; user-defined ones are found in a text before all else.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "▁"

# How text is cut before its parts are merged, of vocabularies by the names that llama.cpp has for them.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2, _DIGITS, _LLAMA3, _QWEN2 = "gpt-2", "digits", "llama-bpe", "qwen2"
_CUTS = {
    **dict.fromkeys(("default", "gpt-2", "olmo", "phi-2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
}


def gguf_tokenizer(values: Mapping[str, Any], vocab_size: int) -> tuple[hf.Tokenizer, ModelTokens]:
    """(tokenizer, what is said of it) from what a file says, for a model of so many ids.

    Raises:
      DataError: the file has no tokenizer, or one of a kind that is not known here.
    """
    said = {name.removeprefix(_PREFIX): value for name, value in values.items() if name.startswith(_PREFIX)}
    kind, tokens = said.get("model"), said.get("tokens")
    if kind not in _BACKENDS or not tokens:
        known = ", ".join(_BACKENDS)
        raise DataError(f"{_PREFIX}model = {kind!r} is not a tokenizer that is read; it should be one of {known}")
    backend, adds_bos = _BACKENDS[kind](said, tokens)
    _add_special(backend, tokens, said.get("token_type") or [])
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {f"{ours}_token": said.get(f"{theirs}_token_id") for theirs, ours in names.items()}
    meant = tuple((name, tokens[i]) for name, i in ids.items() if i is not None and 0 <= i < len(tokens))
    adds_bos = bool(said.get("add_bos_token", adds_bos))
    return backend, ModelTokens(vocab_size, meant, adds_bos, values.get("tokenizer.chat_template"))


def _byte_level(said, tokens) -> tuple[hf.Tokenizer, bool]:
    pre = said.get("pre", "default")
    if pre not in _CUTS:
        raise DataError(f"{_PREFIX}pre = {pre!r} is not known here; known are {', '.join(_CUTS)}")
    cut = _CUTS[pre]
    merges: Any = [tuple(merge.split(" ", 1)) for merge in said.get("merges") or []]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = hf.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut == _LLAMA3))
    if cut == _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(_cuts(cut)))
    backend.decoder = decoders.ByteLevel()
    return backend, cut == _LLAMA3


def _cuts(cut) -> Iterator[Any]:
    if cut == _DIGITS:
        yield pre_tokenizers.Digits(individual_digits=True)
    if cut in (_LLAMA3, _QWEN2):
        numbers = r"\p{N}{1,3}" if cut == _LLAMA3 else r"\p{N}"
        yield pre_tokenizers.Split(hf.Regex(f"{_LETTERS}|{numbers}|{_REST}"), "isolated")
    yield pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut in (_GPT2, _DIGITS))


def _sentence_piece(said, tokens) -> tuple[hf.Tokenizer, bool]:
    """Pieces have scores there, and merges here: every way to make a piece of two others, best pieces first."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    scores = said.get("scores") or []
    if len(scores) != len(tokens):
        raise DataError(f"{_PREFIX}scores has {len(scores)} entries, {_PREFIX}tokens {len(tokens)}")
    unknown = said.get("unknown_token_id", 0)
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += [(score, pair) for pair in sorted(known, key=lambda pair: tuple(map(vocabulary.__getitem__, pair)))]
    merges.sort(key=lambda merge: -merge[0])  # stable
    backend = hf.Tokenizer(
        models.BPE(
            vocabulary,
            [pair for _, pair in merges],
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    begins_with_space = said.get("add_space_prefix", True)
    first = [normalizers.Prepend(_SPACE)] if begins_with_space else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if begins_with_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return backend, True


_BACKENDS = {"gpt2": _byte_level, "llama": _sentence_piece}


def _add_special(backend, tokens, kinds):
    special = (_UNKNOWN, _CONTROL)
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in special:
            backend.add_special_tokens([hf.AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([hf.AddedToken(token, normalized=False)])
