"""`fastidc completion`: in a real shell, every command and flag that the parser knows, and what a flag may be."""

import inspect
import re
import shutil
import subprocess

import pytest

from fastidc.cli import COMMANDS, HELP, main
from fastidc.commands.completion import script
from fastidc.commands.flags import flags_of
from fastidc.errors import FastidcError

LEAVES = {
    f"{name} {action}".strip(): run
    for name, held in COMMANDS.items()
    for action, run in (held.items() if isinstance(held, dict) else [("", held)])
}
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed: install it (apt-get install bash)")
needs_fish = pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed: install it (apt-get install fish)")
needs_zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed: install it (apt-get install zsh)")


def completed(tmp_path, lines):
    """What a Tab offers after each of ``lines``, lists of words, the last one unfinished: by the function that bash would call."""
    (tmp_path / "fastidc.bash").write_text(script("bash", COMMANDS, HELP))
    calls = "".join(
        f'COMP_WORDS=({" ".join(map(repr, line))}); COMP_CWORD={len(line) - 1}; COMPREPLY=(); $function; echo "${{COMPREPLY[*]}}"\n'
        for line in lines
    )
    code = f"source fastidc.bash\nfunction=$(complete -p fastidc | sed -n 's/.* -F \\([^ ]*\\) .*/\\1/p')\n{calls}"
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [line.split() for line in done.stdout.split("\n")[:-1]]


def flags_in_help(name, capsys):
    with pytest.raises(SystemExit):
        main([*name.split(), "--help-all"])
    columns = re.findall(r"^[│ ] (-.*?)(?:  |│|$)", capsys.readouterr().out, re.MULTILINE)  # names stand left of what is said about them
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", "\n".join(columns)))


@needs_bash
def test_commands(tmp_path):
    top, ca, groups, build, none = completed(
        tmp_path, [["fastidc", ""], ["fastidc", "ca"], ["fastidc", "cache", ""], ["fastidc", "cache", "bu"], ["fastidc", "zz"]]
    )
    assert top == [*COMMANDS, "--help"]
    assert ca == ["cache", "caption"]
    assert groups == [*COMMANDS["cache"], "--help"]
    assert build == ["build"]
    assert none == []


@needs_bash
def test_every_flag_that_the_parser_knows(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = completed(tmp_path, [["fastidc", *name.split(), "-"] for name in LEAVES])
    for name, offered in zip(LEAVES, found, strict=True):
        assert set(offered) == flags_in_help(name, capsys) | {"--help-all"}, name
    assert sum(map(len, found)) > 100


@needs_bash
def test_what_a_flag_may_be(tmp_path):
    asked = [
        ["fastidc", "adapt", "--data", "x", "--dataset", ""],
        ["fastidc", "adapt", "--device", "c"],
        ["fastidc", "convert", "a", "b", "--layout", "o"],
        ["fastidc", "adapt", "--device", "=", "cu"],
        ["fastidc", "adapt", "--gather_grad", ""],
        ["fastidc", "caption", "a.png", "--be"],
        ["fastidc", "adapt", "--data", ""],
        ["fastidc", "caption", ""],
        ["fastidc", "completion", ""],
    ]
    dataset, device, layout, equals, underscore, beams, path, image, shell = completed(tmp_path, asked)
    assert dataset == next(flag.choices for flag in flags_of(COMMANDS["adapt"]) if flag.name == "dataset")
    assert device == ["cpu", "cuda"]
    assert layout == ["official", "openai"]
    assert equals == ["cuda"]
    assert underscore == ["full", "local"]
    assert beams == ["--beams"]
    assert path == image == [], "bash's own file names then"
    assert shell == ["bash", "zsh", "fish"]


@needs_bash
def test_file_names_are_left_to_bash(tmp_path):
    (tmp_path / "fastidc.bash").write_text(script("bash", COMMANDS, HELP))
    done = subprocess.run(
        ["bash", "--norc", "-c", "source fastidc.bash; complete -p fastidc"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "complete -o default -F _fastidc fastidc"


@needs_fish
def test_fish(tmp_path):
    """Where there is a fish."""
    (tmp_path / "fastidc.fish").write_text(script("fish", COMMANDS, HELP))

    def offered(line):
        code = f"source fastidc.fish; complete -C '{line}'"
        done = subprocess.run(["fish", "-N", "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return [row.split("\t")[0] for row in done.stdout.splitlines()]

    assert set(offered("fastidc ")) >= set(COMMANDS)
    assert offered("fastidc cache ") == sorted(COMMANDS["cache"])
    assert set(offered("fastidc adapt --")) >= {"--data", "--gather-grad", "--overwrite", "--no-overwrite"}
    assert offered("fastidc adapt --device c") == ["cpu", "cuda"]
    assert "--beams" not in offered("fastidc convert --")
    assert sorted(offered("fastidc completion ")) == ["bash", "fish", "zsh"]


@needs_zsh
def test_zsh(tmp_path):
    """Where there is a zsh: what the function hands to compadd."""
    (tmp_path / "_fastidc").write_text(script("zsh", COMMANDS, HELP))
    code = """
    compdef() { }; compadd() { shift; print -- "$@" }; _files() { print FILES }
    source ./_fastidc
    at() { words=("$@"); CURRENT=$#; _fastidc }
    at fastidc ca; at fastidc cache ''; at fastidc cache build --d; at fastidc adapt --device ''; at fastidc adapt --data ''; at fastidc completion ''
    """
    done = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    top, group, flags, choices, files, first = (line.split() for line in done.stdout.splitlines())
    assert top == [*COMMANDS, "--help"]
    assert group == [*COMMANDS["cache"], "--help"]
    assert {"--data", "--builder"} <= set(flags)
    assert choices == ["auto", "cpu", "cuda"]
    assert files == ["FILES"]
    assert first == ["bash", "zsh", "fish"]


def test_the_command(capsys):
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert capsys.readouterr().out == script(shell, COMMANDS, HELP)
    with pytest.raises(FastidcError, match="unknown shell 'tcsh'; choose one of bash, zsh, fish"):
        script("tcsh", COMMANDS, HELP)


def test_flags_are_read_with_their_help():
    flags = {flag.name: flag for flag in flags_of(COMMANDS["adapt"])}
    assert flags["overwrite"].options == ["--overwrite", "--no-overwrite"]
    assert flags["data"].default is inspect.Parameter.empty
    assert flags["gather_grad"].choices == ["full", "local"]
    for name, run in LEAVES.items():
        assert all(flag.about for flag in flags_of(run)), f"{name}: a flag without a word about it"
