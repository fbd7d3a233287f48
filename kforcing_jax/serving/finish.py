"""Where a text ends within the block of tokens that a step gave it."""

from collections.abc import Collection, Sequence
from typing import NamedTuple


class Trimmed(NamedTuple):
    """What a text keeps of a block.

    Attributes:
      kept: tokens, from the first on.
      text: what they add to the text that can be told.
      held: text that is not told yet, because it may be the beginning of a stop string.
      reason: "stop" or "length" where the text ends here, otherwise None.
      is_cut: a stop string ended it; what is left of half a character is no part of it.
    """

    kept: int
    text: str
    held: str
    reason: str | None
    is_cut: bool = False


def trim(
    block: Sequence[int],
    pieces: Sequence[str],
    *,
    room: int,
    end_ids: Collection[int] = (),
    stop: Sequence[str] = (),
    held: str = "",
) -> Trimmed:
    """The part of a block that belongs to a text: ids, text, log-probabilities and usage all follow from it.

    A token that ends the text is kept and has no text; one that completes a stop string is kept, and the text ends
    before that string.

    Args:
      block: new tokens, in order.
      pieces: what each of them adds to the text.
      room: tokens that the text may still have.
      end_ids: tokens that end it.
      stop: strings that end it, none empty.
      held: what the last block held back.
    """
    text = held
    for index, (token, piece) in enumerate(zip(block, pieces, strict=True)):
        if index >= room:
            return Trimmed(index, text, "", "length")
        if token in end_ids:
            return Trimmed(index + 1, text, "", "stop")
        text += piece
        found = [at for at in (text.find(word) for word in stop) if at >= 0] if stop else ()
        if found:
            return Trimmed(index + 1, text[: min(found)], "", "stop", is_cut=True)
    if len(block) >= room:
        return Trimmed(len(block), text, "", "length")
    certain = len(text) - _uncertain(text, stop)
    return Trimmed(len(block), text[:certain], text[certain:], None)


def _uncertain(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of a text with which a stop string begins."""
    longest = min(max(map(len, stop), default=1) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(word.startswith(text[-n:]) for word in stop)), 0)
