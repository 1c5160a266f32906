"""The ray-caster proper: which object each ray meets first, and how deep.

Conditions are arithmetic (multiply by ``HUGE``, clamp), because comparisons and selections cost several times as much.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastidc.data.render.space import Scene3D, Tiles, Visits
from fastidc.data.render.things import SHAPES

# A ray that meets nothing has this parameter at least; far behind the farthest ground.
MISS = 1e6
# Turns the sign of a difference into 0 or 1 by multiplying and clamping.
HUGE = 1e30

# torch says once per process that this operation is in beta; what it computes is checked against brute force in the tests.
warnings.filterwarnings("ignore", message=r"index_reduce\(\) is in beta", category=UserWarning)


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch on one thread, without gradients, with denormal numbers flushed to zero; the settings of before come back after.

    Rendering happens inside: one thread keeps the bytes the same on every machine (how a tensor is cut among threads decides which
    elements the vectorised code takes), and powers of small numbers are slow as denormals.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


@dataclass
class Met:
    """Visits with an object in sight: entry parameter (depth) ``t`` [T, 64], and ``seen`` [T, 64], 1 where the ray meets it first, else 0.

    Every visit has a ray that does.
    """

    visits: Visits
    t: Tensor
    seen: Tensor


@dataclass
class Hits:
    """What the primary rays met: ``depth`` and ``owner`` (0 ground, pair + 1) float32 [G, 64], and the visits behind them."""

    depth: Tensor
    owner: Tensor
    met: list[Met]


def primary(scene: Scene3D, tiles: Tiles, scale: int) -> Hits:
    """What each ray of ``tiles`` meets first."""
    depth = scene.ground_depth(tiles, tiles.basis)
    pair, place = scene.encounters(scene.window, scale)
    tile = tiles.lookup[place]
    entered = []
    for visits in scene.visits(tile[tile >= 0], pair[tile >= 0]):
        t = intersect(visits.kind, visits.constants["eye"], scene.local_rays(tiles, visits, tiles.basis))
        depth.index_reduce_(0, visits.tile, t, "amin")
        entered.append((visits, t))
    owner = torch.zeros_like(depth)
    met = []
    for visits, t in entered:
        seen = is_zero(t - depth.index_select(0, visits.tile))
        # A window's corners, and what other objects hide, are done with.
        keep = torch.nonzero(seen.amax(1))[:, 0]
        tile, pair, t, seen = (x.index_select(0, keep) for x in (visits.tile, visits.pair, t, seen))
        visits = Visits(visits.kind, tile, pair, scene.constants(pair))
        owner.index_add_(0, tile, seen * visits.number)
        met.append(Met(visits, t, seen))
    return Hits(depth, owner, met)


def is_zero(x: Tensor) -> Tensor:
    """1 where ``x`` >= 0 is exactly 0, else 0; in place. Comparisons and selections cost ten times as much as arithmetic."""
    return x.mul_(-HUGE).add_(1).clamp_(min=0)


def intersect(kind: int, origin: list[Tensor], ray: list[Tensor]) -> Tensor:
    """Parameter [T, 64] at which rays enter the unit shape ``kind``; beyond ``MISS``, but finite, where they do not.

    ``origin`` [T, 1], outside of the shape, and ``ray`` [T, 64] are x, y, z in the objects' frames.
    """
    return _INTERSECT[kind](*origin, *ray)


def _slab(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters at which a ray enters and leaves -1..1 on one axis."""
    inverse = d.reciprocal()
    middle, half = inverse * o, inverse.abs_()
    return torch.add(middle, half).neg_(), half.sub_(middle)


def _interval(near: Tensor, far: Tensor) -> Tensor:
    """``near`` where it comes before ``far``, else beyond ``MISS``; in place."""
    return near.add_(torch.sub(near, far).mul_(HUGE).clamp_(0, 2 * MISS))


def _cube(ox, oy, oz, dx, dy, dz) -> Tensor:
    near, far = _slab(ox, dx)
    for o, d in ((oy, dy), (oz, dz)):
        enter, leave = _slab(o, d)
        near, far = torch.maximum(near, enter, out=near), torch.minimum(far, leave, out=far)
    return _interval(near, far)


def _round(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Middle and half distance of the roots of a t^2 + 2 b t + c, and what to add to the first root where they are not real."""
    square = torch.addcmul(b * b, a, c, value=-1)
    miss = (square * -HUGE).clamp_(0, 2 * MISS)
    inverse = a.reciprocal_()
    return b.mul_(inverse).neg_(), square.clamp_(min=0).sqrt_().mul_(inverse), miss


def _sphere(ox, oy, oz, dx, dy, dz) -> Tensor:
    a = (dx * dx).addcmul_(dy, dy).addcmul_(dz, dz)
    b = (ox * dx).addcmul_(oy, dy).addcmul_(oz, dz)
    middle, half, miss = _round(a, b, ox * ox + oy * oy + oz * oz - 1)
    return middle.sub_(half).add_(miss)


def _cylinder(ox, oy, oz, dx, dy, dz) -> Tensor:
    a = (dx * dx).addcmul_(dy, dy)
    b = (ox * dx).addcmul_(oy, dy)
    middle, half, miss = _round(a, b, ox * ox + oy * oy - 1)
    enter, leave = _slab(oz, dz)
    near = torch.maximum(middle - half, enter, out=enter)
    far = torch.minimum(middle.add_(half), leave, out=leave)
    return _interval(near, far).add_(miss)


_INTERSECT = tuple({"cube": _cube, "sphere": _sphere, "cylinder": _cylinder}[shape] for shape in SHAPES)
