"""Command lines whose errors are one sentence and exit code 2, without argparse's usage above them."""

import argparse
import sys
from collections.abc import Callable

from fastidc.errors import FastidcError


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise FastidcError(f"{message}; `{self.prog} --help` lists the options.")


def answered(name: str, run: Callable[[], int]) -> int:
    """The exit code of ``run``; 2 where it refuses, with its sentence on stderr."""
    try:
        return run()
    except FastidcError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
