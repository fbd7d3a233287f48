"""Tokenizers, all of them one `tokenizer.json` of the HF library: our own, and pre-trained ones (`pretrained.py`).

A mask id stands for "no token" in the models, which never draw it. It is the last id, unless the vocabulary has a mask
of its own.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import operator
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from kforcing_jax.config import DataConfig
from kforcing_jax.errors import ConfigError, DataError, RunError

UNKNOWN, EOS, MASK = "<unk>", "<eos>", "<mask>"
# What vocabularies call the tokens that mean something here; the first one that is there counts.
_MASKS = (MASK, "[MASK]")
_ENDS = (EOS, "[SEP]", "<|endoftext|>", "</s>")
_BEGINNINGS = ("[CLS]", "<|endoftext|>", "<s>")
MARKOV_ALPHABET = string.digits + string.ascii_lowercase + string.ascii_uppercase

# The library needs some 300 bytes per character of one text, so long texts are cut. No token of either kind
# spans a space before a letter or digit, so a cut there changes nothing.
_PIECES = re.compile(r"(?s).{1,16384}(?= [^\W_]|\Z)|.{1,16384}")
_PIECES_PER_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back."""

    backend: hf.Tokenizer

    def __post_init__(self):
        # Otherwise a text that spells <mask> or <eos> would turn into them.
        self.backend.encode_special_tokens = True

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads the tokenizer.json of prepared data. Raises RunError when it is damaged, or has no mask."""
        try:
            tokenizer = cls(hf.Tokenizer.from_str(Path(path).read_text(encoding="utf-8")))
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise RunError(f"{path} cannot be read ({error}); delete its folder and prepare the data again") from None
        if tokenizer.mask_id is None or (
            tokenizer.mask_id != tokenizer.vocab_size - 1 and not tokenizer.begins_documents
        ):
            raise RunError(f"{path} does not have {MASK} as its last id; it was not written by this library")
        return tokenizer

    def save(self, path: str | Path):
        """Writes a tokenizer.json."""
        Path(path).write_text(self.backend.to_str(pretty=True), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return self.backend.get_vocab_size()

    @property
    def mask_id(self) -> int:
        return self._first_id(_MASKS)

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document; None for a Markov chain, which does not end."""
        return self._first_id(_ENDS)

    @property
    def bos_id(self) -> int | None:
        """The id that begins a row or document, where the vocabulary has one."""
        return self._first_id(_BEGINNINGS)

    @property
    def begins_documents(self) -> bool:
        """Whether a document begins with an id of its own ([CLS]), and not only ends with one."""
        return self.bos_id not in (None, self.eos_id)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the tokens in the order of their ids, and of the ids that mean something here."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        described = [sorted(vocabulary.items(), key=lambda item: item[::-1]), self.bos_id, self.eos_id, self.mask_id]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def _first_id(self, names):
        ids = map(self.backend.token_to_id, names)
        return next((i for i in ids if i is not None), None)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Characters outside the vocabulary become `<unk>`."""
        return next(self.encode_documents([text]))

    def encode_documents(self, documents: Iterable[str]) -> Iterator[list[int]]:
        """Ids of each document in turn, computed in batches of bounded memory."""
        cut = _pieces if self._may_be_cut() else lambda text: [text]
        pieces = ((number, piece) for number, text in enumerate(documents) for piece in cut(text))
        encoded = itertools.chain.from_iterable(map(self._encode_batch, _batches(pieces, _PIECES_PER_BATCH)))
        for _, group in itertools.groupby(encoded, operator.itemgetter(0)):
            yield [i for _, ids in group for i in ids]

    def _encode_batch(self, numbered_pieces):
        numbers, pieces = zip(*numbered_pieces, strict=True)
        encodings = self.backend.encode_batch_fast(pieces, add_special_tokens=False)
        return zip(numbers, (e.ids for e in encodings), strict=True)

    def _may_be_cut(self):
        """Vocabularies that put a mark before a text's first word would put it into every piece."""
        return not isinstance(self.backend.pre_tokenizer, (pre_tokenizers.Metaspace, type(None)))

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt, after the id that begins a document if there is one.

        An empty prompt is the beginning of a document: that id, or `<eos>`.

        Raises:
          DataError: a character is outside the vocabulary, or the prompt is empty and there is no `<eos>`.
        """
        beginning = [self.bos_id] if self.begins_documents else []
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

    @functools.cached_property
    def _marked(self):
        backend = hf.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def decode(self, ids: Sequence[int], show_special: bool = False) -> str:
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


def check_vocabulary(config: DataConfig):
    """Raises ConfigError when no vocabulary can satisfy the config."""
    if config.source == "markov":
        if config.markov_states > len(MARKOV_ALPHABET):
            raise ConfigError(
                f"data.markov_states = {config.markov_states} is above {len(MARKOV_ALPHABET)}, "
                "the number of letters and digits that name states"
            )
    elif config.tokenizer == "bpe" and config.vocab_size < 258:
        raise ConfigError(
            f'data.vocab_size = {config.vocab_size} should be at least 258 with data.tokenizer = "bpe": '
            f"256 bytes, {EOS} and {MASK}"
        )


def is_trained(config: DataConfig) -> bool:
    """Whether the vocabulary is made from the text, and not a pre-trained one."""
    return config.tokenizer in ("characters", "bpe")


def train_tokenizer(config: DataConfig, documents: Iterable[str]) -> Tokenizer:
    """A tokenizer of at most `config.vocab_size` ids: the most frequent characters, or byte-level BPE."""
    backend, trainer = _bpe(config.vocab_size - 1) if config.tokenizer == "bpe" else _characters(config.vocab_size - 1)
    backend.train_from_iterator((piece for text in documents for piece in _pieces(text)), trainer)
    return with_mask(backend)


def markov_tokenizer(num_states: int) -> Tokenizer:
    """A tokenizer whose id i < num_states is state i, written as one of 0-9a-zA-Z, and which has no `<eos>`."""
    states = {character: i for i, character in enumerate(MARKOV_ALPHABET[:num_states])}
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
    """The tokenizer of a backend, with a mask as its last id unless it has one."""
    if all(backend.token_to_id(name) is None for name in _MASKS):
        # Only now: training numbers its own special tokens first.
        backend.add_special_tokens([MASK])
    return Tokenizer(backend)


def _pieces(text):
    return _PIECES.findall(text) or [""]


def _batches(items, size):
    iterator = iter(items)
    return iter(lambda: list(itertools.islice(iterator, size)), [])
