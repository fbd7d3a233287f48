"""Where a text ends within a block."""

import itertools

import pytest

from kforcing_jax.serving.finish import Trimmed, trim

END = 0
BLOCK, PIECES = [11, 12, 13, 14], ["ab", "cd", "ef", "gh"]


def test_a_block_that_ends_nothing_is_kept_whole():
    assert trim(BLOCK, PIECES, room=5) == Trimmed(4, "abcdefgh", "", None)


@pytest.mark.parametrize("offset", range(4))
def test_an_end_id_is_kept_at_every_offset_and_has_no_text(offset):
    block = [*BLOCK[:offset], END, *BLOCK[offset + 1 :]]
    kept = trim(block, PIECES, room=9, end_ids=(END,))
    assert kept == Trimmed(offset + 1, "".join(PIECES[:offset]), "", "stop")


@pytest.mark.parametrize("room", range(5))
def test_the_room_ends_a_text_at_every_offset(room):
    assert trim(BLOCK, PIECES, room=room) == Trimmed(room, "".join(PIECES[:room]), "", "length")


@pytest.mark.parametrize(("start", "length"), [(s, n) for s in range(8) for n in range(1, 9 - s)])
def test_a_stop_string_ends_a_text_at_every_place(start, length):
    text = "abcdefgh"
    word = text[start : start + length]
    last = (start + length - 1) // 2
    assert trim(BLOCK, PIECES, room=9, stop=(word,)) == Trimmed(last + 1, text[:start], "", "stop", is_cut=True)


@pytest.mark.parametrize("word", ["bcd", "abcdefgh", "fg", "h", "ghx", "habc", "ab", "zz", "cdz", "aab"])
def test_a_stop_string_is_found_across_blocks_of_any_size_and_never_told(word):
    text = "abcdefghabcdaab"
    cut = text.find(word)
    expected = (text if cut < 0 else text[:cut], None if cut < 0 else "stop")
    for sizes in itertools.product((1, 2, 3, 5), repeat=4):
        told, held, at, reason = "", "", 0, None
        for size in itertools.cycle(sizes):
            pieces = list(text[at : at + size])
            kept = trim(list(range(len(pieces))), pieces, room=99, end_ids=(), stop=(word,), held=held)
            told, held, reason, at = told + kept.text, kept.held, kept.reason, at + size
            assert not any(told.endswith(word[:n]) for n in range(1, len(word) + 1)) or reason or len(word) == 1
            if reason or at >= len(text):
                break
        assert (told + held, reason) == expected


def test_of_two_stop_strings_the_one_that_begins_first_cuts():
    assert trim([1], ["xabcd"], room=9, stop=("bc", "abcd")) == Trimmed(1, "x", "", "stop", is_cut=True)


def test_text_that_may_begin_a_stop_string_is_held_until_it_cannot():
    held = trim([1], ["say sto"], room=9, stop=("stop",))
    assert held == Trimmed(1, "say ", "sto", None)
    assert trim([2], ["ve"], room=8, stop=("stop",), held=held.held) == Trimmed(1, "stove", "", None)


def test_text_that_is_held_is_told_when_the_text_ends():
    assert trim([1], ["sto"], room=1, stop=("stop",)) == Trimmed(1, "sto", "", "length")
    assert trim([END], [""], room=5, end_ids=(END,), stop=("stop",), held="sto") == Trimmed(1, "sto", "", "stop")


def test_what_comes_first_decides():
    """An end id before a stop string, and a stop string in the last token that there is room for."""
    assert trim([END, 5], ["", "stop"], room=9, end_ids=(END,), stop=("stop",)).reason == "stop"
    assert trim([END, 5], ["", "stop"], room=9, end_ids=(END,), stop=("stop",)).kept == 1
    assert trim([4, 5], ["a", "stop"], room=2, stop=("stop",)) == Trimmed(2, "a", "", "stop", is_cut=True)


def test_an_empty_block_ends_a_text_without_room():
    assert trim([], [], room=0) == Trimmed(0, "", "", "length")
    assert trim([], [], room=3) == Trimmed(0, "", "", None)
