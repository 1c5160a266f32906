"""Sentences of our own for the evaluation tests, and the way to the real annotation files where they lie."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from worlds import NO_CHANGE

COLOURS = ["gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow"]
RELATIONS = [
    "left of",
    "to the left of",
    "on the left side of",
    "right of",
    "to the right of",
    "on the right side of",
    "behind",
    "in front of",
]
EVENTS = {
    "color": [f"{verb} {colour}" for verb in ("changed to", "turned", "became") for colour in COLOURS],
    "material": [
        f"{verb} {value}" for verb in ("changed to", "turned", "became") for value in ("rubber", "matte", "metal", "metallic", "shiny")
    ],
    "add": ["has appeared", "has been newly placed", "has been added"],
    "drop": ["has disappeared", "is missing", "is gone", "is no longer there"],
    "move": ["changed its location", "is in a different location", "was moved", "has been moved"],
}


class Grammar:
    """Captions of the CLEVR-Change grammar (data_evaluation.md 2.2), drawn from a seed."""

    def __init__(self, seed=0):
        self.random = random.Random(seed)
        self.no_change, self.colours, self.types = NO_CHANGE, COLOURS, list(EVENTS)

    def thing(self, colour=None):
        size = self.random.choice(["", "large", "big", "small", "tiny"])
        colour = self.random.choice(["", *COLOURS]) if colour is None else colour
        material = self.random.choice(["", "metallic", "metal", "shiny", "rubber", "matte"])
        shape = self.random.choice(["thing", "object", "sphere", "ball", "cube", "block", "cylinder"])
        return " ".join(word for word in ("the", size, colour, material, shape) if word)

    def reference(self, colour=None):
        if self.random.random() < 0.4:
            return self.thing(colour)
        that_is = self.random.choice(["", "that is "])
        return f"{self.thing(colour)} {that_is}{self.random.choice(RELATIONS)} {self.thing()}"

    def change(self, kind, colour=None):
        return f"{self.reference(colour)} {self.random.choice(EVENTS[kind])}"

    def data(self, scenes):
        """(references, hypotheses, types) of `scenes` scenes: a change pair and a no-change pair each."""
        references, hypotheses, types = {}, {}, {}
        for number in range(scenes):
            name, kind = f"{number:06d}.png", self.types[number % 5]
            types[name] = kind
            references[name] = [self.change(kind) for _ in range(self.random.randint(4, 9))]
            references[name + "_n"] = self.random.sample(NO_CHANGE, 6)
            hypotheses[name] = self.random.choice([references[name][0], self.change(kind), self.change("drop"), NO_CHANGE[0]])
            hypotheses[name + "_n"] = self.random.choice([NO_CHANGE[1], NO_CHANGE[5], self.change("move")])
        return references, hypotheses, types


@pytest.fixture
def grammar():
    return Grammar()


@pytest.fixture(scope="session")
def clevr():
    return Grammar(7).data(20)


@pytest.fixture(scope="session")
def java():
    if shutil.which("java") is None:
        pytest.skip("there is no java on PATH: install a Java runtime (apt-get install default-jre-headless)")
    return shutil.which("java")


def _real_data():
    folder = Path(os.environ.get("FASTIDC_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"the real annotation files are not at {folder}; name their folder in FASTIDC_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def real_folder():
    return _real_data()


@pytest.fixture(scope="session")
def spot_test():
    """Spot-the-Diff's test references, id -> sentences, merged as the official reader does."""
    references = {}
    for entry in json.loads((_real_data() / "spot_the_diff" / "test.json").read_text()):
        references.setdefault(f"{entry['img_id']}.png", []).extend(entry["sentences"])
    return references


@pytest.fixture(scope="session")
def real_sentences():
    """All 28,788 sentences of Spot-the-Diff and Image-Editing-Request."""
    folder, sentences = _real_data(), []
    for name, field, files in (("spot_the_diff", "sentences", "train val test"), ("image_editing_request", "sents", "train valid test")):
        for split in files.split():
            for entry in json.loads((folder / name / f"{split}.json").read_text()):
                sentences += entry[field]
    return sentences
