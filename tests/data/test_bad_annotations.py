"""Every case of `bad_annotations` is read, where it is legal, or refused with its file, its place and its field; and nothing waits for a pipe."""

import os
import signal

import bad_annotations
import bad_tables
import check_cases
import pytest
from bad_annotations import DATASET, Bad

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc.data.check import check
from fastidc.data.records import load_records, recognise
from fastidc.errors import FastidcError

CASES = [*bad_annotations.CASES, *bad_tables.CASES]


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """What is imported once is no case's time."""
    check(check_cases.table(tmp_path_factory.mktemp("warm")), how="none", progress=False)


@pytest.fixture(autouse=True)
def in_time(warm):
    """Whatever waits for ever fails."""

    def late(*args):
        raise TimeoutError("this took more than 60 seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def refusal(run, *args, **kwargs) -> str:
    try:
        run(*args, **kwargs)
    except FastidcError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_annotations(tmp_path, case: Bad):
    tree, kind = case.make(tmp_path / "own"), DATASET.get(case.kind, case.kind)
    said = refusal(load_records, tree, kind)
    assert said.isprintable()
    assert len(said) < 2000
    if case.says is None:
        assert not said
    else:
        place = 0
        for part in case.says:
            assert part in said[place:], said
            place = said.index(part, place)
    refusal(recognise, tree)
    found = []
    if not refusal(lambda: found.append(check(tree, kind, how="none", progress=False))):
        assert found[0].code or not said, "the check passes what the reader refuses"


def test_there_are_cases_of_every_kind():
    assert len(CASES) >= 60
    assert {case.kind for case in CASES} == set(bad_annotations.MAKERS) - {"table"}


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pairs.csv")
    assert "is a pipe, a socket or a device" in refusal(load_records, tmp_path / "pairs.csv")
    assert "is a pipe, a socket or a device" in refusal(load_records, tmp_path / "pairs.csv", "table")
    assert "is a pipe, a socket or a device" in refusal(load_records, "/dev/zero", "birds")
    tree = bad_annotations.MAKERS["folder"](tmp_path / "own")
    (tree / "captions.json").unlink()
    os.mkfifo(tree / "7.txt")
    assert "7.txt: cannot be read as UTF-8 text (it is a pipe" in refusal(load_records, tree, "folder")


def test_paths_that_leave_have_a_way_out(tmp_path):
    """--images names the folder that paths count from and stay in; links in it lead where their owner wants."""
    tree = bad_annotations.MAKERS["csv"](tmp_path / "own")
    table, text = tree / "pairs.csv", (tree / "pairs.csv").read_text()
    whole = load_records(table)
    (tmp_path / "tables").mkdir()
    elsewhere = tmp_path / "tables" / "pairs.csv"
    elsewhere.write_text(text.replace("p1.png", str(tree / "p1.png")))
    assert "which leaves" in refusal(load_records, elsewhere)
    assert "name it with --images" in refusal(load_records, elsewhere)
    assert load_records(elsewhere, images=tree) == whole
    elsewhere.write_text(text.replace("p1.png", "../other/p1.png"))
    assert "which leaves" in refusal(load_records, elsewhere, images=tree)
    (tree / "far").symlink_to(tmp_path / "tables")
    (tree / "p1.png").rename(tmp_path / "tables" / "p1.png")
    table.write_text(text.replace("p1.png", "far/p1.png"))
    assert load_records(table)["train"][0].before == tree / "far" / "p1.png"
    table.write_text(text.replace("p1.png", "far/../p1.png"))
    assert "own/p1.png: image is missing" in refusal(load_records, table), "not that beside the link's end"
