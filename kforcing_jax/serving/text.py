"""Text that grows with its token ids."""

from collections.abc import Sequence

import numpy as np
from tokenizers.decoders import DecodeStream

from kforcing_jax.data.tokenizers import Tokenizer

# What the decoder puts where bytes are no character, or not yet one.
INCOMPLETE = "\ufffd"
_MOST_TOKENS_OF_A_CHARACTER = 8


class TextStream:
    """The text of tokens after a prompt, as far as later tokens cannot change it.

    The pieces together are what decoding prompt and tokens at once adds to the prompt: a word piece knows that it
    continues one, and a character whose bytes are spread over tokens comes with the last of them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray):
        self._tokenizer = tokenizer
        prompt = list(map(int, prompt))
        whole = _whole_characters(tokenizer, prompt)
        self._ids, self._is_whole = prompt[:whole], True
        self._stream = DecodeStream(ids=list(self._ids), skip_special_tokens=True)
        self._length = len(tokenizer.decode(self._ids))  # of the stream's text
        self._told = len(prompt_text(tokenizer, prompt))  # of that which is known to be there
        for token in prompt[whole:]:
            self.push(token)

    def push(self, token: int) -> str:
        """What a token adds; nothing where its text is not certain yet."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer.backend, token)
        self._is_whole = piece is not None
        if not piece:
            return ""
        begins, self._length = self._length, self._length + len(piece)
        if begins == self._told:
            self._told = self._length
            return piece
        # A prompt may end within a token's text: with a whole character and a part of the next.
        new, self._told = piece[self._told - begins :], max(self._told, self._length)
        return new

    def finish(self) -> str:
        """What is left when no token follows: replacement characters for the bytes of half a one."""
        return "" if self._is_whole else self._tokenizer.decode(self._ids)[self._told :]


class IdStream:
    """Where there is no tokenizer: ids, separated by spaces."""

    def __init__(self, prompt: Sequence[int] | np.ndarray):
        self._is_first = not len(prompt)

    def push(self, token: int) -> str:
        """What a token adds."""
        piece, self._is_first = f"{token}" if self._is_first else f" {token}", False
        return piece

    def finish(self) -> str:
        """Nothing is ever left."""
        return ""


def prompt_text(tokenizer: Tokenizer | None, prompt: Sequence[int] | np.ndarray) -> str:
    """What a `TextStream`'s pieces follow: the text of a prompt, without the bytes of half a character at its end."""
    return tokenizer.decode(prompt).rstrip(INCOMPLETE) if tokenizer else " ".join(map(str, prompt))


def _whole_characters(tokenizer, prompt) -> int:
    """How many tokens of a prompt to begin with: what ends within a character is read token by token."""
    for count in range(len(prompt), max(len(prompt) - _MOST_TOKENS_OF_A_CHARACTER, -1), -1):
        if not tokenizer.decode(prompt[:count]).endswith(INCOMPLETE):
            return count
    return len(prompt)
