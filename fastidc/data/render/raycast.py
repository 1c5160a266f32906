"""The ray-caster proper: which object each ray meets first, how deep, and what shadow it stands in.

Conditions are arithmetic (multiply by ``HUGE``, clamp), because comparisons and selections cost several times as much.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastidc.data.render.space import OCCLUSION_REACH, Scene3D, Tiles, Visits
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
    """The primary rays of some visits: entry parameter ``t`` (depth) and direction ``ray`` x, y, z in the object's frame, [T, 64]."""

    scene: Scene3D
    visits: Visits
    t: Tensor
    ray: list[Tensor]

    def first(self, depth: Tensor) -> Tensor:
        """1 where this visit's object is what the ray sees, given the frame's ``depth`` [G, 64], else 0: [T, 64]."""
        return is_zero(self.t - depth.index_select(0, self.visits.tile))

    def rows(self, keep: Tensor, mask: Tensor) -> tuple["Met", Tensor]:
        """The visits numbered ``keep`` int64 [T'] alone, and those rows of ``mask`` [T, 64]."""
        tile, pair = (x.index_select(0, keep) for x in (self.visits.tile, self.visits.pair))
        ray = [x.index_select(0, keep) for x in self.ray]
        visits = Visits(self.visits.kind, tile, pair, self.scene.constants(pair))
        return Met(self.scene, visits, self.t.index_select(0, keep), ray), mask.index_select(0, keep)


@dataclass
class Hits:
    """What the primary rays met: ``depth`` and ``owner`` (0 ground, pair + 1) float32 [G, 64], and the visits behind them."""

    depth: Tensor
    owner: Tensor
    met: list[Met]


def primary(scene: Scene3D, tiles: Tiles, scale: int) -> Hits:
    """What each ray of ``tiles`` meets first."""
    depth = scene.ground_depth(tiles)
    met = []
    for visits in scene.visits(tiles, scene.window, scale):
        rays = scene.local_rays(tiles, visits)
        t = intersect(visits.kind, visits.constants["eye"], rays)
        depth.index_reduce_(0, visits.tile, t, "amin")
        met.append(Met(scene, visits, t, rays))
    owner = torch.zeros_like(depth)
    for m in met:
        owner.index_add_(0, m.visits.tile, m.first(depth).mul_((m.visits.pair + 1)[:, None]))
    return Hits(depth, owner, met)


def shadows(scene: Scene3D, tiles: Tiles, hits: Hits, scale: int) -> tuple[Tensor, Tensor]:
    """Key-light shadow (0 or 1) and ambient occlusion of the ground in [0, 1]: float32 [G, 64] each.

    A shadow ray runs from the light (parameter 0) to the seen point (1). An object never shadows itself here: all three shapes
    are convex, so its own shadow is where its surface faces away from the light.
    """
    shadow, occlusion = torch.zeros_like(hits.depth), torch.zeros_like(hits.depth)
    for visits in scene.visits(tiles, scene.shadow_window, scale, scene.shadow_slabs):
        point = scene.local_rays(tiles, visits)
        depth = hits.depth.index_select(0, visits.tile)
        for p, o in zip(point, visits.constants["eye"]):
            p.mul_(depth).add_(o)
        near = (point[0] * point[0]).addcmul_(point[1], point[1]).add_(1).rsqrt_()
        near = (near * near).mul_(near).sub_((1 + OCCLUSION_REACH**2) ** -1.5).clamp_(min=0)
        key = visits.constants["key"]
        t = intersect(visits.kind, key, [p.sub_(k) for p, k in zip(point, key)])
        other = hits.owner.index_select(0, visits.tile).sub_((visits.pair + 1)[:, None]).abs_().clamp_(max=1)
        shadow.index_add_(0, visits.tile, t.neg_().add_(1).mul_(HUGE).clamp_(0, 1).mul_(other))
        occlusion.index_add_(0, visits.tile, near)
    return shadow.clamp_(max=1), occlusion.clamp_(max=1)


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
