"""Shadows of the key light, by rays, and the ambient occlusion of the ground."""

import numpy as np
import torch
from torch import Tensor

from fastidc.data.render.outline import OCCLUSION_REACH
from fastidc.data.render.raycast import HUGE, Hits, intersect
from fastidc.data.render.space import TILE, Scene3D, Tiles

# Occlusion is so smooth that a cubic through 4x4 rays of a tile gives the other 48.
_NODES = 6


def shadows(scene: Scene3D, tiles: Tiles, hits: Hits, scale: int) -> tuple[Tensor, Tensor]:
    """Key-light shadow (0 or 1) and ambient occlusion of the ground in [0, 1]: float32 [G, 64] each.

    A shadow ray runs from the light (parameter 0) to the seen point (1). An object never shadows itself here: all three shapes
    are convex, so its own shadow is where its surface faces away from the light.
    """
    shadow = torch.zeros_like(hits.depth)
    for visits in scene.visits(*_candidates(scene, tiles, hits, scale)):
        depth = hits.depth.index_select(0, visits.tile)
        ray = [
            torch.addcmul(o, r, depth, out=r)
            for r, o in zip(scene.local_rays(tiles, visits, tiles.basis), visits.constants["eye from key"])
        ]
        t = intersect(visits.kind, visits.constants["key"], ray)
        other = hits.owner.index_select(0, visits.tile).sub_(visits.number).abs_()
        # Where the owner is another one, the difference is 1 at least.
        shadow.index_add_(0, visits.tile, t.neg_().add_(1).mul_(HUGE).clamp_(0, 1).mul_(other))
    return shadow.clamp_(max=1), _occlusion(scene, tiles, scale)


def _candidates(scene: Scene3D, tiles: Tiles, hits: Hits, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """(row of the tile, pair), int64 [T] each, of all tiles that a pair may shadow."""
    pair, place, ground = scene.shaded(scale)
    tile = tiles.lookup[place]
    here = tile >= 0
    pair, tile, ground = pair[here], tile[here], ground[here]
    # A tile that shows no object but the one that casts the shadow has it only on its ground.
    count, total = np.zeros(len(tiles.place), np.int64), np.zeros(len(tiles.place), np.int64)
    for met in hits.met:
        np.add.at(count, (rows := met.visits.tile.cpu().numpy()), 1)
        np.add.at(total, rows, met.visits.pair.cpu().numpy())
    alone = (count[tile] == 0) | ((count[tile] == 1) & (total[tile] == pair))
    keep = np.where(alone, ground & (hits.owner.amin(1) == 0).cpu().numpy()[tile], True)
    return tile[keep], pair[keep]


def _occlusion(scene: Scene3D, tiles: Tiles, scale: int) -> Tensor:
    """How much of the sky the objects take from the ground: [G, 64]."""
    marks = np.linspace(0, TILE - 1, _NODES)
    rays = np.arange(TILE)
    line = np.stack([np.prod([(rays - m) / (mark - m) for m in marks if m != mark], 0) for mark in marks])
    weights = torch.from_numpy(np.kron(line, line).astype(np.float32)).to(scene.device)
    step = torch.from_numpy(marks.astype(np.float32)).to(scene.device) / (scene.focal * scale)
    basis = torch.stack([step.repeat(_NODES), -step.repeat_interleave(_NODES)])
    depth = scene.ground_depth(tiles, basis)
    taken = torch.zeros_like(depth)
    pair, place = scene.encounters(scene.outlines.reach, scale)
    tile = tiles.lookup[place]
    for visits in scene.visits(tile[tile >= 0], pair[tile >= 0]):
        rays, here = scene.local_rays(tiles, visits, basis), depth.index_select(0, visits.tile)
        x, y = (torch.addcmul(o, r, here) for r, o in zip(rays[:2], visits.constants["eye"]))
        near = x.square_().addcmul_(y, y).add_(1).rsqrt_()
        taken.index_add_(0, visits.tile, (near * near).mul_(near).sub_((1 + OCCLUSION_REACH**2) ** -1.5).clamp_(min=0))
    return torch.mm(taken, weights).clamp_(0, 1)
