import sys

import pytest

from fastidc.errors import FastidcError
from fastidc.evaluate import java as java_module
from fastidc.evaluate.ptb import normalize, ptb_regex, tokenize


def test_the_regular_expression_is_the_jar_on_real_sentences(java, real_sentences):
    assert len(real_sentences) == 28_788
    by_jar, used, reason = tokenize(real_sentences, "ptb-java")
    assert (used, reason) == ("ptb-java", None)
    assert [ptb_regex(sentence) for sentence in real_sentences] == by_jar


def test_abbreviations_keep_their_point_whatever_follows(java):
    ends = [".", '."', ".' and", ".,", ".)", ". Then", "..."]
    sentences = [f"see the {word}{end}" for word in ("Mr", "Prof", "St", "etc", "vs", "Inc", "Co", "Ltd") for end in ends]
    assert [ptb_regex(sentence) for sentence in sentences] == tokenize(sentences, "ptb-java")[0]


def test_the_regular_expression_is_the_jar_on_the_clevr_grammar(java, grammar):
    sentences = [grammar.change(kind) for kind in grammar.types for _ in range(2000)] + grammar.no_change
    sentences += [sentence.capitalize() + "." for sentence in sentences[::7]]
    assert [ptb_regex(sentence) for sentence in sentences] == tokenize(sentences, "ptb-java")[0]


def test_the_regular_expression_is_the_jar_on_what_people_type(java):
    sentences = [
        "",
        "   ",
        "...",
        "He can't see it's gone, we'll say: don't!",
        "You cannot; I'm gonna (maybe) wanna [look] {here}",
        'the "STOP" sign - a T-shirt -- left/right, 3-4 cars',
        "\u201cquoted\u201d and isn\u2019t \u2013 or \u2014 is it\u2026",
        "at 10:30 a.m. in the U.S. on 12/25/2019, 1,000 of 3.5, 90s 5x7 1st 50% $20 #3",
        "Mr. J. Smith etc. and so on",
        "what?? wow!!! see www.maxim.com and http://foo.com/x now",
        "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e <b>bold</b> a_b @user _there",
    ]
    assert [ptb_regex(sentence) for sentence in sentences] == tokenize(sentences, "ptb-java")[0]


@pytest.mark.parametrize("separator", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_no_line_separator_is_left(separator):
    assert normalize(f" a{separator}b ") == "a b"


def test_every_character_that_python_or_java_takes_for_a_line_end_is_a_blank():
    text = "".join(f"a{chr(code)}" for code in range(0x3000) if len(f"a{chr(code)}b".splitlines()) > 1)
    assert len(normalize(text).splitlines()) == 1


def test_separators_do_not_shift_the_sentences_after_them(java):
    sentences = ["the ball\u2028is gone", "nothing\rhas changed", "the cube\x0cmoved", "\u2029", "there is\x85no change", "end"]
    expected = ["the ball is gone", "nothing has changed", "the cube moved", "", "there is no change", "end"]
    assert tokenize(sentences, "ptb-java")[0] == expected
    assert tokenize(sentences, "ptb-regex")[0] == expected


def test_lone_surrogates_and_control_characters_do_not_break_it(java):
    tokens, used, _ = tokenize(["a \ud800 b", "c \x00\x07 d", "e"])
    assert used == "ptb-java"
    assert tokens[2] == "e"


def test_a_wrong_number_of_lines_is_an_error_and_no_shift(monkeypatch, tmp_path):
    if sys.platform == "win32":
        pytest.skip("the stand-in for java is a shell script: run this on Linux or macOS")
    fake = tmp_path / "java"
    fake.write_text("#!/bin/sh\necho one\necho two\n")
    fake.chmod(0o755)
    monkeypatch.setattr(java_module, "find_java", lambda: str(fake))
    with pytest.raises(java_module.JavaError, match="gave 3 lines for 2 sentences"):
        java_module.ptb_lines(["a", "b"])
    tokens, used, reason = tokenize(["The.", "b"])
    assert (tokens, used) == (["the", "b"], "ptb-regex")
    assert "3 lines" in reason
    with pytest.raises(FastidcError, match="tokenizer='ptb-regex'"):
        tokenize(["a", "b"], "ptb-java")


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(FastidcError, match="'spacy' is not one of auto, ptb-java, ptb-regex"):
        tokenize(["a"], "spacy")
