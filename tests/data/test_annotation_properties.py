"""Annotations in which anything stands anywhere, as hypothesis thinks of it: they are read, or refused by a sentence that names the file."""

import json
from pathlib import Path

import check_cases
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastidc.data.records import load_records
from fastidc.errors import FastidcError

FIELDS = [
    "img_id",
    "sentences",
    "uid",
    "img0",
    "img1",
    "sents",
    "train",
    "val",
    "test",
    "color",
    "000003.png",
    "before",
    "after",
    "caption",
    "",
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["../a.png", "/etc/passwd", "a\x00b", "\u2028", "a.jpg"])
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(), inner, max_size=4),
    max_leaves=12,
)
FILES = {
    "clevr": ("splits.json", "change_captions.json", "no_change_captions.json", "type_mapping.json"),
    "spot": ("train.json", "test.json"),
    "ier": ("train.json", "valid.json"),
    "folder": ("captions.json",),
}
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@st.composite
def changed(draw, value):
    """``value`` with something else in one place, perhaps in all."""
    if isinstance(value, (list, dict)) and value and draw(st.integers(0, 3)):
        places = list(value) if isinstance(value, dict) else list(range(len(value)))
        place = draw(st.sampled_from(places))
        new = value.copy()
        new[place] = draw(changed(value[place]))
        return new
    return draw(ANYTHING)


def tree_of(kind: str, root: Path) -> Path:
    tree = getattr(check_cases, kind)(root)
    if kind == "folder":
        for text in tree.glob("*.txt"):
            text.unlink()
        (tree / "captions.json").write_text(json.dumps({"10": ["a car left"], "7": "a van came", "5": ["a dog"]}))
    return tree


def refusal_of(tree: Path, kind: str) -> str:
    try:
        load_records(tree, kind)
    except FastidcError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, files in FILES.items() for file in files])
def test_anything_anywhere(tmp_path, kind, file):
    path = tree_of(kind, tmp_path / "own") / file
    whole = json.loads(path.read_text())
    refused = []

    @settings(max_examples=60, deadline=None, suppress_health_check=QUIET, derandomize=True, database=None)
    @example([])
    @given(changed(whole))
    def judge(value) -> None:
        path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
        said = refusal_of(path.parent, kind)
        assert "\n" not in said
        assert not said or path.name in said or str(path.parent) in said
        refused.extend(filter(None, [said]))

    judge()
    assert len(refused) > 3, "nothing was spoilt"
