"""`fastidc push`: a run, with its model card, into a repository of the Hugging Face Hub."""

import os
import tempfile
from pathlib import Path

from fastidc.checkpoint import hub
from fastidc.errors import FastidcError
from fastidc.share.card import CARD_FILE
from fastidc.share.folder import FILES, export


def push(
    run: str | os.PathLike,
    repository: str,
    *,
    licence: str | None = None,
    dataset: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> tuple[str, list[str]]:
    """Exports ``run`` and uploads the folder as one commit to OWNER/NAME, which is made if it does not exist (private, where asked for), on the
    branch ``revision`` (main, or a new one). -> the page's address, and sentences for the user.

    A folder that `export` wrote is uploaded as it is, so a card may be edited first. Only the files that `export` writes are uploaded, none of
    them a pickle. FastidcError, a sentence, for a wrong name, no token, no network, or what the Hub refuses; an upload is a single commit, so
    it is there whole or not at all.
    """
    name = f"{hub.PREFIX}{repository}"
    repository, at = hub.parse(name)
    if at is not None:
        raise FastidcError(f"{name}: a branch is given with --revision.")
    library = hub.hub_library(name)
    folder = Path(run)
    if _is_exported(folder):
        for flag, value in (("licence", licence), ("dataset", dataset)):
            if value is not None:
                raise FastidcError(
                    f"{folder / CARD_FILE}: this folder is exported already; write the {flag} into its card, and leave out --{flag}."
                )
        _token(library, name)
        return _uploaded(library, name, folder, repository, private, revision), []
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / repository.split("/")[1]
        notes = list(export(run, out, licence=licence, dataset=dataset, name=repository).notes)
        _token(library, name)
        return _uploaded(library, name, out, repository, private, revision), notes


def _is_exported(folder: Path) -> bool:
    try:
        return "\nlibrary_name: fastidc\n" in (folder / CARD_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _token(library, name: str) -> None:
    if library.get_token() is None:
        raise FastidcError(f"{name}: the Hub wants to know who you are; set HF_TOKEN, or log in with `hf auth login`.")


def _uploaded(library, name: str, folder: Path, repository: str, private: bool, revision: str | None) -> str:
    from fastidc import checkpoint

    checkpoint.read_config(folder)
    api = library.HfApi(library_name="fastidc")
    try:
        page = api.create_repo(repository, private=private or None, exist_ok=True, repo_type="model")
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            revision=revision,
            allow_patterns=list(FILES),
            commit_message="Upload a fastidc model",
        )
    except Exception as error:  # its own, its HTTP library's and the system's
        raise hub.refusal(name, error) from None
    return str(page)
