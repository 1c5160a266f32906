"""A scene laid out for the ray-caster: per-object constants, screen-space windows, and frames cut into tiles of 8x8 rays.

An object is intersected only in the tiles that its window touches, its shadow only in those that the hull of object and shadow
touches. What is done there is elementwise on ``[tiles, 64]`` with per-object constants ``[tiles, 1]`` broadcast, because on a CPU a
gather costs ten times an arithmetic operation. All geometry happens in the object's own frame, scaled so that sphere, cube and
cylinder are the unit ones; a uniform scale keeps ray parameters, so depths need no way back.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastidc.data.render.camera import Camera, corners, focal_length, screen_window, sphere_window
from fastidc.data.render.outline import Outlines, outlines
from fastidc.data.render.things import COLORS, SHAPES, Thing

TILE = 8
RAYS = TILE * TILE
# The farthest ground, behind the fog.
FAR = 80.0
# Tiles that one elementwise operation takes at most: 512 KiB, enough arithmetic to outweigh the call.
CHUNK = 2048


@dataclass(frozen=True)
class Lights:
    """Positions (x, y, z) of the three lamps. Only the key light is near and casts shadows; the others shine from their direction."""

    key: tuple[float, float, float]
    fill: tuple[float, float, float]
    back: tuple[float, float, float]


@dataclass(frozen=True)
class View:
    """What one image shows: ``objects`` under ``lights``, seen by ``camera``."""

    camera: Camera
    objects: tuple[Thing, ...]
    lights: Lights


@dataclass
class Tiles:
    """``G`` tiles of 8x8 rays: ``image`` [G] int64, ``u``, ``v`` float32 [G, 1] of the first ray."""

    image: Tensor
    u: Tensor
    v: Tensor
    basis: Tensor  # [2, 64]: u and v of a tile's rays relative to its first
    place: np.ndarray  # int64 [G]: number of the tile in the full grid of its scale
    lookup: np.ndarray  # int64 [grid]: from that number to the tile's row, -1 where the tile is not here


class Constants:
    """Per-pair constants of some visits, by name: ``c[name]`` gives the components [T, 1] each, ``c.table(name)`` [T, n]."""

    def __init__(self, rows: Tensor, columns: dict[str, slice]) -> None:
        self._rows, self._columns = rows, columns

    def table(self, name: str) -> Tensor:
        """The components of one constant side by side: [T, n]."""
        return self._rows[:, self._columns[name]]

    def __getitem__(self, name: str) -> list[Tensor]:
        return list(self.table(name).split(1, 1))


@dataclass
class Visits:
    """``T`` encounters of one shape's windows with tiles: rows ``tile`` and ``pair`` int64 [T], ``kind`` an index into SHAPES."""

    kind: int
    tile: Tensor
    pair: Tensor
    constants: Constants

    @property
    def number(self) -> Tensor:
        """What ``Hits.owner`` holds where a visit's object is seen: pair + 1, float32 [T, 1]."""
        return (self.pair + 1).to(torch.float32)[:, None]


class Scene3D:
    """``K`` views at ``width`` x ``height``, ready to be traced on ``device``.

    A pair is an object in one view; pairs are ordered by shape and, within one, by view and place. ``pair_of[k][i]`` is the pair of
    object ``i`` in view ``k``.
    """

    def __init__(self, views: Sequence[View], width: int, height: int, device: str | torch.device = "cpu") -> None:
        self.views, self.width, self.height, self.device = views, width, height, torch.device(device)
        self.focal = focal_length(width, height)
        listed = [(SHAPES.index(o.shape), k, i) for k, view in enumerate(views) for i, o in enumerate(view.objects)]
        listed.sort()
        self.kind = np.array([kind for kind, _, _ in listed], dtype=np.int64)
        self.image = np.array([k for _, k, _ in listed], dtype=np.int64)
        self.pair_of = [[0] * len(view.objects) for view in views]
        for pair, (_, k, i) in enumerate(listed):
            self.pair_of[k][i] = pair
        self._shaded: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._build([views[k].objects[i] for _, k, i in listed])

    def _build(self, things: list[Thing]) -> None:
        extent = np.array([o.extent for o in things])
        angle = np.deg2rad([o.rotation for o in things])
        center = np.array([[o.x, o.y, o.extent] for o in things]).reshape(-1, 3)
        cos, sin, zero, one = np.cos(angle), np.sin(angle), np.zeros(len(things)), np.ones(len(things))
        # [P, 3, 3]: world to the object's frame, turned back and scaled to the unit shape
        frame = np.stack([np.stack(r, -1) for r in ((cos, sin, zero), (-sin, cos, zero), (zero, zero, one))], 1) / extent[:, None, None]
        axes = np.stack([view.camera.axes for view in self.views])[self.image]
        eye = np.array([view.camera.position for view in self.views])[self.image]
        key, fill, back = (np.array([getattr(v.lights, name) for v in self.views])[self.image] for name in ("key", "fill", "back"))

        def local(vectors: np.ndarray) -> np.ndarray:
            return (frame @ vectors[..., None])[..., 0]

        albedo = np.square(np.array([COLORS[o.color] for o in things]).reshape(-1, 3) / 255.0)
        columns = {
            "forward": local(axes[:, 2]),
            "right": local(axes[:, 0]),
            "up": local(axes[:, 1]),
            "eye": local(eye - center),
            "key": local(key - center),
            "eye from key": local(eye - key),
            "fill": local(fill / np.linalg.norm(fill, axis=1, keepdims=True)) * extent[:, None],
            "back": local(back / np.linalg.norm(back, axis=1, keepdims=True)) * extent[:, None],
            "albedo": albedo,
            "metal": np.array([[float(o.material == "metal")] for o in things]).reshape(-1, 1),
        }
        self._columns, start = {}, 0
        for name, values in columns.items():
            self._columns[name] = slice(start, start + values.shape[1])
            start += values.shape[1]
        self._table = torch.from_numpy(np.concatenate(list(columns.values()), 1).astype(np.float32)).to(self.device)
        self.extent, self.angle, self.center, self.axes, self.eye, self.key = extent, angle, center, axes, eye, key

        self.solid = corners(center, extent, angle)
        self.window = screen_window(self.seen(self.solid), self.focal, self.width, self.height)
        ball = self.kind == SHAPES.index("sphere")
        self.window[ball] = sphere_window(self.seen(center[:, None])[:, 0], extent, self.focal, self.width, self.height)[ball]
        seats = [[*v.camera.axes.ravel(), *v.camera.position, *v.lights.key] for v in self.views]
        self._seats = torch.tensor(seats, dtype=torch.float32, device=self.device)

    def seen(self, points: np.ndarray) -> np.ndarray:
        """World points [P, N, 3] as the camera of each pair sees them: right, up, depth."""
        return (points - self.eye[:, None]) @ self.axes.swapaxes(1, 2)

    def constants(self, pair: Tensor) -> Constants:
        """The per-pair constants of the visits of ``pair`` [T]."""
        return Constants(self._table.index_select(0, pair), self._columns)

    def seats(self, image: Tensor) -> list[Tensor]:
        """right, up, forward and position of the cameras of ``image`` [G], and their key lights: fifteen numbers [G, 1] each."""
        return list(self._seats.index_select(0, image).split(1, 1))

    def grid(self, scale: int) -> tuple[int, int]:
        """Tile rows and columns of one image at ``scale`` rays per pixel side."""
        return -(-self.height * scale // TILE), -(-self.width * scale // TILE)

    def tiles(self, scale: int, place: np.ndarray) -> Tiles:
        """The tiles numbered ``place`` int64 [G] (image, row, column order) at ``scale`` rays per pixel side."""
        rows, cols = self.grid(scale)
        lookup = np.full(len(self.views) * rows * cols, -1)
        lookup[place] = np.arange(len(place))
        step = 1 / (self.focal * scale)
        row, col = place // cols % rows, place % cols
        u = (col * TILE + 0.5 - self.width * scale / 2) * step
        v = (self.height * scale / 2 - row * TILE - 0.5) * step
        across = torch.arange(TILE, dtype=torch.float32, device=self.device) * step
        basis = torch.stack([across.repeat(TILE), -across.repeat_interleave(TILE)])
        as_column = [torch.from_numpy(x.astype(np.float32)[:, None]).to(self.device) for x in (u, v)]
        return Tiles(
            torch.from_numpy(place // (rows * cols)).to(self.device),
            *as_column,
            basis,
            place,
            lookup,
        )

    def touched(self) -> np.ndarray:
        """Numbers, ascending, of the tiles at one ray per pixel that any object or shadow may reach: int64 [G]."""
        busy = np.zeros(len(self.views) * self.grid(1)[0] * self.grid(1)[1], dtype=bool)
        _, place, ground = self.shaded(1)
        for reached in (self.encounters(self.window, 1)[1], place[ground], self.encounters(self.outlines.reach, 1)[1]):
            busy[reached] = True
        return np.flatnonzero(busy)

    def around(self, asked: np.ndarray) -> np.ndarray:
        """Numbers, ascending, of the tiles at one ray per pixel that the pairs with ``asked`` bool [P] may show in: int64 [G]."""
        pair, place = self.encounters(self.window, 1)
        return np.unique(place[asked[pair]])

    def encounters(self, windows: np.ndarray, scale: int) -> tuple[np.ndarray, np.ndarray]:
        """(pair, number of the tile), int64 [T] each, for every tile that a pair's pixel rectangle touches, pair by pair."""
        rows, cols = self.grid(scale)
        first = windows[:, :2] * scale // TILE
        size = -(-windows[:, 2:] * scale // TILE) - first
        size[(windows[:, 2:] <= windows[:, :2]).any(1)] = 0
        count = size[:, 0] * size[:, 1]
        pair = np.repeat(np.arange(len(count)), count)
        index = np.arange(len(pair)) - np.repeat(np.cumsum(count) - count, count)
        down, across = np.divmod(index, size[pair, 0])
        return pair, ((self.image * rows + first[:, 1]) * cols + first[:, 0])[pair] + down * cols + across

    def visits(self, tile: np.ndarray, pair: np.ndarray) -> Iterator[Visits]:
        """The encounters of ``pair`` [T], ascending, with rows ``tile`` [T] of some tiles, in pieces of one shape."""
        bounds = np.searchsorted(self.kind[pair], np.arange(len(SHAPES) + 1)).tolist()
        tile, pair = torch.from_numpy(tile).to(self.device), torch.from_numpy(pair).to(self.device)
        for shape, (start, stop) in enumerate(itertools.pairwise(bounds)):
            for part in pieces(start, stop):
                yield Visits(shape, tile[part], pair[part], self.constants(pair[part]))

    def local_rays(self, tiles: Tiles, visits: Visits, basis: Tensor) -> list[Tensor]:
        """Ray directions x, y, z in the frame of each visit's object, [T, n] each, with forward component 1 in camera space.

        ``basis`` [2, n]: u and v of the rays wanted, relative to a tile's first; ``tiles.basis`` for all 64.
        """
        u, v = tiles.u.index_select(0, visits.tile), tiles.v.index_select(0, visits.tile)
        forward, right, up = (visits.constants.table(name) for name in ("forward", "right", "up"))
        start = torch.addcmul(torch.addcmul(forward, u, right), v, up).split(1, 1)
        rays = [torch.addcmul(first, step, basis[1]) for first, step in zip(start, up.split(1, 1))]
        # The right axis has no z.
        for ray, step in zip(rays[:2], right.split(1, 1)):
            ray.addcmul_(step, basis[0])
        return rays

    def ground_depth(self, tiles: Tiles, basis: Tensor) -> Tensor:
        """Depth of the ground along the rays ``basis`` [2, n], at most ``FAR``: [G, n]. It depends on the row alone, because no camera rolls."""
        camera = self.seats(tiles.image)
        fall = torch.addcmul(-(camera[8] + tiles.v * camera[5]), camera[5], basis[1], value=-1)
        return camera[11] / torch.maximum(fall, camera[11] / FAR, out=fall)

    @cached_property
    def outlines(self) -> Outlines:
        """Where the shadows of the pairs may fall."""
        return outlines(self)

    def shaded(self, scale: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pair, number of the tile, whether its ground may be in shadow), [T] each, for every tile that a pair may shadow."""
        if scale in self._shaded:
            return self._shaded[scale]
        rows, cols = self.grid(scale)
        pair, place = self.encounters(self.outlines.window, scale)
        down, across = place // cols % rows, place % cols
        x, y, low, high = self.outlines.slab[pair].T
        middle, reach = x * (across + 0.5) + y * (down + 0.5), (abs(x) + abs(y)) / 2 + 1e-6
        keep = ((middle + reach) * (TILE / scale) >= low) & ((middle - reach) * (TILE / scale) <= high)
        pair, place, down, across = pair[keep], place[keep], down[keep], across[keep]
        # The most that each side's linear function reaches in the tile decides.
        half = TILE / 2 / (self.focal * scale)
        u = (across + 0.5) * (2 * half) - self.width / 2 / self.focal
        v = self.height / 2 / self.focal - (down + 0.5) * (2 * half)
        a, b, c = np.moveaxis(self.outlines.sides, -1, 0)
        most = (a + half * (abs(b) + abs(c)) + 1e-6)[pair] + b[pair] * u[:, None] + c[pair] * v[:, None]
        self._shaded[scale] = pair, place, (most >= 0).all(1)
        return self._shaded[scale]

    def rows(self, tiles: Tiles, values: Tensor) -> Tensor:
        """``values`` [G, 64] of ``tiles`` at scale 1 as images, 0 elsewhere: [K, H', W'], padded to whole tiles."""
        rows, cols = self.grid(1)
        full = values.new_zeros(len(self.views) * rows * cols, RAYS)
        full[torch.from_numpy(tiles.place).to(self.device)] = values
        return untile(full, len(self.views), rows, cols)


def pieces(start: int, stop: int) -> Iterator[slice]:
    """``start`` to ``stop`` in the fewest pieces of at most ``CHUNK``, about equally long."""
    count = -(-(stop - start) // CHUNK)
    marks = [start + (stop - start) * i // max(count, 1) for i in range(count + 1)]
    return (slice(low, high) for low, high in itertools.pairwise(marks))


def untile(values: Tensor, images: int, rows: int, cols: int) -> Tensor:
    """All tiles of a grid, [images * rows * cols, 64], as images [images, rows * 8, cols * 8]."""
    return values.view(images, rows, cols, TILE, TILE).permute(0, 1, 3, 2, 4).reshape(images, rows * TILE, cols * TILE)
