"""A maker of bad annotation files; tables have their own in `bad_tables`: each case is a clean data set of `check_cases` with one thing spoilt, and what must be said of it."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import check_cases

LONG = "word " * 2000
DEEP = "[" * 100_000
DIGITS = "9" * 5000


@dataclass(frozen=True)
class Bad:
    """``says``: what its error must hold, in this order; None where the file is legal. ``spoil(tree, path)``: the data set's folder and the file."""

    kind: str
    file: str
    name: str
    spoil: Callable[[Path, Path], Any]
    says: tuple[str, ...] | None

    def make(self, root: Path) -> Path:
        tree = MAKERS[self.kind](root)
        self.spoil(tree, tree / self.file)
        return tree

    def __str__(self) -> str:
        return f"{self.kind}-{self.file}-{self.name}"


MAKERS: dict[str, Callable[[Path], Path]] = {
    **check_cases.WORLDS,
    "csv": check_cases.table,
    "tsv": lambda root: check_cases.table(root, "tsv"),
    "jsonl": lambda root: check_cases.table(root, "jsonl"),
}
DATASET = {"csv": "table", "tsv": "table", "jsonl": "table"}
"""Kind of a case -> --dataset, where the two differ."""


def text(content: str) -> Callable:
    return lambda tree, path: path.write_text(content, encoding="utf-8", errors="surrogatepass")


def raw(content: bytes) -> Callable:
    return lambda tree, path: path.write_bytes(content)


def changed(change: Callable[[bytes], bytes]) -> Callable:
    return lambda tree, path: path.write_bytes(change(path.read_bytes()))


def replaced(old: str, new: str) -> Callable:
    def change(data: bytes) -> bytes:
        assert old.encode() in data, (old, data)
        return data.replace(old.encode(), new.encode("utf-8", "surrogatepass"), 1)

    return changed(change)


def edited(change: Callable[[Any], Any]) -> Callable:
    return lambda tree, path: path.write_text(json.dumps(change(json.loads(path.read_text()))))


def in_its_place(make: Callable[[Path], Any]) -> Callable:
    def spoil(tree: Path, path: Path) -> None:
        path.unlink()
        make(path)

    return spoil


def endless(tree: Path, path: Path) -> None:
    with path.open("wb") as file:
        file.truncate((1 << 30) + 1)  # of holes


def of_any_json(kind: str, file: str, needed: bool = True) -> list[Bad]:
    """What may happen to every file that is JSON. needed: an absent one is an error of its own."""
    cases = [
        ("empty", text(""), (file, "cannot be read as JSON")),
        ("blank", text(" \n"), (file, "cannot be read as JSON")),
        ("truncated", changed(lambda data: data[: len(data) // 2]), (file, "cannot be read as JSON")),
        ("deep", text(DEEP), (file, "cannot be read as JSON", "nested too deep")),
        ("digits", text(DIGITS), (file, "cannot be read as JSON", "4300 digits")),
        ("utf-16", changed(lambda data: data.decode().encode("utf-16")), (file, "cannot be read as JSON", "save it as UTF-8")),
        ("bad utf-8", changed(lambda data: data[:1] + b"\xe9" + data[1:]), (file, "cannot be read as JSON", "save it as UTF-8")),
        ("nul", changed(lambda data: data[:1] + b"\0" + data[1:]), (file, "cannot be read as JSON")),
        ("two values", changed(lambda data: data + data), (file, "cannot be read as JSON")),
        ("bom", changed(lambda data: b"\xef\xbb\xbf" + data), None),
        ("null", text("null"), (file, "must be")),
        ("number", text("NaN"), (file, "must be")),
        ("string", text('"x"'), (file, "must be")),
        ("endless", endless, (file, "cannot be read as JSON", "1,073,741,825 bytes, more than")),
        ("link to itself", in_its_place(lambda path: path.symlink_to(path)), (file,) if needed else None),
        ("folder", in_its_place(Path.mkdir), (file,) if needed else None),
        ("pipe", in_its_place(os.mkfifo), (file,) if needed else None),
    ]
    return [Bad(kind, file, name, spoil, says) for name, spoil, says in cases]


KEY = "CLEVR_default_000001.png"


def clevr() -> list[Bad]:
    splits, captions, types = "splits.json", "change_captions.json", "type_mapping.json"
    cases = [
        (splits, "list", text("[]"), (splits, "must be an object")),
        (splits, "half", edited(lambda s: {"train": s["train"]}), (splits, '"train", "val" and "test"')),
        (splits, "key twice", replaced('"val"', '"val": [9], "val"'), (splits, "field 'val'", "stands twice")),
        (
            splits,
            "in two splits",
            edited(lambda s: s | {"val": [2, 7]}),
            (splits, "val[1]", "is scene 7, which stands already at train[2]"),
        ),
        *(
            (splits, f"id {v!r}"[:20], edited(lambda s, v=v: s | {"val": [v]}), (splits, "val[0]", "scene number"))
            for v in (None, True, -1, 1.5, "../2", [], {}, float("nan"), float("inf"))
        ),
        (splits, "huge id", edited(lambda s: s | {"val": [10**400]}), (captions, "has no field", "10000")),
        (captions, "list", text("[]"), (captions, "must be an object")),
        (captions, "key twice", replaced(f'"{KEY}"', f'"{KEY}": ["x"], "{KEY}"'), (captions, KEY, "stands twice")),
        (captions, "absent", edited(lambda t: {k: v for k, v in t.items() if k != KEY}), (captions, "has no field", KEY, "train[1]")),
        (captions, "path", edited(lambda t: {("../" + k if k == KEY else k): v for k, v in t.items()}), (captions, "has no field", KEY)),
        (captions, "no list", edited(lambda t: t | {KEY: "x"}), (captions, KEY, "non-empty list of sentences, got a str")),
        (captions, "a number", edited(lambda t: t | {KEY: ["x", 3]}), (captions, KEY, "[1]", "got 3")),
        (captions, "NaN", edited(lambda t: t | {KEY: [float("nan")]}), (captions, KEY, "[0]", "got nan")),
        (captions, "blank", edited(lambda t: t | {KEY: ["x", " "]}), (captions, KEY, "[1]", "must be a sentence")),
        (captions, "long", edited(lambda t: t | {KEY: [LONG]}), None),
        (captions, "control signs", edited(lambda t: t | {KEY: ["a\x00b\u2028c\x1b[2J\r\nd"]}), None),
        (captions, "unknown keys", edited(lambda t: t | {"note": ["x"]}), None),
        (types, "list", text("[]"), (types, "must be an object")),
        (types, "a number", edited(lambda t: {"color": 3}), (types, "must be an object of change type")),
        (types, "names", edited(lambda t: {"color": [3]}), (types, "field 'color'[0]", "got 3")),
    ]
    return [Bad("clevr", *case) for case in cases] + of_any_json("clevr", splits) + of_any_json("clevr", captions)


def put(index: int, **fields: Any) -> Callable:
    return edited(lambda rows: [*rows[:index], rows[index] | fields, *rows[index + 1 :]])


def spot() -> list[Bad]:
    train = "train.json"
    cases = [
        ("object", edited(lambda t: {"x": t}), (train, "must be a list of objects, got a dict")),
        ("text", edited(lambda t: [*t, "x"]), (train, "[2]", "must be an object", "got a str")),
        ("halves missing", edited(lambda t: [t[0], {"img_id": "9"}]), (train, "[1]", "has no field 'sentences'")),
        ("key twice", replaced('"img_id": "9"', '"img_id": "8", "img_id": "9"'), (train, "[1], field 'img_id'", "stands twice")),
        ("in two splits", put(1, img_id="31"), ("val.json", "[0]", "has the id '31.png'", train, "[1]")),
        ("image missing", put(1, img_id="77"), ("77.png: image is missing", train, "[1], field 'img_id'")),
        *(
            (f"id {v!r}"[:20], put(1, img_id=v), (train, "[1]", "field 'img_id'"))
            for v in (None, True, 1.5, "", " ", [], {}, "../9", "/etc/9", "a/9", "9\0", "..", float("nan"))
        ),
        ("huge id", put(1, img_id=10**400), (train, "[1]", "img_id", "image is missing")[:2]),
        *(
            (f"sentences {v!r}"[:20], put(1, sentences=v), (train, "[1], field 'sentences'"))
            for v in (None, "x", [], {}, 3, ["x", None], [["x"]], [float("inf")])
        ),
        ("blank", put(1, sentences=["x", ""]), None),
        ("long", put(1, sentences=[LONG]), None),
        ("control signs", put(1, sentences=["a\x00b\u2028c\x1b[2J\r\nd"]), None),
        ("unknown key", put(1, note={"deep": [[]]}), None),
        ("empty list", text("[]"), None),
    ]
    return [Bad("spot", train, *case) for case in cases] + of_any_json("spot", train, needed=False)


def ier() -> list[Bad]:
    train = "train.json"
    cases = [
        ("id twice", put(1, uid="Z_2"), (train, "[1]", "has the id 'Z_2'", "[0]")),
        *((f"uid {v!r}", put(1, uid=v), (train, "[1], field 'uid'")) for v in (None, "", [], {}, 1.5)),
        *(
            (f"img0 {v!r}", put(1, img0=v), (train, "[1], field 'img0'"))
            for v in (None, "", 3, [], {}, "../images/a.jpg", "/etc/passwd", "x/a.jpg", "a\0.jpg", ".", "..")
        ),
        ("absent", put(1, img1="zz.jpg"), ("zz.jpg: image is missing", train, "[1], field 'img1'")),
        ("capitals", put(1, img0="A.jpg"), ("A.jpg: image is missing", "capitals differ")),
        ("very long name", put(1, img0="x" * 5000), (train, "[1], field 'img0'")),
        ("half signs", put(1, img0="\ud800.jpg"), ("image is missing", train, "[1], field 'img0'")),
        *((f"sents {v!r}", put(1, sents=v), (train, "[1], field 'sents'")) for v in (None, "x", [], 3, [1])),
        ("half", edited(lambda t: [t[0], {"uid": "x", "img0": "a.jpg", "sents": ["x"]}]), (train, "[1]", "has no field 'img1'")),
    ]
    return [Bad("ier", train, *case) for case in cases]


BIRDS = "birds-to-words-v1.0.tsv"


def birds() -> list[Bad]:
    url = "https://static.inaturalist.org/photos/11/large.jpg?141"
    cases = [
        ("split", replaced("\tval\t", "\tdev\t"), (BIRDS, "line 3, field 'split' is 'dev'")),
        ("cells", replaced("\tval\t1", "\tval"), (BIRDS, "line 3", "has 10 cells, but line 1 names 11 fields")),
        ("no url", replaced(url, ""), (BIRDS, "line 3, field 'img1ImgURL'", "URL of a photograph")),
        ("broken url", replaced(url, "http://["), (BIRDS, "line 3, field 'img1ImgURL'", "URL of a photograph")),
        ("url that leaves", replaced(url, "http://x/.."), (BIRDS, "line 3, field 'img1ImgURL' is '..'", "without folders")),
        ("url with a nul", replaced(url, "http://x/a%00b.jpg"), (BIRDS, "line 3, field 'img1ImgURL'", "no file can be called so")),
        (
            "in two splits",
            changed(lambda data: data + data.splitlines()[1].replace(b"\ttrain\t", b"\ttest\t")),
            (BIRDS, "line 5", "has the id '64-55'", "line 2"),
        ),
        ("other columns", replaced("annN", "annotation"), (BIRDS, "line 1", "names")),
        ("column twice", replaced("annN", "split"), (BIRDS, "line 1", "names")),
        ("blank sentence", replaced("It has a cap.", " "), None),
        ("quotes", replaced("It has a cap.", '"It has a "cap".'), None),
        ("long", replaced("It has a cap.", "x" * 200_000), (BIRDS, "line 3", "cannot be read as TSV", "field larger")),
        ("bad utf-8", changed(lambda data: data + b"\xe9"), (BIRDS, "cannot be read as UTF-8")),
        ("bom", changed(lambda data: b"\xef\xbb\xbf" + data), None),
        ("utf-16", changed(lambda data: data.decode().encode("utf-16")), ("one .tsv with the columns", "found none")),
        ("empty", text(""), ("one .tsv with the columns", "found none")),
        ("commas", changed(lambda data: data.replace(b"\t", b",")), ("one .tsv with the columns", "found none")),
        ("pipe", in_its_place(os.mkfifo), ("found none",)),
        ("folder", in_its_place(Path.mkdir), ("found none",)),
    ]
    return [Bad("birds", BIRDS, *case) for case in cases]


def folder() -> list[Bad]:
    captions, splits = "captions.json", "splits.json"
    cases = [
        (captions, "list", text("[]"), (captions, "must be an object of id")),
        (captions, "key twice", replaced('"7"', '"7": "x", "7"'), (captions, "field '7' stands twice")),
        *(
            (captions, f"value {v!r}", edited(lambda t, v=v: t | {"7": v}), (captions, "field '7'"))
            for v in (None, 3, {}, [], [1], [None], [["x"]], float("nan"))
        ),
        (captions, "blank", edited(lambda t: t | {"7": " "}), None),
        (captions, "long", edited(lambda t: t | {"7": LONG}), None),
        *(
            (captions, f"id {v!r}", edited(lambda t, v=v: t | {v: "x"}), (captions, "field", says))
            for v, says in (
                ("../7", "without folders"),
                ("/7", "without folders"),
                ("..", "without folders"),
                ("7\0", "no file can be called so"),
                ("", "no file can be called so"),
            )
        ),
        (captions, "no image", edited(lambda t: t | {"8": "x"}), ("splits.json", "id '8'", "is in no split")),
        (
            captions,
            "not captioned",
            edited(lambda t: {k: v for k, v in t.items() if k != "7"}),
            (splits, "val[0]", "'7', which has no captions"),
        ),
        (splits, "list", text("[]"), (splits, "must be an object of split")),
        (splits, "other split", edited(lambda s: s | {"dev": []}), (splits, "field 'dev' is no split")),
        (splits, "key twice", replaced('"val"', '"val": [], "val"'), (splits, "field 'val' stands twice")),
        (splits, "text", edited(lambda s: s | {"val": "7"}), (splits, "field 'val' must be a list of ids")),
        (splits, "in two", edited(lambda s: s | {"train": ["10", "7"]}), (splits, "val[0]", "stands already at train[1]")),
        *(
            (splits, f"id {v!r}"[:20], edited(lambda s, v=v: s | {"val": [v]}), (splits, "val[0]", "which has no captions"))
            for v in (None, True, 1.5, [], {}, "../7", float("nan"))
        ),
    ]
    return [Bad("folder", *case) for case in cases] + of_any_json("folder", splits, needed=False)


CASES = [*clevr(), *spot(), *ier(), *birds(), *folder()]
