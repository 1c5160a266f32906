"""``hub:OWNER/NAME[@REVISION]``: a fastidc folder in a repository of the Hugging Face Hub, fetched into the Hub's own cache.

Only files whose names we know are fetched, and none of them is a pickle. The cache, offline mode, the token and the endpoint are huggingface_hub's,
with its variables (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT).
"""

import functools
import re
from pathlib import Path
from typing import Any

from fastidc.errors import FastidcError
from fastidc.files import parse_json, read_plain

PREFIX = "hub:"
NO_CHANGE_FILE = "no_change.json"  # beside the weights: what a probability of a change is reckoned from, see `fastidc.describe.no_change`
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@functools.cache
def fetch(source: str) -> Path:
    """The folder in the Hub's cache that holds what ``source`` names; asked once a process, so that all its files are of one commit.
    FastidcError, a sentence with ``source``, for whatever keeps it from being there."""
    repository, revision = parse(source)
    library = hub_library(source)
    config = _snapshot(library, source, repository, revision, [_CONFIG, NO_CHANGE_FILE])
    _check_config(source, config / _CONFIG)
    folder = _snapshot(library, source, repository, config.name, [_CONFIG, NO_CHANGE_FILE, _WEIGHTS])
    if not (folder / _WEIGHTS).is_file():
        raise FastidcError(f"{source}: has no {_WEIGHTS}, the only form of weights that is read from the Hub; ask its owner.")
    return folder


def parse(source: str) -> tuple[str, str | None]:
    """``hub:OWNER/NAME[@REVISION]`` -> the repository, and its branch, tag or commit."""
    found = re.fullmatch(re.escape(PREFIX) + r"([\w.-]+/[\w.-]+)(?:@(\S+))?", source)
    if not found:
        raise FastidcError(f"{source}: a model on the Hub is hub:OWNER/NAME or hub:OWNER/NAME@REVISION.")
    return found[1], found[2]


def hub_library(source: str) -> Any:
    """The package huggingface_hub; FastidcError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise FastidcError(
            f"{source}: the Hugging Face Hub needs huggingface_hub, which cannot be imported ({error}); pip install fastidc[hub]."
        ) from None
    return huggingface_hub


def refusal(source: str, error: Exception) -> FastidcError:
    """The sentence for what huggingface_hub raised."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    said = (" ".join(str(error).split()) or type(error).__name__)[:200]
    if isinstance(error, errors.RevisionNotFoundError):
        return FastidcError(f"{source}: the repository has no such revision; give a branch, a tag or a commit that it has.")
    if isinstance(error, errors.GatedRepoError):
        return FastidcError(f"{source}: its owner gives access on request; ask for it on the repository's page, then set HF_TOKEN.")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return FastidcError(
            f"{source}: the Hub has no such repository, or it is private; check the name, or set HF_TOKEN (`hf auth login`)."
        )
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return FastidcError(f"{source}: the Hub refuses this token; set HF_TOKEN to one that may do this, or log in with `hf auth login`.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return FastidcError(f"{source}: huggingface_hub is offline (HF_HUB_OFFLINE), and this needs the network; unset it.")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return FastidcError(
            f"{source}: is not in the cache, and the Hub cannot be reached (no network, or HF_HUB_OFFLINE); fetch it once while online."
        )
    if isinstance(error, errors.HFValidationError):
        return FastidcError(f"{source}: is no name of a repository on the Hub ({said}).")
    return FastidcError(f"{source}: the Hub cannot be asked ({type(error).__name__}: {said}); try again when it can be reached.")


def _snapshot(library: Any, source: str, repository: str, revision: str | None, names: list[str]) -> Path:
    try:
        return Path(library.snapshot_download(repository, revision=revision, allow_patterns=names))
    except Exception as error:  # its own, its HTTP library's and the system's
        raise refusal(source, error) from None


def _check_config(source: str, path: Path) -> None:
    """Before hundreds of megabytes are fetched: whether this is a model of ours."""
    try:
        values = parse_json(read_plain(path).decode())
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict) or values.get("format") != "fastidc":
        raise FastidcError(f"{source}: its {_CONFIG} is not that of a fastidc model, so this is another kind of repository.")
