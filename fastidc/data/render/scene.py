"""Scenes: placement, the change, and the captions that hold of it (data_evaluation.md 2.1, 2.2)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastidc.data.random import generator
from fastidc.data.render.camera import BASE_POSITION, Camera, focal_length
from fastidc.data.render.config import RenderConfig
from fastidc.data.render.grammar import Expressions, change_captions, no_change_captions
from fastidc.data.render.raycast import Hits, primary
from fastidc.data.render.space import Lights, Scene3D, Tiles, View
from fastidc.data.render.things import COLORS, MATERIALS, SHAPES, SIZES, Thing
from fastidc.errors import FastidcError

VIEWS = ("before", "after", "distractor")
MIN_DISTANCE = 0.25
MARGIN = 0.4
MIN_MOVE = 1.0
# Candidate places per object. CLEVR gives up after 50 and starts the scene again; more find the same places with fewer restarts.
CANDIDATES = 400
_FIRST_LOOK = 24
ATTEMPTS = 2000
# 200 pixels at CLEVR's default 320x240, in squares of the focal length, so that every size accepts the same scenes.
MIN_VISIBLE = 200 / focal_length(320, 240) ** 2
# The coarse look divides both sides by this, and is not worth it below this many pixels.
_COARSE = 3
_COARSE_LEAST = 48
_LAMPS = {"key": (5.5, -3.2, 7.0), "fill": (-4.67, -4.01, 3.01), "back": (-1.17, 2.65, 5.82)}


@dataclass(frozen=True)
class Scene:
    """One scene: three views (before, after, distractor) under the same lights, one change, and its captions.

    ``changed`` is the changed object's index in the before view, for ``add`` in the after view (always its last). Objects keep
    their order from before to after, with the dropped one left out and the added one last.
    """

    change: str
    changed: int
    views: tuple[View, View, View]
    change_captions: tuple[str, ...]
    no_change_captions: tuple[str, ...]

    def index_in(self, view: int) -> int | None:
        """The changed object's index among the objects of view 0, 1 or 2, None where it is not there."""
        absent = view == 1 if self.change == "drop" else view != 1 and self.change == "add"
        return None if absent else self.changed


@dataclass
class Traced:
    """Scenes with their primary rays traced: what ``shading.picture`` needs, and what is visible where.

    ``boxes[s][k][i]`` (x0, y0, x1, y1; half open, pixels) and ``visible[s][k][i]`` (pixels) of object ``i`` in view ``k`` of scene
    ``s``; images are ordered scene by scene.
    """

    scene3d: Scene3D
    tiles: Tiles
    hits: Hits
    boxes: list[list[list[tuple[int, int, int, int]]]]
    visible: list[list[list[int]]]


def draw_scenes(config: RenderConfig, jobs: Sequence[tuple[int, str]], device: str | torch.device = "cpu") -> tuple[list[Scene], Traced]:
    """The scenes of ``jobs`` (number, type of change), each redrawn until every rule holds: a pure function of config and job.

    In all three images every object shows at least ``min_visible`` pixels, and the changed object has an expression that holds of
    it alone. Jobs are traced together because small images cost more in calls than in arithmetic. Raises FastidcError when
    ``ATTEMPTS`` draws did not give a scene.
    """
    # Drawn once, so that crowded scenes, which fail more often, stay as frequent as they should be.
    counts = [
        int(generator(config.seed, "render objects", number).integers(config.min_objects, config.max_objects + 1)) for number, _ in jobs
    ]
    attempts = [0] * len(jobs)
    scenes: list[Scene | None] = [None] * len(jobs)
    pending = list(range(len(jobs)))
    while pending:
        for j in pending:
            scenes[j], attempts[j] = _next_proposal(config, *jobs[j], counts[j], attempts[j])
        size = config.width, config.height
        # A coarse look first: most hidden objects show that way, at a fraction of the rays.
        coarse = tuple(side // _COARSE for side in size)
        hidden = _hidden(scenes, pending, coarse, 0.8, device) if min(coarse) >= _COARSE_LEAST else set()
        clear = [j for j in pending if j not in hidden]
        if clear:
            traced = trace([scenes[j] for j in clear], *size, device)
            hidden |= {j for j, seen in zip(clear, traced.visible) if min(map(min, seen)) < min_visible(*size)}
        hidden = [j for j in pending if j in hidden]
        if not hidden and len(clear) < len(jobs):
            traced = trace(scenes, config.width, config.height, device)
        pending = hidden
    return scenes, traced


def _hidden(scenes: Sequence[Scene | None], which: list[int], size: tuple[int, int], share: float, device: str | torch.device) -> set[int]:
    """Those of the scenes ``which`` where an object shows less than ``share`` of the pixels it must, at image ``size``."""
    visible = trace([scenes[j] for j in which], *size, device).visible
    return {j for j, seen in zip(which, visible) if min(map(min, seen)) < share * min_visible(*size)}


def _next_proposal(config: RenderConfig, number: int, change: str, count: int, attempt: int) -> tuple[Scene, int]:
    """The first draw from ``attempt`` on that can be placed and described, and the attempt after it."""
    for i in range(attempt, ATTEMPTS):
        scene = _propose(config, change, count, generator(config.seed, "render", number, i))
        if scene is not None:
            return scene, i + 1
    raise FastidcError(
        f"Scene {number} found no place for {count} objects in {ATTEMPTS} draws; ask for fewer objects, less jitter or a wider image."
    )


def min_visible(width: int, height: int) -> float:
    """Pixels of an object that must show at this image size."""
    return MIN_VISIBLE * focal_length(width, height) ** 2


def trace(scenes: Sequence[Scene], width: int, height: int, device: str | torch.device = "cpu") -> Traced:
    """Trace the primary rays of the scenes' views, three each, one ray per pixel."""
    scene3d = Scene3D([view for scene in scenes for view in scene.views], width, height, device)
    tiles = scene3d.tiles(1, scene3d.touched())
    hits = primary(scene3d, tiles, 1)
    owner = scene3d.rows(tiles, hits.owner).cpu().numpy()
    boxes, visible = [], []
    for k, pairs in enumerate(scene3d.pair_of):
        seen = [_extent(owner[k], pair + 1, scene3d.window[pair].tolist()) for pair in pairs]
        boxes.append([box for box, _ in seen])
        visible.append([count for _, count in seen])
    by_scene = range(0, len(boxes), len(VIEWS))
    return Traced(scene3d, tiles, hits, [boxes[k : k + 3] for k in by_scene], [visible[k : k + 3] for k in by_scene])


def _extent(owner: np.ndarray, number: int, window: list[int]) -> tuple[tuple[int, int, int, int], int]:
    """The box around the pixels of ``owner`` [H, W] that equal ``number``, none outside ``window``, and how many there are."""
    x0, y0, x1, y1 = window
    mask = owner[y0:y1, x0:x1] == number
    across, down = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(across):
        return (0, 0, 0, 0), 0
    box = x0 + int(across[0]), y0 + int(down[0]), x0 + int(across[-1]) + 1, y0 + int(down[-1]) + 1
    return box, int(np.count_nonzero(mask))


def _propose(config: RenderConfig, change: str, count: int, rng: np.random.Generator) -> Scene | None:
    """One draw, or None where placement or captions fail; what is visible is for the caller to check."""
    cameras = [_jitter(BASE_POSITION, config.jitter, rng)]
    cameras += [_jitter(cameras[0], config.jitter, rng) for _ in VIEWS[1:]]
    before, after, distractor = (Camera(position) for position in cameras)
    lights = Lights(**{name: _jitter(position, 1.0, rng) for name, position in _LAMPS.items()})

    objects: list[Thing] = []
    for _ in range(count):
        thing = _place(_attributes(rng), objects, (before,), rng)
        if thing is None:
            return None
        objects.append(thing)

    if change == "add":
        new = _place(_attributes(rng), objects, (before, after), rng)
        if new is None:
            return None
        changed, later = count, [*objects, new]
        expressions = Expressions(later, after, changed)
    else:
        # The first object, in a drawn order, that some expression singles out.
        for changed in rng.permutation(count).tolist():
            expressions = Expressions(objects, before, changed)
            if expressions:
                break
        later, new = list(objects), objects[changed]
        if change == "color":
            new = replace(new, color=_pick(rng, [c for c in COLORS if c != new.color]))
        elif change == "material":
            new = replace(new, material=_pick(rng, [m for m in MATERIALS if m != new.material]))
        elif change == "move":
            new = _place(new, [o for o in objects if o is not new], (before, after), rng, away_from=new)
            if new is None:
                return None
        later[changed : changed + 1] = [] if change == "drop" else [new]
    if not expressions:
        return None
    first, second = tuple(objects), tuple(later)
    return Scene(
        change,
        changed,
        (View(before, first, lights), View(after, second, lights), View(distractor, first, lights)),
        tuple(change_captions(change, expressions, new, config.references, rng)),
        tuple(no_change_captions(config.references, config.no_change_dominance, rng)),
    )


def _jitter(position: tuple[float, float, float], amount: float, rng: np.random.Generator) -> tuple[float, float, float]:
    x, y, z = (round(p + float(d), 6) for p, d in zip(position, rng.uniform(-amount, amount, 3)))
    return x, y, z


def _attributes(rng: np.random.Generator) -> Thing:
    return Thing(_pick(rng, SHAPES), _pick(rng, tuple(SIZES)), _pick(rng, tuple(COLORS)), _pick(rng, MATERIALS), 0.0, 0.0, 0.0)


def _place(
    thing: Thing, others: list[Thing], cameras: tuple[Camera, ...], rng: np.random.Generator, away_from: Thing | None = None
) -> Thing | None:
    """``thing`` at a place that keeps distance and margin from ``others`` as every camera sees them, or None where no candidate does."""
    rotation = round(float(rng.uniform(0, 360)), 3)
    places = rng.uniform(-3, 3, (CANDIDATES, 2)).round(6)
    taken = np.array([[o.x, o.y] for o in others]).reshape(-1, 2)
    apart = np.array([(o.radius + thing.radius + MIN_DISTANCE) ** 2 for o in others])
    axes = np.array([camera.directions[direction] for camera in cameras for direction in ("right", "behind")])
    # Most objects find a place at once, so the later candidates are rarely looked at.
    for part in (places[:_FIRST_LOOK], places[_FIRST_LOOK:]):
        offset = part[:, None] - taken
        good = ((offset * offset).sum(-1) >= apart).all(1) & (abs(offset @ axes.T) >= MARGIN).all((1, 2))
        if away_from is not None:
            good &= np.hypot(*(part - (away_from.x, away_from.y)).T) >= MIN_MOVE
        if good.any():
            x, y = part[int(good.argmax())].tolist()
            return replace(thing, x=x, y=y, rotation=rotation)
    return None


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]
