import pytest

from fastidc.errors import FastidcError
from fastidc.evaluate.captions import change_accuracy, object_colour, object_colour_accuracy, parse_change, type_accuracy, type_confusion
from fastidc.evaluate.changes import is_no_change_id


def test_every_sentence_of_the_grammar_is_read(grammar):
    for kind in grammar.types:
        for _ in range(500):
            caption = grammar.change(kind)
            assert parse_change(caption) == kind, caption
    assert {parse_change(sentence) for sentence in grammar.no_change} == {"none"}


def test_the_colour_is_that_of_the_first_object(grammar):
    for kind in grammar.types:
        for colour in ["", *grammar.colours]:
            for _ in range(20):
                caption = grammar.change(kind, colour)
                assert object_colour(caption) == (colour or None), caption


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("The small red cube left of the big blue sphere turned green.", "color"),
        ("the ball turned into metal", "material"),
        ("the red cube changed to cube", None),
        ("the red car is gone and a person appeared", None),
        ("the car is gone, no other change", "drop"),
        ("nothing was moved", "none"),
        ("i see no differences between the two images", "none"),
        ("the two pictures are the same", "none"),
        ("the grey block became grey", "color"),
        ("there is a car in the lot", None),
        ("", None),
    ],
)
def test_other_captions(caption, kind):
    assert parse_change(caption) == kind


@pytest.mark.parametrize(
    ("caption", "colour"),
    [
        ("The small RED cube left of the big blue sphere turned green.", "red"),
        ("the grey block is gone", "gray"),
        ("the cube left of the red ball is gone", None),
        ("the red car is gone", None),
        ("there is no change", None),
    ],
)
def test_object_colours(caption, colour):
    assert object_colour(caption) == colour


def test_change_accuracy_by_sentences_and_by_patterns():
    hypotheses = {"1.png": "the cube moved", "2.png": "There is no change.", "1.png_n": "there is no  change", "2.png_n": "all as it was"}
    expected = {"accuracy": 0.5, "change": 0.5, "no_change": 0.5, "pairs": 4}
    assert change_accuracy(hypotheses) == expected
    assert change_accuracy(hypotheses, ["there is no change"]) == expected
    assert change_accuracy(hypotheses, ["all as it was"]) == {"accuracy": 0.75, "change": 1.0, "no_change": 0.5, "pairs": 4}
    assert change_accuracy({"1.png": "x"})["no_change"] is None
    with pytest.raises(FastidcError, match="no captions"):
        change_accuracy({})


def test_ids_of_no_change_pairs():
    assert is_no_change_id("000123.png_n")
    assert not is_no_change_id("000123.png")
    assert not is_no_change_id("Reddit_n")


def test_types_and_confusion():
    types = {"1.png": "add", "2.png": "add", "3.png": "drop"}
    hypotheses = {
        "1.png": "a cube has appeared",
        "2.png": "a cube is missing",
        "3.png": "hm",
        "3.png_n": "no change was made",
        "9.png": "x",
    }
    matrix = type_confusion(hypotheses, types)
    assert matrix["add"] == {"color": 0, "material": 0, "add": 1, "drop": 1, "move": 0, "none": 0, "unparsed": 0}
    assert matrix["drop"]["unparsed"] == 1
    assert matrix["none"]["none"] == 1
    assert sum(sum(row.values()) for row in matrix.values()) == 4
    result = type_accuracy(hypotheses, types)
    assert result == {"accuracy": 1 / 3, "pairs": 3, "unparsed": 1, "types": {"add": 0.5, "drop": 0.0, "none": 1.0}}
    with pytest.raises(FastidcError, match=r"type 'grow' of '1.png'"):
        type_confusion(hypotheses, {"1.png": "grow"})


def test_colour_accuracy_comes_with_its_coverage():
    hypotheses = {"1": "the red cube moved", "2": "the blue ball moved", "3": "the thing moved", "4": "the red cube moved"}
    result = object_colour_accuracy(hypotheses, {"1": "red", "2": "green", "3": "cyan", "7": "red"})
    assert result == {"accuracy": 0.5, "coverage": 2 / 3, "named": 2, "pairs": 3}
    assert object_colour_accuracy({"3": "the thing moved"}, {"3": "cyan"})["accuracy"] is None
    with pytest.raises(FastidcError, match="colour 'pink' of '1'"):
        object_colour_accuracy(hypotheses, {"1": "pink"})
    with pytest.raises(FastidcError, match="no caption has an object colour"):
        object_colour_accuracy(hypotheses, {})
