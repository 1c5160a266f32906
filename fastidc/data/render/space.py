"""A scene laid out for the ray-caster: per-object constants, screen-space windows, and frames cut into tiles of 8x8 rays.

An object is intersected only in the tiles that its window touches, its shadow only in those that the hull of object and shadow
touches. What is done there is elementwise on ``[tiles, 64]`` with per-object constants ``[tiles, 1]`` broadcast, because on a CPU a
gather costs ten times an arithmetic operation. All geometry happens in the object's own frame, scaled so that sphere, cube and
cylinder are the unit ones; a uniform scale keeps ray parameters, so depths need no way back.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastidc.data.render.camera import Camera, corners, focal_length, ground_shadow, screen_window, sphere_window
from fastidc.data.render.things import COLORS, SHAPES, Thing

TILE = 8
RAYS = TILE * TILE
# The farthest ground, behind the fog.
FAR = 80.0
# Ambient occlusion of the ground is dropped beyond this many extents from an object.
OCCLUSION_REACH = 1.6
# Tiles that one elementwise operation takes: 128 KiB, so that a chain of them stays in the cache.
CHUNK = 512


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
    du: Tensor  # [64], of a tile's rays relative to its first
    dv: Tensor  # [64]
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
            return np.einsum("pij,pj->pi", frame, vectors)

        albedo = np.square(np.array([COLORS[o.color] for o in things]).reshape(-1, 3) / 255.0)
        columns = {
            "forward": local(axes[:, 2]),
            "right": local(axes[:, 0]),
            "up": local(axes[:, 1]),
            "eye": local(eye - center),
            "key": local(key - center),
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

        solid = corners(center, extent, angle)
        shadow = np.concatenate([solid, ground_shadow(solid, key[:, None])], 1)
        reach = center[:, None] + np.array([[x, y, 0.0] for x in (-1, 1) for y in (-1, 1)]) * (OCCLUSION_REACH * extent[:, None, None])
        reach[..., 2] = 0
        everything = np.concatenate([solid, shadow, reach], 1)

        def seen(points: np.ndarray) -> np.ndarray:
            return np.einsum("pnj,pij->pni", points - eye[:, None], axes)

        self.window = screen_window(seen(solid), self.focal, self.width, self.height)
        ball = self.kind == SHAPES.index("sphere")
        self.window[ball] = sphere_window(seen(center[:, None])[:, 0], extent, self.focal, self.width, self.height)[ball]
        everything = seen(everything)
        self.shadow_window = screen_window(everything, self.focal, self.width, self.height)
        # Shadows run aslant: a slab along the line from the object to its shadow's end leaves out the corners of the rectangle.
        pixel = everything[..., :2] / np.maximum(everything[..., 2:], 0.05) * (self.focal, -self.focal) + (self.width / 2, self.height / 2)
        along = pixel[:, 8:24].mean(1) - pixel[:, :8].mean(1)
        along /= np.maximum(np.linalg.norm(along, axis=1), 1e-9)[:, None]
        across = (pixel * np.stack([-along[:, 1], along[:, 0]], 1)[:, None]).sum(-1)
        self.shadow_slabs = np.stack([-along[:, 1], along[:, 0], across.min(1) - 1, across.max(1) + 1], 1)
        self.shadow_slabs[(everything[..., 2] <= 0.05).any(1), 2:] = (-np.inf, np.inf)
        seats = [[*v.camera.axes.ravel(), *v.camera.position, *v.lights.key] for v in self.views]
        self._seats = torch.tensor(seats, dtype=torch.float32, device=self.device)

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
        as_column = [torch.from_numpy(x.astype(np.float32)[:, None]).to(self.device) for x in (u, v)]
        return Tiles(
            torch.from_numpy(place // (rows * cols)).to(self.device),
            *as_column,
            across.repeat(TILE),
            -across.repeat_interleave(TILE),
            place,
            lookup,
        )

    def touched(self) -> np.ndarray:
        """Numbers, ascending, of the tiles at one ray per pixel that any object or shadow may reach: int64 [G]."""
        busy = np.zeros(len(self.views) * self.grid(1)[0] * self.grid(1)[1], dtype=bool)
        for windows, slabs in ((self.window, None), (self.shadow_window, self.shadow_slabs)):
            busy[self._encounters(windows, 1, slabs)[1]] = True
        return np.flatnonzero(busy)

    def _encounters(self, windows: np.ndarray, scale: int, slabs: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(pair, number of the tile), int64 [T] each, for every tile that a pair's window touches, pair by pair."""
        rows, cols = self.grid(scale)
        first = windows[:, :2] * scale // TILE
        size = -(-windows[:, 2:] * scale // TILE) - first
        size[(windows[:, 2:] <= windows[:, :2]).any(1)] = 0
        count = size[:, 0] * size[:, 1]
        pair = np.repeat(np.arange(len(count)), count)
        index = np.arange(len(pair)) - np.repeat(np.cumsum(count) - count, count)
        down, across = np.divmod(index, size[pair, 0])
        across, down = across + first[pair, 0], down + first[pair, 1]
        place = (self.image[pair] * rows + down) * cols + across
        if slabs is not None:
            x, y, low, high = slabs[pair].T
            middle = x * (across + 0.5) + y * (down + 0.5)
            reach = (abs(x) + abs(y)) / 2 + 1e-6
            keep = ((middle + reach) * (TILE / scale) >= low) & ((middle - reach) * (TILE / scale) <= high)
            pair, place = pair[keep], place[keep]
        return pair, place

    def visits(self, tiles: Tiles, windows: np.ndarray, scale: int, slabs: np.ndarray | None = None) -> Iterator[Visits]:
        """Every tile of ``tiles`` that a pair's pixel rectangle ``windows`` [P, 4] touches, in pieces of one shape that fit a cache.

        ``slabs`` [P, 4], where given, cuts the rectangle along a slanted direction too: pixels p with low <= x p_x + y p_y <= high.
        """
        pair, place = self._encounters(windows, scale, slabs)
        tile = tiles.lookup[place]
        pair, tile = pair[tile >= 0], tile[tile >= 0]
        bounds = np.searchsorted(self.kind[pair], np.arange(len(SHAPES) + 1)).tolist()
        tile, pair = torch.from_numpy(tile).to(self.device), torch.from_numpy(pair).to(self.device)
        for shape, (start, stop) in enumerate(itertools.pairwise(bounds)):
            for low in range(start, stop, CHUNK):
                part = slice(low, min(low + CHUNK, stop))
                yield Visits(shape, tile[part], pair[part], self.constants(pair[part]))

    def local_rays(self, tiles: Tiles, visits: Visits) -> list[Tensor]:
        """Ray directions x, y, z in the frame of each visit's object, [T, 64] each, with forward component 1 in camera space."""
        u, v = tiles.u.index_select(0, visits.tile), tiles.v.index_select(0, visits.tile)
        forward, right, up = (visits.constants.table(name) for name in ("forward", "right", "up"))
        start = torch.addcmul(torch.addcmul(forward, u, right), v, up).split(1, 1)
        rays = [(step * tiles.dv).add_(first) for step, first in zip(up.split(1, 1), start)]
        # The right axis has no z, so there are two more products, not three.
        for ray, step in zip(rays[:2], right.split(1, 1)):
            ray.add_(step * tiles.du)
        return rays

    def ground_depth(self, tiles: Tiles) -> Tensor:
        """Depth of the ground along each ray, at most ``FAR``: [G, 64]. It depends on the row alone, because no camera rolls."""
        camera = self.seats(tiles.image)
        fall = (-camera[5] * tiles.dv).sub_(camera[8] + tiles.v * camera[5])
        return camera[11] / torch.maximum(fall, camera[11] / FAR, out=fall)

    def rows(self, tiles: Tiles, values: Tensor) -> Tensor:
        """``values`` [G, 64] of ``tiles`` at scale 1 as images, 0 elsewhere: [K, H', W'], padded to whole tiles."""
        rows, cols = self.grid(1)
        full = values.new_zeros(len(self.views) * rows * cols, RAYS)
        full[torch.from_numpy(tiles.place).to(self.device)] = values
        return untile(full, len(self.views), rows, cols)


def untile(values: Tensor, images: int, rows: int, cols: int) -> Tensor:
    """All tiles of a grid, [images * rows * cols, 64], as images [images, rows * 8, cols * 8]."""
    return values.view(images, rows, cols, TILE, TILE).permute(0, 1, 3, 2, 4).reshape(images, rows * TILE, cols * TILE)
