"""Scenes: placement, the change, and the captions that hold of it (data_evaluation.md 2.1, 2.2)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product

import numpy as np
import torch

from fastidc.data.random import generator
from fastidc.data.render.camera import BASE_POSITION, Camera, focal_length
from fastidc.data.render.config import RenderConfig
from fastidc.data.render.grammar import Expressions, change_captions, no_change_captions
from fastidc.data.render.raycast import Hits, primary
from fastidc.data.render.space import TILE, Lights, Scene3D, Tiles, View
from fastidc.data.render.things import COLORS, MATERIALS, SHAPES, SIZES, Thing
from fastidc.errors import FastidcError

VIEWS = ("before", "after", "distractor")
MIN_DISTANCE = 0.25
MARGIN = 0.4
MIN_MOVE = 1.0
# Candidate places per object. CLEVR gives up after 50 and starts the scene again; more find the same places with fewer restarts.
CANDIDATES = 400
_FIRST_LOOK, _SECOND_LOOK = 16, 80
ATTEMPTS = 2000
# 200 pixels at CLEVR's default 320x240, in squares of the focal length, so that every size accepts the same scenes.
MIN_VISIBLE = 200 / focal_length(320, 240) ** 2
# A coarse look still shows this many pixels of an object that is just visible enough.
_COARSE_VISIBLE = 12
# Shares of ``MIN_VISIBLE`` below and above which the coarse look decides; between them, and in the end, all rays do.
_SURELY_HIDDEN, _SURELY_VISIBLE = 0.8, 1.3
_LOOKS = [Thing(*look, x=0.0, y=0.0, rotation=0.0) for look in product(SHAPES, SIZES, COLORS, MATERIALS)]
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


@dataclass(frozen=True)
class _Draft:
    """A ``scene`` without its captions, and what they are made from: most drafts are thrown away, so captions come last."""

    scene: Scene
    expressions: Expressions
    new: Thing
    rng: np.random.Generator

    def finish(self, config: RenderConfig) -> Scene:
        """The scene with its captions; to be called once."""
        change = change_captions(self.scene.change, self.expressions, self.new, config.references, self.rng)
        no_change = no_change_captions(config.references, config.no_change_dominance, self.rng)
        return replace(self.scene, change_captions=tuple(change), no_change_captions=tuple(no_change))


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
    drafts: list[_Draft | None] = [None] * len(jobs)
    pending = list(range(len(jobs)))
    while pending:
        while pending:
            for j in pending:
                drafts[j], attempts[j] = _next_draft(config, *jobs[j], counts[j], attempts[j])
            pending = _hidden(config, drafts, pending, device)
        traced = trace([draft.scene for draft in drafts], config.width, config.height, device)
        pending = [j for j, seen in enumerate(traced.visible) if min(map(min, seen)) < min_visible(config.width, config.height)]
    return [draft.finish(config) for draft in drafts], traced


def _hidden(config: RenderConfig, drafts: Sequence[_Draft | None], which: list[int], device: str | torch.device) -> list[int]:
    """Those of the drafts ``which`` where an object shows too little, as far as that can be told at little cost."""
    size = config.width, config.height
    shares = None
    divisor = int((min_visible(*size) / _COARSE_VISIBLE) ** 0.5)
    hidden = []
    if divisor > 1:
        # A coarse look settles most of them at a fraction of the rays.
        shares = _shares(drafts, which, (size[0] // divisor, size[1] // divisor), device)
        hidden = [j for j in which if min(shares[j]) < _SURELY_HIDDEN]
        which = [j for j in which if _SURELY_HIDDEN <= min(shares[j]) < _SURELY_VISIBLE]
    if which:
        exact = _shares(drafts, which, size, device, shares)
        hidden += [j for j in which if min(exact[j]) < 1]
    return sorted(hidden)


def _shares(
    drafts: Sequence[_Draft | None],
    which: list[int],
    size: tuple[int, int],
    device: str | torch.device,
    before: dict[int, list[float]] | None = None,
) -> dict[int, list[float]]:
    """For each draft of ``which``, what its objects show in images of ``size``, view by view, as shares of what they must show.

    Only objects whose share was doubtful ``before`` are looked at, where that is given; the others have their old share.
    """
    scene3d = Scene3D([view for j in which for view in drafts[j].scene.views], *size, device)
    pairs = [list(chain(*scene3d.pair_of[k : k + len(VIEWS)])) for k in range(0, len(scene3d.views), len(VIEWS))]
    share = np.zeros(len(scene3d.kind))
    if before is not None:
        for j, own in zip(which, pairs):
            share[own] = before[j]
    asked = share < _SURELY_VISIBLE
    tiles = scene3d.tiles(1, scene3d.around(asked))
    count = np.array(_visible(scene3d, tiles, primary(scene3d, tiles, 1)))
    share = np.where(asked, count / min_visible(*size), share)
    return {j: share[own].tolist() for j, own in zip(which, pairs)}


def _next_draft(config: RenderConfig, number: int, change: str, count: int, attempt: int) -> tuple[_Draft, int]:
    """The first draw from ``attempt`` on that can be placed and described, and the attempt after it."""
    for i in range(attempt, ATTEMPTS):
        draft = _propose(config, change, count, generator(config.seed, "render", number, i))
        if draft is not None:
            return draft, i + 1
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
    far = max(width, height)
    low, high = np.full((len(scene3d.kind), 2), far), np.zeros((len(scene3d.kind), 2), np.int64)
    for pair, corner, seen in _sightings(scene3d, tiles, hits):
        # [T, 2, 8]: whether the object shows in a tile's columns and rows
        marks = torch.stack([seen.amax(1), seen.amax(2)], 1).cpu().numpy() > 0
        some = marks.any(2)
        np.minimum.at(low, pair, np.where(some, corner + marks.argmax(2), far))
        np.maximum.at(high, pair, np.where(some, corner + TILE - marks[..., ::-1].argmax(2), 0))
    low[high[:, 0] == 0] = 0
    boxes, visible = [tuple(box) for box in np.concatenate([low, high], 1).tolist()], _visible(scene3d, tiles, hits)
    by_scene = range(0, len(scene3d.views), len(VIEWS))
    boxes, visible = ([[values[pair] for pair in pairs] for pairs in scene3d.pair_of] for values in (boxes, visible))
    return Traced(scene3d, tiles, hits, [boxes[k : k + 3] for k in by_scene], [visible[k : k + 3] for k in by_scene])


def _sightings(scene3d: Scene3D, tiles: Tiles, hits: Hits) -> Iterator[tuple[np.ndarray, np.ndarray, torch.Tensor]]:
    """What shows of which object in which tile, in pieces: pair [T], the tile's first pixel [T, 2], and seen (0 or 1) [T, 8, 8]."""
    (rows, cols), size = scene3d.grid(1), np.array([[scene3d.width], [scene3d.height]])
    for met in hits.met:
        place = tiles.place[met.visits.tile.cpu().numpy()]
        corner = np.stack([place % cols, place // cols % rows], 1) * TILE
        seen = met.seen.view(-1, TILE, TILE)
        if (size % TILE).any():
            inside = torch.from_numpy((corner[..., None] + np.arange(TILE) < size).astype(np.float32)).to(seen.device)
            seen = seen * inside[:, 0, None] * inside[:, 1, :, None]
        yield met.visits.pair.cpu().numpy(), corner, seen


def _visible(scene3d: Scene3D, tiles: Tiles, hits: Hits) -> list[int]:
    """How many pixels of each pair show."""
    count = np.zeros(len(scene3d.kind))
    for pair, _, seen in _sightings(scene3d, tiles, hits):
        count += np.bincount(pair, seen.sum((1, 2)).cpu().numpy(), len(count))
    return count.astype(np.int64).tolist()


def _propose(config: RenderConfig, change: str, count: int, rng: np.random.Generator) -> _Draft | None:
    """One draw, or None where placement or captions fail; what is visible is for the caller to check."""
    cameras = [_jitter(BASE_POSITION, config.jitter, rng)]
    cameras += [_jitter(cameras[0], config.jitter, rng) for _ in VIEWS[1:]]
    before, after, distractor = (Camera(position) for position in cameras)
    lights = Lights(**{name: _jitter(position, 1.0, rng) for name, position in _LAMPS.items()})

    objects: list[Thing] = []
    for _ in range(count):
        thing = _place(_pick(rng, _LOOKS), objects, (before,), rng)
        if thing is None:
            return None
        objects.append(thing)

    if change == "add":
        new = _place(_pick(rng, _LOOKS), objects, (before, after), rng)
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
    views = View(before, first, lights), View(after, second, lights), View(distractor, first, lights)
    return _Draft(Scene(change, changed, views, (), ()), expressions, new, rng)


def _jitter(position: tuple[float, float, float], amount: float, rng: np.random.Generator) -> tuple[float, float, float]:
    x, y, z = (round(p + float(d), 6) for p, d in zip(position, rng.uniform(-amount, amount, 3)))
    return x, y, z


def _place(
    thing: Thing, others: list[Thing], cameras: tuple[Camera, ...], rng: np.random.Generator, away_from: Thing | None = None
) -> Thing | None:
    """``thing`` at a place that keeps distance and margin from ``others`` as every camera sees them, or None where no candidate does."""
    rotation = round(float(rng.uniform(0, 360)), 3)
    axes = [camera.directions[direction] for camera in cameras for direction in ("right", "behind")]
    # x, y, and how near to it the new centre may lie, squared; no margin is kept from where the object itself was.
    taken = [(o.x, o.y, (o.radius + thing.radius + MIN_DISTANCE) ** 2) for o in others]
    left = [] if away_from is None else [(away_from.x, away_from.y, MIN_MOVE**2)]

    def fits(x: float, y: float) -> bool:
        for ox, oy, apart in taken:
            dx, dy = x - ox, y - oy
            if dx * dx + dy * dy < apart:
                return False
            for ax, ay in axes:
                if -MARGIN < dx * ax + dy * ay < MARGIN:
                    return False
        return all((x - ox) ** 2 + (y - oy) ** 2 >= apart for ox, oy, apart in left)

    # Most objects find a place at once, which arrays are slow for.
    for x, y in rng.uniform(-3, 3, (_FIRST_LOOK, 2)).round(6).tolist():
        if fits(x, y):
            return replace(thing, x=x, y=y, rotation=rotation)
    circles, turn = np.array(taken + left).reshape(-1, 3), np.array(axes).T
    for count in (_SECOND_LOOK, CANDIDATES - _SECOND_LOOK - _FIRST_LOOK):
        places = rng.uniform(-3, 3, (count, 2)).round(6)
        # [axis, place, object]; the first camera's two axes are a turned x and y, so they give distances too.
        along = (places @ turn).T[:, :, None] - (circles[:, :2] @ turn).T[:, None]
        good = (along[0] ** 2 + along[1] ** 2 >= circles[:, 2]).all(1) & (abs(along[:, :, : len(taken)]) >= MARGIN).all((0, 2))
        if good.any():
            x, y = places[int(good.argmax())].tolist()
            return replace(thing, x=x, y=y, rotation=rotation)
    return None


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]
