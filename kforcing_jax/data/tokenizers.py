"""Tokenizers, all of them one `tokenizer.json` of the HF library: our own, and pre-trained ones (`pretrained.py`).

A mask id stands for "no token" in the models, which never draw it. It is the last id, unless the vocabulary has a mask
of its own. Vocabularies that come along with a model have none (`model_tokenizers.py`).
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from kforcing_jax.config import DataConfig
from kforcing_jax.data.choices import STATE_NAMES, TRAINED_TOKENIZERS
from kforcing_jax.data.whole_file import write_text
from kforcing_jax.errors import DataError, RunError

UNKNOWN, EOS, MASK = "<unk>", "<eos>", "<mask>"
# What vocabularies call the tokens that mean something here; the first one that is there counts.
_MASKS = (MASK, "[MASK]")
_ENDS = (EOS, "[SEP]", "<|endoftext|>", "</s>", "<|end_of_text|>", "[EOS]")
_BEGINNINGS = ("[CLS]", "<|endoftext|>", "<s>", "<bos>", "<|begin_of_text|>", "[BOS]")
SPECIAL_NAMES = dict.fromkeys((*_MASKS, *_ENDS, *_BEGINNINGS))

# The library needs some 300 bytes per character of one text, so long texts are cut, before a word.
_LONG = 16384
_BEFORE_A_WORD = re.compile(r" (?=[^\W_])")
# So many places are tried, each with so many characters around it.
_CUTS_TO_TRY, _CHARACTERS_AROUND = 8, 64
_PIECES_PER_BATCH = 64


# Beside a tokenizer.json: which tokens mean something.
SETTINGS = "tokenizer_config.json"
MASK_NAME = "mask_token"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
OURS = "kforcing_jax"


class ModelTokens(NamedTuple):
    """What is said of the tokenizer that comes along with a model, where names are not guessed from a list.

    Attributes:
      vocab_size: ids of the model. There may be more than tokens: rows of its embedding that stand for nothing.
      tokens: what tokenizers call their special tokens (bos_token, eos_token, ...), and which these are. Only models
        that were trained here have a mask_token.
      adds_bos: whether texts begin with bos_token.
      chat_template: how messages become text (Jinja), where the model has such a template.
    """

    vocab_size: int
    tokens: tuple[tuple[str, str], ...] = ()
    adds_bos: bool = False
    chat_template: str | None = None

    @classmethod
    def of_settings(cls, settings: dict[str, Any]) -> "ModelTokens":
        """From the content of a tokenizer_config.json that `settings` has given."""
        tokens = tuple((name, settings[name]) for name in (*SPECIAL, MASK_NAME) if name in settings)
        own = settings[OURS]
        return cls(own["vocab_size"], tokens, own["adds_bos"], settings.get("chat_template"))

    def settings(self) -> dict[str, Any]:
        """The content of a tokenizer_config.json."""
        template = {"chat_template": self.chat_template} if self.chat_template else {}
        own = {"vocab_size": self.vocab_size, "adds_bos": self.adds_bos}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict(self.tokens),
            "add_bos_token": self.adds_bos,
            "clean_up_tokenization_spaces": False,
            **template,
            OURS: own,
        }


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. `of_model` is there where it came along with a model."""

    backend: hf.Tokenizer
    of_model: ModelTokens | None = None

    def __post_init__(self):
        # Otherwise a text that spells <mask> or <eos> would turn into them; `_spelled_out` sees to the rest.
        self.backend.encode_special_tokens = True

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads the tokenizer.json of prepared data. Raises RunError when it is damaged, or has no mask."""
        settings = Path(path).with_name(SETTINGS)
        try:
            said = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
            of_model = ModelTokens.of_settings(said) if OURS in said else None
            tokenizer = cls(hf.Tokenizer.from_str(Path(path).read_text(encoding="utf-8")), of_model)
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise RunError(f"{path} cannot be read ({error}); delete its folder and prepare the data again") from None
        if tokenizer.mask_id is None and of_model is None:
            raise RunError(f"{path} has no {MASK}; it was not written by this library")
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Writes a tokenizer.json, and tokenizer_config.json where there is more to say; whole. Raises OSError."""
        if self.of_model:
            write_text(Path(path).with_name(SETTINGS), json.dumps(self.of_model.settings(), indent=2))
        write_text(Path(path), self.backend.to_str(pretty=True))

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, special ones included: the largest, and one; those of the model that this came along with."""
        return self.of_model.vocab_size if self.of_model else max(_ids_of(self.backend).values()) + 1

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id."""
        return np.min_scalar_type(self.vocab_size - 1)

    @property
    def mask_id(self) -> int | None:
        """The id that stands for no token, and is never drawn; none where the vocabulary came along with a model."""
        return self._id_of(MASK_NAME) if self.of_model else self._first_id(_MASKS)

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document; None for a Markov chain, which does not end."""
        return self._id_of("eos_token") if self.of_model else self._first_id(_ENDS)

    @property
    def bos_id(self) -> int | None:
        """The id that begins a row or document, where the vocabulary has one."""
        if self.of_model:
            return self._id_of("bos_token") if self.of_model.adds_bos else None
        return self._first_id(_BEGINNINGS)

    @property
    def begins_documents(self) -> bool:
        """Whether a document begins with an id of its own ([CLS]), and not only ends with one."""
        return self.bos_id not in (None, self.eos_id)

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """The id of what is outside the vocabulary, where it has one."""
        model = json.loads(self.backend.to_str())["model"]
        token = model.get("unk_token")
        return model.get("unk_id") if token is None else self.backend.token_to_id(token)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the tokens in the order of their ids, and of the ids that mean something here."""
        tokens = sorted(_ids_of(self.backend).items(), key=lambda item: item[::-1])
        described = [tokens, self.bos_id, self.eos_id, self.mask_id]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def _id_of(self, name):
        token = dict(self.of_model.tokens).get(name) if self.of_model else None
        return None if token is None else self.backend.token_to_id(token)

    def _first_id(self, names):
        ids = map(self.backend.token_to_id, names)
        return next((i for i in ids if i is not None), None)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Characters outside the vocabulary become `<unk>`; raises DataError where it has none."""
        return next(self.encode_documents([text]))

    def encode_documents(self, documents: Iterable[str]) -> Iterator[list[int]]:
        """Ids of each document in turn, computed in batches of bounded memory. Raises DataError like `encode`."""
        pieces = ((number, piece) for number, text in enumerate(documents) for piece in _pieces(text, self._may_cut))
        encoded = itertools.chain.from_iterable(map(self._encode_batch, _batches(pieces, _PIECES_PER_BATCH)))
        for _, group in itertools.groupby(encoded, operator.itemgetter(0)):
            yield [i for _, ids in group for i in ids]

    def _encode_batch(self, numbered_pieces):
        numbers, pieces = zip(*numbered_pieces, strict=True)
        try:
            if len(pieces) == 1:  # without waking the library's threads: a server's prompts come one by one
                encodings = [self.backend.encode(pieces[0], add_special_tokens=False)]
            else:
                encodings = self.backend.encode_batch_fast(pieces, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception, where there is no token for what is unknown
            raise DataError(f"the text is not one of this vocabulary ({' '.join(str(error).split())[:200]})") from None
        return zip(numbers, (self._without_special(e.ids) for e in encodings), strict=True)

    def _may_cut(self, text, at):
        """Whether the ids of both parts are those of the whole. Some vocabularies begin every text with a mark."""
        before, after = text[max(at - _CHARACTERS_AROUND, 0) : at], text[at : at + _CHARACTERS_AROUND]
        whole, *parts = (ids for _, ids in self._encode_batch(enumerate((before + after, before, after))))
        return whole == parts[0] + parts[1]

    def _without_special(self, ids):
        for i in self._special.keys() & set(ids):
            if i not in self._spellings:
                self._spellings[i] = self._spelled_out(i)
            ids = [part for j in ids for part in (self._spellings[i] if j == i else [j])]
        return ids

    @functools.cached_property
    def _spellings(self) -> dict[int, list[int]]:
        return {}

    @functools.cached_property
    def _special(self) -> dict[int, str]:
        """Tokens that no text may become, by id. Some models have them among their words, and find them in a text."""
        added = self.backend.get_added_tokens_decoder()
        named = (i for i in (self.mask_id, self.bos_id, self.eos_id) if i is not None)
        ids = {*named, *(i for i, token in added.items() if token.special and i != self.unknown_id)}
        tokens = {i: self.backend.id_to_token(i) for i in ids}
        return {i: token for i, token in tokens.items() if token is not None}

    def _spelled_out(self, special_id) -> list[int]:
        """The ids of the name of a special token in two parts, or of the unknown one."""
        if special_id == self.unknown_id:
            raise DataError(
                f"the text has what is outside the vocabulary, which would become {self._special[special_id]}; give a "
                "tokenizer that has a token of its own for it"
            )
        name = self._special[special_id]
        halves = [(self._by_model(name[:i]), self._by_model(name[i:])) for i in range(1, len(name))]
        ways = [first + second for first, second in halves if first and second]
        ways = [ids for ids in ways if self._special.keys().isdisjoint(ids)]
        unknown = [] if self.unknown_id is None else [self.unknown_id]
        return min(ways, key=lambda ids: (sum(i in unknown for i in ids), len(ids)), default=unknown)

    def _by_model(self, text) -> list[int]:
        """Ids without what comes before the model, as a mark at the beginning; none where it has none."""
        try:
            return [token.id for token in self.backend.model.tokenize(text)]
        except Exception:  # the library's own: there is no token for what is unknown
            return []

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt, after the id that begins a document if there is one.

        An empty prompt is the beginning of a document: that id, or `<eos>`.

        Raises:
          DataError: a character is outside the vocabulary, or the prompt is empty and there is no `<eos>`.
        """
        begin = self.bos_id if self.begins_documents else None
        beginning = [] if begin is None else [begin]
        if not text:
            if self.eos_id is None:
                raise DataError(f"the prompt is empty; give at least one state of the chain, {self._known()}")
            return beginning or [self.eos_id]
        for position, character in enumerate(text):
            if not self._knows(character):
                raise DataError(
                    f"the prompt has {character!r} (U+{ord(character):04X}) at character {position}, which is outside "
                    f"the vocabulary; known characters: {self._known()}"
                )
        return beginning + self.encode(text)

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which the names of special tokens (`[CLS]`) stand for themselves; nothing is added.

        Raises:
          DataError: a word is outside a vocabulary that has no `<unk>`.
        """
        try:
            return self._marked.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"not text of this vocabulary ({error})") from None

    def encode_marked_documents(self, texts: Iterable[str]) -> Iterator[tuple[list[int], np.ndarray]]:
        """(ids, spans (T, 2)) of each text in turn, ids as of `encode_marked` but for the mask, which no text has.

        A span is that of the characters of a token: the first, and the one after the last. Raises DataError like
        `encode_marked`.
        """
        for batch in _batches(texts, _PIECES_PER_BATCH):
            try:
                encodings = self._marked.encode_batch(batch, add_special_tokens=False)
            except Exception as error:  # the library raises bare Exception
                raise DataError(f"not text of this vocabulary ({' '.join(str(error).split())[:200]})") from None
            for encoding in encodings:
                parts = [
                    (part, span)
                    for i, span in zip(encoding.ids, encoding.offsets, strict=True)
                    for part in self._unmask(i)
                ]
                yield [i for i, _ in parts], np.array([span for _, span in parts], np.int64).reshape(-1, 2)

    def _unmask(self, i) -> list[int]:
        return self._without_special([i]) if i == self.mask_id else [i]

    @functools.cached_property
    def _marked(self):
        backend = hf.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def decode(self, ids: Sequence[int] | np.ndarray, show_special: bool = False) -> str:
        """Text of ids. Special tokens do not end it; they are left out unless `show_special`."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not show_special)

    def _knows(self, character):
        if "\ud800" <= character <= "\udfff":  # half of a surrogate pair: a byte of the command line that is not UTF-8
            return False
        return not isinstance(self.backend.model, models.WordLevel) or self.backend.token_to_id(character) is not None

    def _known(self):
        if not isinstance(self.backend.model, models.WordLevel):
            return "all of Unicode"
        return repr("".join(sorted(token for token in self.backend.get_vocab() if len(token) == 1)))


def is_trained(config: DataConfig) -> bool:
    """Whether the vocabulary is made from the text, and not a pre-trained one."""
    return config.tokenizer in TRAINED_TOKENIZERS


def train_tokenizer(config: DataConfig, documents: Iterable[str]) -> Tokenizer:
    """A tokenizer of at most `config.vocab_size` ids: the most frequent characters, or byte-level BPE."""
    backend, trainer = _TRAINERS[config.tokenizer](config.vocab_size - 1)
    backend.train_from_iterator((piece for text in documents for piece in _pieces(text)), trainer)
    return with_mask(backend)


def markov_tokenizer(num_states: int) -> Tokenizer:
    """A tokenizer whose id i < num_states is state i, written as one of 0-9a-zA-Z, and which has no `<eos>`."""
    states = {character: i for i, character in enumerate(STATE_NAMES[:num_states])}
    return with_mask(_character_backend(models.WordLevel(states, unk_token=UNKNOWN)))


def _bpe(vocab_size):
    backend = hf.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return backend, trainer


def _characters(vocab_size):
    backend = _character_backend(models.WordLevel(unk_token=UNKNOWN))
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=[UNKNOWN, EOS], show_progress=False)
    return backend, trainer


def _character_backend(model):
    backend = hf.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split(hf.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def with_mask(backend: hf.Tokenizer) -> Tokenizer:
    """The tokenizer of a backend, with a mask as its last id unless it has one.

    Raises:
      DataError: some ids stand for nothing or for two tokens, so that a new one would not be the last.
    """
    ids = sorted(_ids_of(backend).values())
    gap = next((i for i, found in enumerate(ids) if i != found), None)
    if gap is not None or not ids:
        raise DataError(
            f"the vocabulary has {len(ids)} tokens and ids up to {max(ids, default=0)}, but not each id "
            f"from 0 on once: see id {gap}; number its tokens anew"
        )
    if all(backend.token_to_id(name) is None for name in _MASKS):
        # Only now: training numbers its own special tokens first.
        backend.add_special_tokens([MASK])
    return Tokenizer(backend)


def _ids_of(backend) -> dict[str, int]:
    return backend.get_vocab(with_added_tokens=True)


def _pieces(text, may_cut=lambda text, at: True) -> Iterator[str]:
    """A text whole, or where it is long in parts from which the same tokens come."""
    start = 0
    while len(text) - start > _LONG:
        places = (found.start() for found in _BEFORE_A_WORD.finditer(text, start + _LONG))
        cut = next((at for at in itertools.islice(places, _CUTS_TO_TRY) if may_cut(text, at)), None)
        if cut is None:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _batches(items, size):
    iterator = iter(items)
    return iter(lambda: list(itertools.islice(iterator, size)), [])


_TRAINERS = {"characters": _characters, "bpe": _bpe}
