"""The command line, `fastidc render|cache|adapt|finetune|caption|search|evaluate|convert|demo|doctor`.

What each command does is in `fastidc.commands`.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Union

from fastidc.commands import caption, data, evaluate, search, tools, train
from fastidc.errors import FastidcError, LostPeerError

COMMANDS: dict[str, Callable | dict[str, Callable]] = {
    "render": data.render,
    "cache": {"build": data.cache_build, "info": data.cache_info},
    "adapt": train.adapt,
    "finetune": train.finetune,
    "caption": caption.caption,
    "search": search.search,
    "evaluate": {"captions": evaluate.captions, "retrieval": evaluate.retrieval, "run": evaluate.run},
    "convert": tools.convert,
    "demo": train.demo,
    "doctor": tools.doctor,
}
"""By name; a dictionary in the place of a function is a command with commands of its own."""
HELP = {
    "cache": "A data set's images, decoded once: build such a file, or look at one.",
    "evaluate": "Scores of captions, of retrieval, or of a whole run.",
}


def _group(name: str, actions: Mapping[str, Callable]) -> Callable:
    """A command whose only argument is one of ``actions``."""
    import tyro

    chosen = tuple(Annotated[Any, tyro.conf.subcommand(name=action, constructor=run)] for action, run in actions.items())

    def command(command: Union[chosen]) -> None:  # noqa: UP007
        pass

    command.__name__, command.__doc__ = name, HELP[name]
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0, 1 where a command left something out and says so, 2 for bad input, 130 when interrupted)."""
    import tyro

    commands = {name: _group(name, command) if isinstance(command, dict) else command for name, command in COMMANDS.items()}
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="fastidc",
            description="CLIP for image difference captioning: render pairs, adapt, fine-tune, caption, score.",
            args=None if argv is None else list(argv),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
    except FastidcError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, LostPeerError):  # of torchrun's processes one speaks
            print(f"fastidc: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("fastidc: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
