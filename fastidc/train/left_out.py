"""The pairs that a run trains on where `--on-bad-data` leaves some out: found before the first step by one process, written into the run's folder,
and read from there by whoever goes on with the run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fastidc.config import TrainOptions
from fastidc.data import quarantine
from fastidc.data.bad_data import LeftOut, bad_pairs, counted, known_good, most_of, without
from fastidc.data.loaders import distinct_images
from fastidc.data.quarantine import Quarantine
from fastidc.data.records import Loaded, PairRecord, load
from fastidc.data.sources import DECODERS
from fastidc.errors import FastidcError
from fastidc.train.distributed import World
from fastidc.train.identity import of_left_out
from fastidc.train.start import Start

LEFT_OUT_FILE = "left_out.json"


@dataclass(frozen=True)
class Pairs:
    """What a run reads. ``left``: None where nothing may be left out. ``looked``: every image has been decoded just now, or for a cache."""

    records: dict[str, list[PairRecord]]
    left: LeftOut | None = None
    looked: bool = False

    def write(self, data: Path) -> None:
        """Leaves RUN/left_out.json, a quarantine."""
        if self.left is not None:
            held = self.left.held
            quarantine.write(held.path, held.dataset, data, held.fingerprint, held.pairs)


def pairs_of(options: TrainOptions, dataset: str, world: World, begins: list[Start | None], say: Callable[[str], None]) -> Pairs:
    """The pairs of ``options.data`` as ``options.on_bad_data`` has them. Every process calls; ``begins`` holds where the run goes on, which the first
    process knows. FastidcError where there are more bad pairs than the limit, or what the run left out is not known any more."""
    most = most_of(options.on_bad_data)
    how = {"images": options.images, "empty": options.empty, "report": say, "quarantine": options.quarantine}
    earlier, resumed = world.on_main(lambda: (None, False) if begins[0] is None else (_of_run(begins[0]), True))
    if most is None and earlier is not None and earlier.pairs:
        raise FastidcError(
            f"{earlier.path}: the run that goes on left these {len(earlier.pairs):,} pairs out; add --on-bad-data skip, or begin anew in another --out."
        )
    if most is None or (resumed and earlier is None):
        if most is not None:
            say(
                f"{options.out}: goes on with all pairs, for it began without leaving any out; a run that is to leave some out begins anew, in another --out."
            )
        return Pairs(load(options.data, dataset, **how).records)
    loaded = load(options.data, dataset, **how, spare=True)
    if earlier is not None:
        _check(earlier, loaded)
        held = replace(earlier, path=options.out / LEFT_OUT_FILE)
        say(f"{earlier.path}: the run goes on without the pairs that it left out before; images are not looked at anew.")
    else:
        pairs = world.on_main(lambda: bad_pairs(loaded, _known(options, loaded), options.workers))
        held = Quarantine(options.out / LEFT_OUT_FILE, loaded.kind, loaded.fingerprint, pairs)
    left = LeftOut(held, counted(loaded, held.pairs))
    left.check(most, options.data)
    return Pairs(without(loaded, held.pairs, held.path), left, looked=earlier is None)


def _known(options: TrainOptions, loaded: Loaded) -> set[Path]:
    """Images that need no look, where a cache may be read."""
    if options.loader in DECODERS:
        return set()
    return known_good(options.data, options.cache, distinct_images(loaded.records.values()))


def _of_run(start: Start) -> Quarantine | None:
    """What the run left out, None where nobody looked; FastidcError where its file is not what it was."""
    path, identity = start.run / LEFT_OUT_FILE, start.snapshot.state.get("identity")
    saved = identity.get("left_out") if isinstance(identity, dict) else None
    held = quarantine.read(path) if path.is_file() or saved is not None else None
    if (now := of_left_out(held)) != saved:
        raise FastidcError(
            f"{path}: was changed: {start.snapshot.path} is of a run that left out {saved or 'nothing'}, and this file has {now or 'nothing'}; put "
            "back the file, or begin anew in another --out."
        )
    return held


def _check(held: Quarantine, loaded: Loaded) -> None:
    held.check(loaded.kind, loaded.fingerprint)
    known = {id_ for ids in loaded.ids.values() for id_ in ids}
    if strange := [key for key in held.pairs if key not in known]:
        raise FastidcError(f"{held.path}: the data set has no pair {strange[0].strip()!r}; begin anew in another --out.")
