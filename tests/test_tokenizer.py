"""The shapes in which the two stages read a caption (clip4idc.md 2)."""

import pytest

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc.config import END_ID, START_ID
from fastidc.tokenizer import Tokenizer, left_right_swapped, vocabulary_of

CAPTION = "the small red cube left of the sphere turned green"


def test_ids_are_clips():
    import open_clip

    expected = [i for i in open_clip.tokenize([CAPTION])[0].tolist() if i]
    assert Tokenizer().text(CAPTION, 32) == expected
    assert expected[0] == START_ID
    assert expected[-1] == END_ID


def test_stage_one_keeps_30_and_stage_two_31_tokens():
    long = "red " * 40
    assert len(Tokenizer().text(long, 32)) == 32
    assert Tokenizer().text(long, 32).count(Tokenizer().encode("red")[0]) == 30
    inputs, targets = Tokenizer().caption(long, 32)
    assert len(inputs) == len(targets) == 32
    assert inputs[0] == START_ID
    assert targets[-1] == END_ID
    assert inputs[1:] == targets[:-1] == Tokenizer().encode("red") * 31


def test_decode_cuts_at_end_and_at_the_first_exclamation_mark():
    t = Tokenizer()
    assert t.decode([*t.encode(CAPTION), END_ID, *t.encode("rubbish")]) == CAPTION
    assert t.decode([*t.encode("it moved"), 0, 0, *t.encode("again")]) == "it moved"
    assert t.decode(t.encode("wow ! it moved")) == "wow"
    assert t.decode([END_ID]) == ""


def test_restricted_vocabulary_round_trip():
    t = Tokenizer(vocabulary_of([CAPTION, "nothing has changed"]))
    inputs, targets = t.caption(CAPTION, 32)
    assert max(inputs) < 20
    assert inputs[0] == t.start
    assert targets[-1] == t.end == max(targets)
    assert t.decode(targets) == CAPTION
    assert t.encode("nothing zebra has changed") == t.encode("nothing has changed"), "a word outside is dropped"


def test_mirrored_captions():
    assert left_right_swapped("left of the cube on the right side") == "right of the cube on the left side"
    assert left_right_swapped("the leftover bright sphere") == "the leftover bright sphere"
