"""What a command takes, read off its function: for a help that fits a screen and for a shell's completion."""

import ast
import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag, or one argument without a name."""

    name: str
    """As Python has it: batch_size."""
    type: Any
    default: Any
    """`inspect.Parameter.empty` where it must be given."""
    about: str
    positional: bool = False

    @property
    def options(self) -> list[str]:
        """["--batch-size"], or of a switch ["--json", "--no-json"]; none where it has no name."""
        name = self.name.replace("_", "-")
        return [] if self.positional else [f"--{name}", f"--no-{name}"] if self.is_switch else [f"--{name}"]

    @property
    def is_switch(self) -> bool:
        return self.type is bool

    @property
    def choices(self) -> list[str]:
        """What it may be, where it is one of a few."""
        kinds = (self.type, *typing.get_args(self.type))
        return [str(value) for kind in kinds if typing.get_origin(kind) is Literal for value in typing.get_args(kind)]


def flags_of(run: Callable) -> list[Flag]:
    """All that ``run`` takes; of a parameter that is a dataclass its fields."""
    hints, documented, found = typing.get_type_hints(run), _documented_parameters(run), []
    for name, parameter in inspect.signature(run).parameters.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            types, about = typing.get_type_hints(kind), _documented_fields(kind)
            for field in dataclasses.fields(kind):
                default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
                found.append(Flag(field.name, types[field.name], default, about.get(field.name, "")))
        else:
            positional = parameter.kind is parameter.POSITIONAL_ONLY
            found.append(Flag(name, kind, parameter.default, documented.get(name, ""), positional))
    return found


def first_sentence(run: Callable) -> str:
    """The first paragraph of its docstring, on one line."""
    return " ".join(inspect.getdoc(run).split("\n\n")[0].split())


def example_of(run: Callable) -> str:
    """The line of its docstring that shows how to call it, or nothing."""
    return next((line for line in inspect.getdoc(run).splitlines() if line.startswith("Example: ")), "")


def shortened(run: Callable, names: Sequence[str], more: str) -> Callable:
    """A command that takes those flags of ``run`` alone, to print its help; ``more`` is a line that says how to see the others."""
    flags = {flag.name: flag for flag in flags_of(run)}
    kept = [flags[name] for name in names]

    def command(**values: Any) -> None:
        raise AssertionError("a shortened command prints its help and ends")

    parameters = [inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=flag.default, annotation=flag.type) for flag in kept]
    text = inspect.getdoc(run).split("\nArgs:")[0].rstrip()
    lines = "\n".join(f"    {flag.name}: {flag.about}" for flag in kept)
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {flag.name: flag.type for flag in kept}
    command.__name__, command.__doc__ = run.__name__, f"{text}\n\n{more}\n\nArgs:\n{lines}\n"
    return command


def _documented_parameters(run: Callable) -> dict[str, str]:
    """The section Args of a docstring."""
    _, _, section = (inspect.getdoc(run) or "").partition("\nArgs:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


@functools.cache
def _documented_fields(kind: type) -> dict[str, str]:
    """The strings that stand below a dataclass's fields and those that it inherits, which Python itself does not keep."""
    found = {name: text for base in kind.__bases__ if dataclasses.is_dataclass(base) for name, text in _documented_fields(base).items()}
    body = ast.parse(inspect.getsource(kind)).body[0].body
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found
