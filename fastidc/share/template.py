"""Templates of this package."""

from typing import Any


def template(name: str) -> Any:
    """The Jinja template ``name`` beside this file; a name that it does not know is an error, and nothing is escaped: it writes Markdown and
    Python, whose values go through ``tojson`` where they stand in YAML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("fastidc", "share")
    return Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).get_template(name)
