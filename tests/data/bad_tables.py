"""As `bad_annotations`, of tables of one's own pairs."""

import os
from pathlib import Path

from bad_annotations import DEEP, DIGITS, LONG, Bad, changed, endless, in_its_place, replaced, text

HEAD, GOOD = "id,before,after,caption,split", "p,p1.png,p2.png,the p is gone,train"


def tables() -> list[Bad]:
    csv, tsv, jsonl = "pairs.csv", "pairs.tsv", "pairs.jsonl"
    found = [
        ("csv", csv, "semicolons", text(f"{HEAD}\n{GOOD}\n".replace(",", ";")), (csv, "line 1", "separated by ';'; use commas")),
        (
            "csv",
            csv,
            "tabs",
            text(f"{HEAD}\n{GOOD}\n".replace(",", "\t")),
            (csv, "line 1", "separated by tabs; use commas, or call the file .tsv"),
        ),
        ("tsv", tsv, "commas", text(f"{HEAD}\n{GOOD}\n"), (tsv, "line 1", "separated by ','; use tabs, or call the file .csv")),
        ("csv", csv, "empty", text(""), (csv, "line 1", "has no field 'before'")),
        ("csv", csv, "header alone", text(f"{HEAD}\n"), (csv, "has no pairs")),
        ("csv", csv, "unknown column", text(f"{HEAD},title\n{GOOD},x\n"), (csv, "line 1, field 'title' is unknown")),
        ("csv", csv, "column twice", text(f"{HEAD},id\n{GOOD},x\n"), (csv, "line 1", "has the field 'id' twice")),
        ("csv", csv, "mixed columns", text(f"{HEAD},captions\n{GOOD},x\n"), (csv, "line 1", "both fields 'caption' and 'captions'")),
        (
            "csv",
            csv,
            "distractor alone",
            text(f"{HEAD},distractor\n{GOOD},p1.png\n"),
            (csv, "both fields 'distractor' and 'no_change_captions'"),
        ),
        ("csv", csv, "cells", text(f"{HEAD}\n{GOOD}\nq,q1.png,q2.png,a car, gone,train\n"), (csv, "line 3", "has 6 cells")),
        ("csv", csv, "open quote", text(f'{HEAD}\n{GOOD}\nq,q1.png,q2.png,"open,train\n'), (csv, "line 3", "cannot be read as CSV")),
        ("csv", csv, "huge cell", text(f"{HEAD}\n{GOOD}\nq,q1.png,q2.png,{'x' * 200_000},train\n"), (csv, "line 3", "field larger")),
        ("csv", csv, "long sentence", replaced("the q is gone", LONG), None),
        ("csv", csv, "in two splits", text(f"{HEAD}\n{GOOD}\n{GOOD[:-5]}test\n"), (csv, "line 3, field 'split' is 'test'", "line 2")),
        ("csv", csv, "other images", text(f"{HEAD}\n{GOOD}\n{GOOD.replace('p2', 'q2')}\n"), (csv, "line 3, field 'after'", "line 2")),
        ("csv", csv, "bom", changed(lambda data: b"\xef\xbb\xbf" + data), None),
        ("csv", csv, "utf-16", changed(lambda data: data.decode().encode("utf-16")), (csv, "cannot be read as UTF-8", "save it as UTF-8")),
        ("csv", csv, "bad utf-8", changed(lambda data: data + b"\xe9"), (csv, "cannot be read as UTF-8")),
        ("csv", csv, "carriage returns", changed(lambda data: data.replace(b"\r\n", b"\r")), None),
        ("csv", csv, "control signs", replaced("the q is gone", "a\x1b[2J\u2028b"), None),
        ("csv", csv, "endless", endless, (csv, "1,073,741,825 bytes, more than")),
        ("csv", csv, "folder", in_its_place(Path.mkdir), ("pairs.csv", "was expected, found none")),
        ("csv", csv, "pipe", in_its_place(os.mkfifo), ("pairs.csv", "was expected, found none")),
        ("csv", csv, "folder for an image", replaced("q1.png", "."), None),
    ]
    outside = "which leaves"
    for name, path, says in (
        ("up", "../q1.png", outside),
        ("up and down", "x/../../q1.png", outside),
        ("absolute", "/etc/passwd", outside),
        ("root", "/", outside),
        ("nul", "q\0.png", "no file can be called so"),
        ("absent folder", "x/y/q1.png", "image is missing"),
        ("very long", "x" * 5000, "image is missing"),
        ("very long folder", "x" * 5000 + "/q1.png", "image is missing"),
        ("half signs", "\ud800/q.png", None),
    ):
        told = (
            (csv, "cannot be read as UTF-8")
            if says is None
            else (csv, "line 3, field 'before'", says)
            if says != "image is missing"
            else (says, csv, "line 3, field 'before'")
        )
        found.append(("csv", csv, f"path {name}", replaced("q1.png", path), told))
    found.append(("csv", csv, "path up and back", replaced("q1.png", "x/../q1.png"), None))
    line = '{"id": "q", "before": "q1.png", "after": "q2.png", "caption": "x", "split": "train"}'
    for name, new, says in (
        ("truncated", line[:-1], ("line 2", "cannot be read as JSON")),
        ("deep", DEEP, ("line 2", "nested too deep")),
        ("digits", DIGITS, ("line 2", "4300 digits")),
        ("list", "[]", ("line 2", "must be an object")),
        ("NaN", "NaN", ("line 2", "must be an object")),
        ("key twice", line.replace('"id": "q"', '"id": "p", "id": "q"'), ("line 2, field 'id'", "stands twice")),
        ("unknown key", line.replace('"id"', '"uid"'), ("line 2, field 'uid' is unknown")),
        ("caption list", line.replace('"x"', '["x"]'), ("line 2, field 'caption'", "must be one sentence, got a list")),
        ("caption NaN", line.replace('"x"', "NaN"), ("line 2, field 'caption'", "must be one sentence, got a float")),
        ("captions text", line.replace('"caption"', '"captions"'), ("line 2, field 'captions'", "non-empty list")),
        ("captions number", line.replace('"caption": "x"', '"captions": ["x", 1]'), ("line 2, field 'captions'[1]",)),
        ("both", line.replace('"caption": "x"', '"captions": ["x"], "caption": "x"'), ("line 2", "both fields")),
        ("path list", line.replace('"q1.png"', '["q1.png"]'), ("line 2, field 'before'", "must be text, got a list")),
        ("path object", line.replace('"q1.png"', '{"a": 1}'), ("line 2, field 'before'", "must be text, got a dict")),
        ("path null", line.replace('"q1.png"', "null"), ("line 2, field 'before'", "is empty")),
        ("path true", line.replace('"q1.png"', "true"), ("line 2, field 'before'", "must be text")),
        ("split list", line.replace('"train"', '["train"]'), ("line 2, field 'split'", "must be text")),
        ("split other", line.replace('"train"', '"dev"'), ("line 2, field 'split' is 'dev'",)),
        ("half", '{"before": "q1.png", "caption": "x"}', ("line 2", "has no field 'after'")),
        (
            "nul",
            '{"before": "q\\u0000", "after": "q2.png", "caption": "x", "id": "q", "split": "val"}',
            ("line 2, field 'before'", "no file can be called so"),
        ),
        ("separators", line.replace('"x"', '"a\u2028b\u2029c\x85d"'), None),
    ):
        says = None if says is None else (jsonl, *((says,) if isinstance(says, str) else says))
        found.append(
            ("jsonl", jsonl, name, lambda tree, path, new=new: path.write_text("\n".join([path.read_text().split("\n")[0], new, ""])), says)
        )
    return [Bad(*case) for case in found]


CASES = tables()
