"""What a caption says about the change itself: whether there is one, of which type, and of which object.

The CLEVR-Change grammar (``data_evaluation.md`` 2.2) names one object first, "the small red cube left of the big ball", then what
happened to it, "turned green", so a few patterns read its captions without error. On free text they are a guess, and a caption that
fits no pattern, or two types at once, counts as not understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from fastidc.errors import FastidcError

CHANGE_TYPES = ("color", "material", "add", "drop", "move")
COLOURS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
_MATERIALS = ("rubber", "matte", "metal", "metallic", "shiny")
_SHAPES = ("object", "thing", "sphere", "ball", "cube", "block", "cylinder")

_NO_CHANGE_ID = re.compile(r"\.[A-Za-z0-9]+_n$")
_TURNED = re.compile(r"\b(?:changed (?:its colou?r )?to|turned(?: in)?(?:to)?|became|has become)(?: an?| the)? (\w+)\b")
_NO_CHANGE = re.compile(
    r"""\bno\ (?:\w+\ )?(?:change|difference|modification)s?\b
    | \bnothing\ (?:has\ |was\ |is\ |had\ )?(?:been\ )?(?:changed?|modified|different|moved|happened)\b
    | \b(?:scenes?|images?|pictures?|photos?|two|they|both)\ (?:\w+\ )?(?:seem|seems|are|is|look|looks|appear|appears|remains?|stays?)
      \ (?:to\ be\ )?(?:exactly\ )?(?:identical|the\ same|unchanged)\b
    """,
    re.VERBOSE,
)
_EVENTS = {
    "add": re.compile(r"\b(?:(?<!dis)appeared|newly placed|added)\b"),
    "drop": re.compile(r"\b(?:disappeared|missing|gone|no longer (?:there|present|visible))\b"),
    "move": re.compile(r"\b(?:changed (?:its )?(?:location|position|place)|different (?:location|position|place)|moved)\b"),
}


def is_no_change_id(pair_id: str) -> bool:
    """Whether an id names a distractor pair: ``"000123.png_n"`` does, ``"000123.png"`` does not (``clip4idc.md`` 6.5)."""
    return _NO_CHANGE_ID.search(pair_id) is not None


def _words(caption: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", caption.lower())).replace("grey", "gray")


def parse_change(caption: str) -> str | None:
    """Type of the change that a caption tells: "color", "material", "add", "drop", "move", "none" (no change), or None (not understood)."""
    text = _words(caption)
    text, phrases = _NO_CHANGE.subn(" | ", text)  # taken out: "nothing was moved" is no move, "the car is gone, no other change" is one
    found = {kind for kind, pattern in _EVENTS.items() if pattern.search(text)}
    for value in _TURNED.findall(text):
        if value in COLOURS:
            found.add("color")
        elif value in _MATERIALS:
            found.add("material")
    if phrases and not found:
        return "none"
    return found.pop() if len(found) == 1 else None


def object_colour(caption: str) -> str | None:
    """Colour word of the object that a caption is about, None where it names none: its first noun phrase, before a CLEVR shape noun.

    For a colour change that is the colour before it: "the small red cube left of the blue sphere turned green" gives "red".
    """
    colour = None
    for word in _words(caption).split():
        if word in COLOURS:
            colour = word
        elif word in _SHAPES:
            return colour
    return None


def change_accuracy(hypotheses: Mapping[str, str], no_change_sentences: Iterable[str] | None = None) -> dict[str, float | int | None]:
    """Share of the pairs whose caption says rightly whether anything changed.

    A pair has no change where its id says so (`is_no_change_id`). A caption says "no change" where it is one of the data set's
    ``no_change_sentences`` (case, blanks and punctuation apart), or, where None are given, where `parse_change` reads it so.
    Returns ``accuracy``, ``change`` and ``no_change`` (the share on each kind, None where there is none), ``pairs``.
    Raises FastidcError where there are no captions.
    """
    if not hypotheses:
        raise FastidcError("there are no captions to judge; give at least one")
    known = None if no_change_sentences is None else {_words(sentence) for sentence in no_change_sentences}
    right: dict[bool, list[bool]] = {True: [], False: []}
    for pair, caption in hypotheses.items():
        says_none = parse_change(caption) == "none" if known is None else _words(caption) in known
        right[is_no_change_id(pair)].append(says_none == is_no_change_id(pair))
    return {
        "accuracy": _share(right[True] + right[False]),
        "change": _share(right[False]),
        "no_change": _share(right[True]),
        "pairs": len(hypotheses),
    }


def _share(values: list[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def type_confusion(hypotheses: Mapping[str, str], types: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Confusion matrix: true type -> type that the caption tells -> number of pairs.

    Rows and columns are the five types and "none", the columns also "unparsed". ``types``: id of a change pair -> type. No-change ids
    are in the row "none" without an entry; other ids without one are left out.
    Raises FastidcError for a type that is none of the five.
    """
    matrix = {kind: dict.fromkeys((*CHANGE_TYPES, "none", "unparsed"), 0) for kind in (*CHANGE_TYPES, "none")}
    for pair, caption in hypotheses.items():
        kind = "none" if is_no_change_id(pair) else types.get(pair)
        if kind is None:
            continue
        if kind not in matrix:
            raise FastidcError(f"type {kind!r} of {pair!r} is not one of {', '.join((*CHANGE_TYPES, 'none'))}; correct the type mapping")
        matrix[kind][parse_change(caption) or "unparsed"] += 1
    return matrix


def type_accuracy(hypotheses: Mapping[str, str], types: Mapping[str, str]) -> dict[str, float | int | dict | None]:
    """Share of the change pairs whose caption tells the right type: ``accuracy`` (None without such pairs), ``pairs``, ``unparsed``.

    ``types`` in the result: the share for each type that occurs, "none" for the no-change pairs, which are in no other figure.
    Raises FastidcError as `type_confusion` does.
    """
    matrix = type_confusion(hypotheses, types)
    sizes = {kind: sum(row.values()) for kind, row in matrix.items()}
    pairs = sum(sizes[kind] for kind in CHANGE_TYPES)
    return {
        "accuracy": sum(matrix[kind][kind] for kind in CHANGE_TYPES) / pairs if pairs else None,
        "pairs": pairs,
        "unparsed": sum(matrix[kind]["unparsed"] for kind in CHANGE_TYPES),
        "types": {kind: matrix[kind][kind] / size for kind, size in sizes.items() if size},
    }


def object_colour_accuracy(hypotheses: Mapping[str, str], true_colours: Mapping[str, str]) -> dict[str, float | int | None]:
    """How often the colour that a caption gives to the changed object is that object's colour.

    ``true_colours``: id -> colour of the object, before the change where it is one of colour. The pairs are the ids in both.
    Returns ``accuracy`` (right / captions that name a colour; None where none does), ``coverage`` (those / pairs), ``named``, ``pairs``.
    A caption may rightly name no colour, so the accuracy says nothing without the coverage.
    Raises FastidcError where no id is in both, and for a colour that is none of CLEVR's eight.
    """
    pairs = [pair for pair in hypotheses if pair in true_colours]
    if not pairs:
        raise FastidcError("no caption has an object colour to compare with; give both under the same ids")
    told = {pair: colour for pair in pairs if (colour := object_colour(hypotheses[pair])) is not None}
    truth = {pair: _words(true_colours[pair]) for pair in pairs}
    for pair, colour in truth.items():
        if colour not in COLOURS:
            raise FastidcError(f"colour {true_colours[pair]!r} of {pair!r} is not one of {', '.join(COLOURS)}")
    right = [truth[pair] == colour for pair, colour in told.items()]
    return {"accuracy": _share(right), "coverage": len(told) / len(pairs), "named": len(told), "pairs": len(pairs)}
