"""`fastidc export|push`."""

from pathlib import Path

from fastidc.errors import FastidcError


def export(
    run: str,
    dst: Path,
    /,
    program: bool = False,
    licence: str | None = None,
    dataset: str | None = None,
    name: str | None = None,
    max_words: int | None = None,
    overwrite: bool = False,
) -> None:
    """Make a run ready for others: a folder with a model card, or a program that PyTorch runs without fastidc.

    Example: fastidc export runs/caption my-model --licence mit

    Example: fastidc export runs/caption captions.pt2 --program

    Args:
        run: RUN, a run folder; with --program any model that captions.
        dst: DST, the folder to make; with --program a file, *.pt2.
        program: One file: two images in, token ids out, greedy, fp32.
        licence: Of the weights, as in mit or cc-by-4.0; else the card says unknown.
        dataset: What the data are, as in CLEVR-Change; else the card tells their form.
        name: What the card calls the model, by default DST's name.
        max_words: With --program: tokens of the longest caption.
        overwrite: Replace DST.
    """
    _check_flags(program, {"licence": licence, "dataset": dataset, "name": name}, max_words)
    if program or dst.suffix == ".pt2":
        if not program:
            raise FastidcError(f"{dst}: is named as a program; add --program, or choose a folder's name.")
        from fastidc.share import export_program

        print(export_program(run, dst, max_words=max_words, overwrite=overwrite))
        return
    from fastidc.share import export as export_folder

    print(export_folder(run, dst, licence=licence, dataset=dataset, name=name, overwrite=overwrite))


def _check_flags(program: bool, of_the_card: dict[str, str | None], max_words: int | None) -> None:
    for flag, value in of_the_card.items():
        if program and value is not None:
            raise FastidcError(f"--{flag} belongs to a folder's card, and a program has none; leave it out.")
    if max_words is not None and not program:
        raise FastidcError("--max-words belongs to --program; a folder's model keeps that of its training.")


def push(
    run: str, repo: str, /, licence: str | None = None, dataset: str | None = None, private: bool = False, revision: str | None = None
) -> None:
    """Upload a run, with its model card, to the Hugging Face Hub.

    hub:OWNER/NAME is then a model wherever one is taken.

    Example: fastidc push runs/caption OWNER/NAME --licence mit --private

    Needs the extra fastidc[hub] and a token (HF_TOKEN, or hf auth login).

    Args:
        run: RUN, a run folder, or a folder of fastidc export, whose card stays as it is.
        repo: OWNER/NAME, made if it is not there.
        licence: Of the weights, as in mit or cc-by-4.0; else the card says unknown.
        dataset: What the data are, as in CLEVR-Change.
        private: Make the repository private.
        revision: The branch, by default main.
    """
    from fastidc.share import push as upload

    page, notes = upload(run, repo, licence=licence, dataset=dataset, private=private, revision=revision)
    print("\n".join((f"uploaded {run} to {page}", *notes)))
