"""How documents become rows of a fixed length."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kforcing_jax.data.choices import PACKINGS

SEGMENT_DTYPE = np.uint16

# Rows that a document may still join. More of them fill rows better and take longer.
_OPEN_ROWS = 64


class Batch(NamedTuple):
    """Rows to train on.

    `tokens` (B, N) int32. `segments` (B, N) int32: ids 1, 2, ... of the documents of a row, 0 where there is padding;
    None where every row is one stretch of text. `answers` (B, N) bool: which tokens are an assistant's; None where all
    of a text is to be learnt.
    """

    tokens: np.ndarray
    segments: np.ndarray | None = None
    answers: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed documents: tokens, segment ids and answers as in `Batch`, and what they were made from.

    `document_tokens` are those of the documents before rows were cut, `unknown_tokens` those of them that stand for
    something outside the vocabulary, and `skipped` counts entries without text.
    """

    tokens_RxN: np.ndarray
    segments_RxN: np.ndarray | None = None
    documents: int = 0
    document_tokens: int = 0
    unknown_tokens: int = 0
    skipped: int = 0
    answers_RxN: np.ndarray | None = None

    @property
    def useful_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.tokens_RxN.size if self.segments_RxN is None else int(np.count_nonzero(self.segments_RxN))


def pack(
    documents: Sequence[np.ndarray],
    packing: str,
    length: int,
    padding: int,
    frame: tuple[int, int] | None = None,
) -> Rows:
    """Documents, 1-D arrays of ids, in rows of `length` tokens of the same dtype.

    `wrapped`: end to end, whatever row they end up in; the remainder is dropped. `framed`: likewise, each row between
    the two ids of `frame`. `segments`: whole, each a segment of its own, as many in a row as fit. `padded`: one in each
    row. The last two cut a document that is longer than a row; they fill rows up with the id `padding`.
    """
    how, tokens = PACKINGS[packing], sum(map(len, documents))
    if not how.segmented:
        rows_RxN = _wrap(documents, length, frame if how.framed else None)
        return Rows(rows_RxN, documents=len(documents), document_tokens=tokens)
    documents = [document[:length] for document in documents]
    lengths = [len(document) for document in documents]
    rows = best_fit(lengths, length) if how.shared else list(range(len(documents)))
    return Rows(*_lay_out(documents, rows, length, padding), len(documents), tokens)


def _wrap(documents, length, frame):
    tokens_T = np.concatenate(documents) if documents else np.zeros(0, np.uint8)
    inner = length - 2 if frame else length
    rows_RxM = tokens_T[: len(tokens_T) // inner * inner].reshape(-1, inner)
    if not frame:
        return rows_RxM
    begin_Rx1, end_Rx1 = (np.full((len(rows_RxM), 1), i, tokens_T.dtype) for i in frame)
    return np.concatenate([begin_Rx1, rows_RxM, end_Rx1], axis=1)


def best_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """The row of every document, by lengths in tokens: of the open rows that have room the fullest, or else a new one.

    When too many rows are open, the fullest is closed.
    """
    rows, open_ids, room = [], np.zeros(_OPEN_ROWS, int), np.zeros(_OPEN_ROWS, int)
    opened = 0
    for length in lengths:
        slot = int(np.argmin(np.where(room >= length, room, capacity + 1)))
        if room[slot] < length:
            slot = int(np.argmin(room))
            open_ids[slot], room[slot] = opened, capacity
            opened += 1
        rows.append(int(open_ids[slot]))
        room[slot] -= length
    return rows


def _lay_out(documents, rows, length, padding) -> tuple[np.ndarray, np.ndarray]:
    shape = (max(rows, default=-1) + 1, length)
    tokens_RxN = np.full(shape, padding, documents[0].dtype if documents else np.uint8)
    segments_RxN = np.zeros(shape, SEGMENT_DTYPE)
    filled_R, count_R = np.zeros(shape[0], int), np.zeros(shape[0], int)
    for document, row in zip(documents, rows, strict=True):
        at = slice(filled_R[row], filled_R[row] + len(document))
        count_R[row] += 1
        tokens_RxN[row, at], segments_RxN[row, at] = document, count_R[row]
        filled_R[row] = at.stop
    return tokens_RxN, segments_RxN
