"""Tokens of a caption as the official scores see them: Penn Treebank, lower case, 17 punctuation tokens dropped.

The Java tokeniser is the reference. Where there is no Java, a regular expression stands in: the same tokens on every sentence of the
CLEVR-Change grammar and on all 28,788 real Spot-the-Diff and Image-Editing-Request sentences (``data_evaluation.md`` 3.4; the test suite
compares both with the jar).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastidc.errors import FastidcError
from fastidc.evaluate.java import JavaError, ptb_lines

TOKENIZERS = ("auto", "ptb-java", "ptb-regex")

# pycocoevalcap's list as it is written there. The jar lower-cases its brackets (-lrb-), so bracket tokens do stay in the official scores.
PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# Curly quotation marks, en and em dash, ellipsis: PTB writes them in ASCII.
_ASCII = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": " -- ", "\u2014": " -- ", "\u2026": " ... "})
_TOKEN = re.compile(
    r"""
    https?://\S+ | <[a-z/][^<>\s]*> | [\w.+-]+@[a-z\d-]+(?:\.[a-z\d-]+)+      # addresses and tags stay whole
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b)  # what PTB takes apart although no blank does
    | [a-z]+(?=n't\b) | n't\b | '(?:s|m|d|ll|re|ve|em|cause)\b | o'clock
    | (?:[a-z]\.)+[a-z]\b\.? | \b[a-z]\.(?=\s|$)                              # j.r. and single initials keep their points
    | (?:mr|mrs|ms|dr|prof|gen|st|etc|vs|jr|sr|inc|co|corp|ltd)\.(?!\w)
    | [^\W\d_]+(?:\.[^\W\d_]+)+                                               # www.maxim.com, and "car.the" alike
    | \d+(?:[.,:/]\d+)+ | \d+/\d+
    | [^\W_](?:\w*\w)?(?:[-/][^\W_](?:\w*\w)?)*                               # words, t-shirt, 1-month, left/right
    | @\w+ | \.{2,} | -{2,} | [!?]{2,} | \S
    """,
    re.VERBOSE,
)


def normalize(sentence: str) -> str:
    """One line, single blanks. U+2028, form feeds and their like end a line for Java, and every later caption would shift by one."""
    return " ".join(sentence.split())


def ptb_regex(sentence: str) -> str:
    """The tokens of one sentence, lower case, punctuation dropped, joined by blanks. Needs no Java."""
    tokens = _TOKEN.findall(normalize(sentence).lower().translate(_ASCII))
    return " ".join(_BRACKETS.get(token, token) for token in tokens if token not in PUNCTUATION and not _is_mark(token))


def _is_mark(token: str) -> bool:
    return token == '"' or token.strip(".") == "" or token.strip("-") == ""


def tokenize(sentences: Sequence[str], tokenizer: str = "auto") -> tuple[list[str], str, str | None]:
    """Tokenise a list of sentences: ``(tokenised sentences, the tokeniser that did it, why it was not the jar or None)``.

    ``tokenizer``: "ptb-java", "ptb-regex", or "auto", which takes the jar and falls back to the regular expression where Java fails.
    Raises FastidcError for another name, and for "ptb-java" where Java fails.
    """
    if tokenizer not in TOKENIZERS:
        raise FastidcError(f"tokenizer {tokenizer!r} is not one of {', '.join(TOKENIZERS)}")
    reason = None
    if tokenizer != "ptb-regex":
        try:
            lines = ptb_lines([normalize(sentence) for sentence in sentences])
            return [_drop(line) for line in lines], "ptb-java", None
        except JavaError as error:
            if tokenizer == "ptb-java":
                raise FastidcError(f"the Java tokeniser cannot be had: {error}, or ask for tokenizer='ptb-regex'") from error
            reason = str(error)
    return [ptb_regex(sentence) for sentence in sentences], "ptb-regex", reason


def _drop(line: str) -> str:
    # Split at blanks only, as pycocoevalcap does: a token may hold a no-break space ("1 1/2").
    return " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION)
