"""What a configuration chooses from: sources of text, packings of rows, tokenizers. A new one is an entry here.

Nothing heavy is imported: configurations are read before anything else happens. A source may also be one's own, named
as module:class, without an entry.
"""

import dataclasses
import string
from collections.abc import Callable
from typing import Any

from kforcing_jax.errors import ConfigError
from kforcing_jax.registry import imported, is_own

# Fields of `DataConfig` that shape the rows of every source of text.
_OF_TEXT = ("path", "tokenizer", "vocab_size", "packing")
# The states of a Markov chain, each a character.
STATE_NAMES = string.digits + string.ascii_lowercase + string.ascii_uppercase


@dataclasses.dataclass(frozen=True)
class Source:
    """Where rows come from.

    `reader` names the `units.Reader` that reads it, as module:class; `fields` are those of `DataConfig` that shape its
    rows beside `source` and `seq_len`, and `seeded` says whether the run's seed does so too.
    """

    reader: str
    fields: tuple[str, ...]
    seeded: Callable[[Any], bool] = lambda config: True


@dataclasses.dataclass(frozen=True)
class Packing:
    """How documents lie in rows: apart from each other (`segmented`), several a row (`shared`), between two ids."""

    segmented: bool = False
    shared: bool = True
    framed: bool = False

    @property
    def least_length(self) -> int:
        """Of a row that holds anything."""
        return 3 if self.framed or self.segmented else 2


@dataclasses.dataclass(frozen=True)
class KnownTokenizer:
    """A vocabulary on the Hugging Face hub, and the digest of its tokens: another file of that name is noticed."""

    repository: str
    digest: str


SOURCES = {
    "news": Source("kforcing_jax.data.units:News", (*_OF_TEXT, "validation_fraction")),
    "text_files": Source(
        "kforcing_jax.data.units:TextFiles",
        (*_OF_TEXT, "validation_fraction", "validation_documents", "document_separator"),
        # The last documents are held out, not a random part.
        seeded=lambda config: not config.validation_documents,
    ),
    "chat": Source("kforcing_jax.data.chats:Chats", (*_OF_TEXT, "validation_fraction", "chat_template", "loss_on")),
    "lm1b": Source("kforcing_jax.data.units:Lm1b", _OF_TEXT, seeded=lambda config: False),
    "markov": Source(
        "kforcing_jax.data.units:Markov",
        ("packing", "validation_fraction", "markov_states", "markov_concentration", "markov_rows"),
    ),
}


def check_source(name: str) -> None:
    """Raises ConfigError for a source that is in no table and not module:class."""
    if name not in SOURCES and not is_own(name):
        raise ConfigError(
            f"data.source = {name!r} is not one of {', '.join(SOURCES)}, nor module:class of a source of your own"
        )


def source(name: str) -> Source:
    """The source of that name: an entry of the table, or one's own, whose class may say its `fields`.

    Raises:
      ConfigError: one's own cannot be imported.
    """
    if name in SOURCES:
        return SOURCES[name]
    own = imported(name, "a source")
    return Source(name, tuple(getattr(own, "fields", (*_OF_TEXT, "validation_fraction"))))


PACKINGS = {
    "wrapped": Packing(),
    "framed": Packing(framed=True),
    "segments": Packing(segmented=True),
    "padded": Packing(segmented=True, shared=False),
}
# Trained on the text, with the smallest vocabulary that each can have: bpe needs 256 bytes, an end and a mask.
TRAINED_TOKENIZERS = {"characters": 5, "bpe": 258}
KNOWN_TOKENIZERS = {
    "bert-base-uncased": KnownTokenizer(
        "google-bert/bert-base-uncased", "0f052197aac305fe42f378b5c61554b7bacb34b8be4af83fec2cfdcdffbc9973"
    ),
    "gpt2": KnownTokenizer("openai-community/gpt2", "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"),
}
