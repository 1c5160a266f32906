"""Values, texts and bytes with something in them another one, drawn at random."""

import random
from typing import Any

JUNK = [
    None,
    True,
    -1,
    3,
    10**30,
    1.5,
    float("nan"),
    "",
    " ",
    "x",
    "../../x",
    "\ud800",
    "a\u2028b",
    "\x00",
    [],
    {},
    ["x"],
    [1],
    [""],
    {"a": 1},
    "word " * 90,
]


def spoilt(value, rng):
    """``value`` with one thing in it another one, gone, twice, or of another name."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        action = rng.random()
        if action < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if action < 0.2:
            return {(f"{k}x" if k == key else k): v for k, v in value.items()}
        return value | {key: spoilt(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        action = rng.random()
        if action < 0.1:
            return value[:index] + value[index + 1 :]
        if action < 0.25:
            return [*value, value[index]]
        return [*value[:index], spoilt(value[index], rng), *value[index + 1 :]]
    return rng.choice(JUNK)


def spoilt_text(text, rng):
    """A table or JSON with some of its characters others, or gone."""
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice(["", ",", '"', "\n", "\t", "{", "\u2028", "\x00", "é", "p"]) + text[place + rng.randint(0, 2) :]
    return text


PIECES = [
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\r", b"\n", b"\r\n", b"\t", b",", b";", b"|", b'"', b'""',
    b"\\", b"\\u0000", b"\\ud800", b"\\u2028", b"{", b"}", b"[", b"]", b"{}", b"[]", b":", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"0",
    b"9" * 400, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"../", b"/", b"/etc/passwd", b"..", b".", b"x" * 300, b"x" * 140_000, b"\x1b[2J",
]  # fmt: skip


def spoilt_bytes(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """``data`` with one to four changes: bits, pieces put in, taken out, repeated or from ``other``, lines in another order, an end that is missing."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.choice((1, 2, 8, 64)))
        match rng.randrange(8):
            case 0:
                data = data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]
            case 1:
                data = data[:at] + rng.choice(PIECES) + data[at:]
            case 2:
                data = data[:at] + rng.choice(PIECES) + data[to:]
            case 3:
                data = data[:at] + data[to:]
            case 4:
                data = data[:to] + data[at:to] * rng.choice((1, 1, 50)) + data[to:]
            case 5:
                data = data[:at]
            case 6:
                start = rng.randrange(len(other) + 1)
                data = data[:at] + other[start : start + 64] + data[at:]
            case 7:
                lines = data.split(b"\n")
                rng.shuffle(lines)
                data = b"\n".join(lines)
    return data


def spoilt_deeply(value: Any, rng: random.Random) -> Any:
    """`spoilt`, once to three times over."""
    for _ in range(rng.randint(1, 3)):
        value = spoilt(value, rng)
    return value
