"""The command line, `fastidc render|check|cache|adapt|finetune|caption|search|evaluate|report|convert|export|push|demo|doctor|completion`.

What each command does is in `fastidc.commands`.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

from fastidc.commands import caption, check, data, evaluate, report, search, share, tools, train
from fastidc.errors import FastidcError, Interrupted, LostPeerError

COMMANDS: dict[str, Callable | dict[str, Callable]] = {
    "render": data.render,
    "check": check.check,
    "cache": {"build": data.cache_build, "info": data.cache_info},
    "adapt": train.adapt,
    "finetune": train.finetune,
    "caption": caption.caption,
    "search": search.search,
    "evaluate": {"captions": evaluate.captions, "retrieval": evaluate.retrieval, "run": evaluate.run},
    "report": report.report,
    "convert": tools.convert,
    "export": share.export,
    "push": share.push,
    "demo": train.demo,
    "doctor": tools.doctor,
}
"""By name; a dictionary in the place of a function is a command with commands of its own."""
HELP = {
    "cache": "A data set's images, decoded once: build such a file, or look at one.",
    "evaluate": "Scores of captions, of retrieval, or of a whole run.",
}


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print a script that completes commands, flags and their values.

    Example: source <(fastidc completion bash)

    Args:
        shell: SHELL: bash or zsh, to be sourced, or fish, for ~/.config/fish/completions/fastidc.fish.
    """
    from fastidc.commands.completion import script

    print(script(shell, COMMANDS, HELP), end="")


COMMANDS["completion"] = completion


def _asked(name: str, held: Callable | Mapping[str, Callable], line: Sequence[str], where: str = "fastidc") -> Callable:
    """The command ``name`` as ``line``, the arguments from its place on, needs it: whole where it is the one that is asked for. Of all others a
    list has the first sentence, and of one with ``common`` flags, --help these."""
    from fastidc.commands.flags import first_sentence, shortened

    is_group = isinstance(held, Mapping)
    if line[:1] != [name]:
        return _named(name, HELP[name] if is_group else first_sentence(held))
    if is_group:
        return _group(name, held, line[1:])
    common = getattr(held, "common", None)
    if common is not None and {"-h", "--help"} & set(line):
        return shortened(held, common, f"All flags: {where} {name} --help-all")
    return held


def _named(name: str, text: str) -> Callable:
    def command() -> None:
        pass

    command.__name__, command.__doc__ = name, text
    return command


def _group(name: str, actions: Mapping[str, Callable], line: Sequence[str]) -> Callable:
    """A command whose only argument is one of ``actions``; its example is the first one's."""
    import tyro

    from fastidc.commands.flags import example_of

    asked = {action: _asked(action, run, line, f"fastidc {name}") for action, run in actions.items()}
    chosen = tuple(Annotated[Any, tyro.conf.subcommand(name=action, constructor=run)] for action, run in asked.items())

    def command(command: Union[chosen]) -> None:  # noqa: UP007
        pass

    command.__name__, command.__doc__ = name, f"{HELP[name]}\n\n{example_of(next(iter(actions.values())))}"
    return command


def _say(sentence: str, all_of_them: bool = False) -> None:
    """On stderr; of torchrun's processes the first one speaks, unless ``all_of_them`` do."""
    if all_of_them or os.environ.get("RANK", "0") == "0":
        print(f"fastidc: {sentence}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0, 1 where a command left something out and says so, 2 for bad input, 130 when interrupted, see `fastidc.errors.Interrupted`)."""
    import tyro

    line = list(sys.argv[1:] if argv is None else argv)
    commands = {name: _asked(name, held, line) for name, held in COMMANDS.items()}
    line = ["--help" if word == "--help-all" else word for word in line]  # asked for with all flags, above
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="fastidc",
            description="CLIP for image difference captioning: render pairs, adapt, fine-tune, caption, score.",
            args=line,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
    except FastidcError as error:
        _say(str(error), all_of_them=isinstance(error, LostPeerError))
        return 2
    except Interrupted as stopped:
        _say(str(stopped))
        return stopped.code
    except KeyboardInterrupt:
        _say("interrupted.")
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
