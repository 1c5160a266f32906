"""What a mini CLEVR-Change is made of: the parameters of one rendered data set."""

from dataclasses import dataclass
from math import isfinite

from fastidc.errors import FastidcError

# In the order of the released id blocks (data_evaluation.md 1.1).
TYPES = ("color", "material", "add", "drop", "move")


@dataclass(frozen=True)
class RenderConfig:
    """Parameters of a mini CLEVR-Change; the same values give the same bytes (data_evaluation.md 2.3).

    ``scenes``: how many scenes are written, three images and two pairs each. ``width``, ``height``: pixels. ``jitter``: half
    range of the camera's uniform jitter per axis, in scene units (1.0 as released), drawn once for the scene and once more for
    each follow-up image. ``min_objects``, ``max_objects``: objects in the before image. ``references``: captions per pair.
    ``no_change_dominance``: the share of a pair's no-change captions that is the one dominant sentence; 0 draws all nine alike.
    ``smooth``: four rays per pixel along edges, which doubles the time; by default only in images of less than 128 rows, where a
    staircase is a large part of a small object. Raises FastidcError on a value that no data set can be made from.
    """

    scenes: int
    width: int = 480
    height: int = 320
    jitter: float = 1.0
    min_objects: int = 3
    max_objects: int = 10
    seed: int = 0
    references: int = 6
    no_change_dominance: float = 0.5
    smooth: bool | None = None

    def __post_init__(self) -> None:
        for name in ("scenes", "width", "height", "min_objects", "max_objects", "seed", "references"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise FastidcError(f"{name} must be a whole number, not {value!r}.")
        for name in ("jitter", "no_change_dominance"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
                raise FastidcError(f"{name} must be a finite number, not {value!r}.")
        if self.smooth not in (None, True, False):
            raise FastidcError(f"smooth must be true, false or left out, not {self.smooth!r}.")
        if not 15 <= self.scenes <= 900_000:
            raise FastidcError(
                f"scenes is {self.scenes}, but 15 are the fewest that put each of the five change types into train, val and test, "
                "and file names of six digits hold 900000 at most."
            )
        if not (48 <= self.width <= 4096 and 48 <= self.height <= 4096):
            raise FastidcError(f"size {self.width}x{self.height} is outside 48x48 to 4096x4096 pixels.")
        if not 1 / 3 <= self.width / self.height <= 3:
            raise FastidcError(f"size {self.width}x{self.height} is narrower than 1:3 or wider than 3:1.")
        if not 0 <= self.jitter <= 1.5:
            raise FastidcError(f"jitter is {self.jitter}, but the scene stays in view only for 0 to 1.5.")
        if not 2 <= self.min_objects <= self.max_objects <= 10:
            raise FastidcError(
                f"objects {self.min_objects}-{self.max_objects} must satisfy 2 <= min <= max <= 10; "
                "the placement rules leave no room for more."
            )
        if not 0 <= self.seed < 2**63:
            raise FastidcError(f"seed is {self.seed}, but must lie in 0 to 2**63 - 1.")
        if not 1 <= self.references <= 9:
            raise FastidcError(f"references is {self.references}, but the nine no-change sentences serve 1 to 9 captions per pair.")
        if not 0 <= self.no_change_dominance <= 1:
            raise FastidcError(f"no_change_dominance is {self.no_change_dominance}, but is a share from 0 to 1.")

    @property
    def smooth_edges(self) -> bool:
        """Whether edges get four rays per pixel, with the default resolved."""
        return self.height < 128 if self.smooth is None else self.smooth
