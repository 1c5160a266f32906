"""What a user reads first: every command's --help fits a screen and shows an example, and no flag is lost for it."""

import re

import pytest

from fastidc.cli import COMMANDS, main
from fastidc.commands.flags import flags_of

LINES, COLUMNS = 40, 80
COMMAND_LINES = [
    [name, action] if action else [name] for name, held in COMMANDS.items() for action in ("", *(held if isinstance(held, dict) else ()))
]
SHORT = {name: run for name, run in COMMANDS.items() if hasattr(run, "common")}


def shown(capsys, monkeypatch, *argv):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    assert ended.value.code == 0
    return capsys.readouterr().out


def rows(text):
    """Of a terminal, which breaks a line that is too long."""
    return sum(max(1, -(-len(line) // COLUMNS)) for line in text.rstrip("\n").split("\n"))


@pytest.mark.parametrize("line", [[], *COMMAND_LINES], ids=lambda line: " ".join(line) or "fastidc")
def test_help_fits_a_screen_and_shows_an_example(line, capsys, monkeypatch):
    text = shown(capsys, monkeypatch, *line, "--help")
    assert rows(text) <= LINES, f"{' '.join(line)} --help has {rows(text)} lines of {COLUMNS} columns"
    if line:
        assert re.search(rf"Example: .*\bfastidc {' '.join(line)}\b", " ".join(text.split())), "an example of the command itself"


def test_every_command_is_listed_with_its_first_sentence(capsys, monkeypatch):
    text = " ".join(shown(capsys, monkeypatch, "--help").replace("│", " ").split())
    for name, held in COMMANDS.items():
        assert f"• {name} " in text
        if not isinstance(held, dict):
            assert " ".join(held.__doc__.split("\n\n")[0].split()) in text
    assert "Exit codes" not in text, "the rest belongs to the command's own help"


@pytest.mark.parametrize("name", ["caption", "check", "search"])
def test_exit_codes_are_told_where_there_are_more_than_two(name, capsys, monkeypatch):
    assert re.search(r"Exit codes?: 0 .*1 .*2 ", shown(capsys, monkeypatch, name, "--help"))


@pytest.mark.parametrize("name", SHORT)
def test_a_short_help_says_where_the_rest_is(name, capsys, monkeypatch):
    short, whole = (shown(capsys, monkeypatch, name, flag) for flag in ("--help", "--help-all"))
    assert f"All flags: fastidc {name} --help-all" in short
    assert short == shown(capsys, monkeypatch, name, "-h")
    assert rows(whole) > rows(short)
    for flag in flags_of(COMMANDS[name]):
        option = flag.options[0]
        assert bool(re.search(rf"^[│ ] {option}\b", whole, re.MULTILINE)), option
        assert bool(re.search(rf"^[│ ] {option}\b", short, re.MULTILINE)) == (flag.name in COMMANDS[name].common), option


def test_there_are_short_helps():
    assert set(SHORT) >= {"adapt", "finetune"}


def test_flags_that_help_leaves_out_still_work(tmp_path, capsys):
    """The parser knows all flags: a wrong value of a hidden one is refused by its own sentence."""
    line = ["adapt", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--dataset", "clevr", "--preset", "tiny"]
    assert main([*line, "--max-words", "2"]) == 2
    assert "--max-words must be at least 3" in capsys.readouterr().err
    assert main([*line, "--micro_batch", "0"]) == 2
    assert "--micro-batch must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*line, "--no-such-flag"])
    assert ended.value.code == 2


def test_help_all_of_a_command_without_a_short_one(capsys, monkeypatch):
    assert shown(capsys, monkeypatch, "convert", "--help-all") == shown(capsys, monkeypatch, "convert", "--help")


def test_an_unknown_command_ends_with_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fly"])
    assert ended.value.code == 2
