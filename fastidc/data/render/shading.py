"""From geometry to pixels: lamps, the two materials, the ground, and smooth edges.

Colours are linear light; display is their square root (gamma 2, exact in hardware, so it costs no power function). Metal differs from
rubber by a mirrored ground, sky and lamps, a darker diffuse part and a sharp highlight.
"""

import numpy as np
import torch
from torch import Tensor

from fastidc.data.render.raycast import Hits, Met, is_zero, primary
from fastidc.data.render.shadow import shadows
from fastidc.data.render.space import FAR, RAYS, TILE, Scene3D, Tiles, pieces, untile
from fastidc.data.render.things import SHAPES

_KEY, _FILL, _BACK, _AMBIENT = 0.62, 0.20, 0.22, 0.30
_GROUND, _BACKDROP = 0.52, 0.27
# Rays per pixel side where an edge or a shadow's border runs through.
_FINE = 2
_BLOCK = TILE // _FINE
# A gray byte in each of a pixel's three channels.
_GRAY = 1 + 256 + 65536
_ALPHA = 1 << 24


def shade(scene: Scene3D, tiles: Tiles, hits: Hits, scale: int) -> tuple[Tensor, list[tuple[Tensor, list[Tensor]]], Tensor]:
    """Display colours in 0 to 255 and where edges lie.

    Returns the ground's gray [G, 64], 0 under objects; (tile rows [T], (red, green, blue) [T, 64] each) of the objects, piece by
    piece, 0 where the ray does not see them; and a code [G, 64] that differs between neighbours wherever an edge or a shadow's
    border runs.
    """
    shadow, occlusion = shadows(scene, tiles, hits, scale)
    lit = shadow.neg_().add_(1)
    floor = _ground(scene, tiles, lit, occlusion, hits.owner, scale)
    painted, faces = [], []
    for met in hits.met:
        tile = met.visits.tile
        colours, face = _objects(met, scene.local_rays(tiles, met.visits, tiles.basis), lit.index_select(0, tile))
        if face is not None:
            faces.append((tile, face.mul_(met.seen)))
        strength = met.seen * 255
        painted.append((tile, [c.clamp_(0, 1).sqrt_().mul_(strength) for c in colours]))
    # 0 where nothing stands and no shadow falls, as beyond the tiles.
    code = lit.sub_(1).add_(hits.owner, alpha=16)
    for tile, face in faces:
        code.index_add_(0, tile, face)
    return floor, painted, code


def _bare_ground(scene: Scene3D, scale: int) -> tuple[Tensor, Tensor]:
    """Ambient and key light that the ground sends back where nothing stands, at the four corners of every tile: [grid, 4] each."""
    rows, cols = scene.grid(scale)
    step = TILE / (scene.focal * scale)
    u = torch.arange(cols + 1, dtype=torch.float32, device=scene.device) * step - scene.width / 2 / scene.focal
    v = scene.height / 2 / scene.focal - torch.arange(rows + 1, dtype=torch.float32, device=scene.device)[:, None] * step
    seats = scene.seats(torch.arange(len(scene.views), device=scene.device))
    rx, ry, _, ux, uy, uz, fx, fy, fz, px, py, pz, lx, ly, lz = (seat[..., None] for seat in seats)
    depth = pz / torch.maximum(-(fz + v * uz), pz / FAR)
    x, y = px + depth * (fx + u * rx + v * ux), py + depth * (fy + u * ry + v * uy)
    cosine = lz * ((x - lx).square() + (y - ly).square() + lz * lz).rsqrt()
    radius2 = x.square() + y.square()
    pool = 1 / (1 + radius2 / 220)
    fog = (radius2 / 500).clamp(max=1)
    fog = fog * fog * (3 - 2 * fog)
    ambient = (1 - fog) * (_GROUND * (_AMBIENT + 0.22) * pool) + fog * _BACKDROP
    key = (1 - fog) * (_GROUND * _KEY * pool * (0.35 + 0.65 * cosine))

    def four(values: Tensor) -> Tensor:
        left, right = values[:, :, :-1], values[:, :, 1:]
        return torch.stack([left[:, :-1], right[:, :-1], left[:, 1:], right[:, 1:]], -1).view(-1, 4)

    return four(ambient), four(key)


def _between(device: torch.device) -> Tensor:
    """[4, 64]: weights of a tile's corners at its rays. Light bends too little within eight pixels to see."""
    right = (torch.arange(TILE, dtype=torch.float32, device=device) + 0.5) / TILE
    line = torch.stack([1 - right, right])
    return torch.kron(line, line)


def _ground(scene: Scene3D, tiles: Tiles, lit: Tensor, occlusion: Tensor, owner: Tensor, scale: int) -> Tensor:
    """Display gray of the ground [G, 64] with its shadows, 0 under objects."""
    place = torch.from_numpy(tiles.place).to(scene.device)
    ambient, key = (corners.index_select(0, place) for corners in _bare_ground(scene, scale))
    weights = _between(scene.device)
    gray = torch.empty_like(lit)
    for part in pieces(0, len(gray)):
        light = torch.mm(ambient[part], weights).mul_((occlusion[part] * -0.85).add_(1))
        light.addcmul_(torch.mm(key[part], weights), lit[part])
        strength = owner[part].clamp(max=1).sub_(1).mul_(-255)
        torch.mul(light.sqrt_(), strength, out=gray[part])
    return gray


def _normals(kind: int, point: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """Unit normals x, y, z in the object's frame at ``point`` on the unit shape, and a face number (even, below 16), [T, 64] each."""
    x, y, z = point
    if SHAPES[kind] == "sphere":
        return point, None
    if SHAPES[kind] == "cylinder":
        cap = z.abs().sub_(0.9999).mul_(1e9).clamp_(0, 1)
        side = 1 - cap
        return [x * side, y * side, cap], cap * 2
    size = [p.abs() for p in point]
    largest = torch.maximum(torch.maximum(size[0], size[1]), size[2])
    on = [is_zero(largest - s) for s in size]
    return [p * m for p, m in zip(point, on)], on[1].mul_(2).add_(on[2], alpha=4)


def _objects(met: Met, ray: list[Tensor], lit: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Linear red, green, blue of every visit's object where its ray enters it, [T, 64] each, and the face number there.

    Rays that miss get some finite colour: the caller masks it.
    """
    constants = met.visits.constants
    t = met.t.clamp(max=100)
    point = [torch.addcmul(o, t, d) for o, d in zip(constants["eye"], ray)]
    normal, face = _normals(met.visits.kind, point)
    length = _dot(ray, ray).rsqrt_()
    ray = [r.mul_(length) for r in ray]
    away = _dot(normal, ray)
    twice = away * -2
    mirror = [torch.addcmul(r, n, twice) for r, n in zip(ray, normal)]

    toward = _toward(constants["key"], point)
    cosine = _dot(normal, toward).clamp_(min=0).mul_(lit)
    gleam = _power(_dot(mirror, toward).clamp_(0, 1), 3).mul_(lit)
    diffuse = (normal[2] * (0.38 * _AMBIENT)).add_(0.62 * _AMBIENT).mul_((point[2] * 0.225).add_(0.775))
    diffuse.add_(cosine, alpha=_KEY)
    for name, strength in (("fill", _FILL), ("back", _BACK)):
        diffuse.add_(_dot(normal, constants[name]).clamp_(min=0), alpha=strength)
    sky = _surroundings(point, mirror)
    # A broad soft lamp, which a curved or tilted mirror shows as a stripe.
    sky.add_(_power(_dot(mirror, constants["fill"]).clamp_(0, 1), 2), alpha=0.9)
    fresnel = _power(away.add_(1).clamp_(0, 1), 2)
    (metal,) = constants["metal"]
    # Per visit, rubber is diffuse and glow, metal is a tinted mirror that whitens at grazing angles; nothing else differs.
    lobes = _power(gleam, 3).mul_(1.4 * metal).addcmul_(gleam, 0.07 - 0.07 * metal).addcmul_(fresnel.add_(0.15).mul_(sky), 0.30 * metal)
    colours = []
    for albedo in constants["albedo"]:
        tint = (0.08 + 0.72 * albedo) * metal
        colours.append(torch.addcmul(lobes, diffuse, albedo * (1.25 - 0.95 * metal)).addcmul_(sky, tint))
    return colours, face


def _surroundings(point: list[Tensor], mirror: list[Tensor]) -> Tensor:
    """Light that a mirror ray finds: ground that darkens under the object, or a sky that is bright at the horizon; [T, 64]."""
    rise = mirror[2]
    away = (point[2] + 1).div_((-rise).clamp_(min=1e-2))
    x, y = torch.addcmul(point[0], away, mirror[0]), torch.addcmul(point[1], away, mirror[1])
    ground = x.mul_(x).addcmul_(y, y).add_(1).rsqrt_().mul_(-0.85).add_(0.72)
    up = rise.clamp(0, 1)
    sky = _power(1 - up, 1).mul_(0.95).add_(_power(up, 2), alpha=0.45).add_(0.2)
    return ground.add_(sky.sub_(ground).mul_((rise * 8).add_(0.5).clamp_(0, 1)))


def _toward(source: list[Tensor], point: list[Tensor]) -> list[Tensor]:
    """Unit vectors from ``point`` [T, 64] to ``source`` [T, 1]."""
    offset = [s - p for s, p in zip(source, point)]
    inverse = _dot(offset, offset).rsqrt_()
    return [x.mul_(inverse) for x in offset]


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return (a[0] * b[0]).addcmul_(a[1], b[1]).addcmul_(a[2], b[2])


def _power(x: Tensor, doublings: int) -> Tensor:
    """x to the 2 ** doublings."""
    for _ in range(doublings):
        x = x * x
    return x


def picture(scene: Scene3D, tiles: Tiles, hits: Hits, smooth: bool) -> Tensor:
    """RGBA uint8 [K, height, width, 4] on the CPU, one ray per pixel; if ``smooth``, 2x2 in the 4x4 pixels around any edge."""
    gray, painted, code = shade(scene, tiles, hits, 1)
    # Three bytes fit exactly into a float's 24 bits, so a whole pixel is added at once.
    busy = gray.round_().mul_(_GRAY)
    for tile, colours in painted:
        busy.index_add_(0, tile, _words(colours))
    rows, cols = scene.grid(1)
    words = torch.empty(len(scene.views) * rows * cols, RAYS, dtype=torch.int32, device=scene.device)
    ambient, key = _bare_ground(scene, 1)
    bare, weights = ambient.add_(key).sqrt_().mul_(255), _between(scene.device)
    for part in pieces(0, len(words)):
        words[part] = torch.mm(bare[part], weights).round_().mul_(_GRAY)
    words.index_copy_(0, torch.from_numpy(tiles.place).to(scene.device), busy.to(torch.int32))
    # The alpha byte, 255, by two's complement.
    words.sub_(_ALPHA)
    # Padding to whole tiles stays on here, so that blocks of four never straddle a border.
    words = untile(words, len(scene.views), rows, cols)
    place = _edge_blocks(scene.rows(tiles, code), scene) if smooth else ()
    if len(place):
        fine = scene.tiles(_FINE, place)
        gray, painted, _ = shade(scene, fine, primary(scene, fine, _FINE), _FINE)
        channels = [gray, gray.clone(), gray.clone()]
        for tile, colours in painted:
            for channel, colour in zip(channels, colours):
                channel.index_add_(0, tile, colour)
        quads = [c.view(-1, _BLOCK, _FINE, _BLOCK, _FINE) for c in channels]
        mean = [(c[:, :, 0, :, 0] + c[:, :, 0, :, 1] + c[:, :, 1, :, 0] + c[:, :, 1, :, 1]).mul_(0.25) for c in quads]
        rows, cols = scene.grid(_FINE)
        where = torch.from_numpy(place).to(scene.device)
        blocks = words.view(len(words), words.shape[1] // _BLOCK, _BLOCK, words.shape[2] // _BLOCK, _BLOCK)
        blocks[where // (rows * cols), where // cols % rows, :, where % cols] = _words(mean).to(torch.int32).sub_(_ALPHA)
    image = words[:, : scene.height, : scene.width].contiguous().cpu()
    return image.view(torch.uint8).view(*image.shape, 4)


def _words(channels: list[Tensor]) -> Tensor:
    """Red, green, blue in 0 to 255 as one number red + 256 green + 65536 blue of bytes, in the same shape; in place."""
    red, green, blue = (c.round_() for c in channels)
    return red.add_(green, alpha=256).add_(blue, alpha=65536)


def _edge_blocks(code: Tensor, scene: Scene3D) -> np.ndarray:
    """Numbers, in the grid of scale 2, of the 4x4 pixel blocks of ``code`` [K, H', W'] that an edge touches."""
    edge = torch.zeros(code.shape, dtype=torch.bool, device=code.device)
    across, down = code[:, :, 1:] != code[:, :, :-1], code[:, 1:] != code[:, :-1]
    edge[:, :, 1:] |= across
    edge[:, :, :-1] |= across
    edge[:, 1:] |= down
    edge[:, :-1] |= down
    edge = edge[:, : scene.height, : scene.width].cpu().numpy()
    rows, cols = scene.grid(_FINE)
    padded = np.zeros((code.shape[0], rows * _BLOCK, cols * _BLOCK), dtype=bool)
    padded[:, : scene.height, : scene.width] = edge
    # Four booleans side by side are one word.
    words = padded.view(np.uint32)
    hit = words[:, 0::4] | words[:, 1::4] | words[:, 2::4] | words[:, 3::4]
    return np.flatnonzero(hit)
