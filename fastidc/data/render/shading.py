"""From geometry to pixels: lamps, the two materials, the ground, and smooth edges.

Colours are linear light; display is their square root (gamma 2, exact in hardware, so it costs no power function). Metal differs from
rubber by a mirrored ground, sky and lamps, a darker diffuse part and a sharp highlight.
"""

import numpy as np
import torch
from torch import Tensor

from fastidc.data.render.raycast import Hits, Met, is_zero, primary, shadows
from fastidc.data.render.space import CHUNK, FAR, TILE, Scene3D, Tiles, untile
from fastidc.data.render.things import SHAPES

_KEY, _FILL, _BACK, _AMBIENT = 0.62, 0.20, 0.22, 0.30
_GROUND, _BACKDROP = 0.52, 0.27
# Rays per pixel side where an edge or a shadow's border runs through.
_FINE = 2
_BLOCK = TILE // _FINE
# A gray byte in each of a pixel's three channels.
_GRAY = 1 + 256 + 65536


def shade(scene: Scene3D, tiles: Tiles, hits: Hits, scale: int) -> tuple[Tensor, list[tuple[Tensor, list[Tensor]]], Tensor]:
    """Display colours in [0, 1] and where edges lie.

    Returns the ground's gray [G, 64], 0 under objects; (tile rows [T], (red, green, blue) [T, 64] each) of the objects, piece by
    piece, 0 where the ray does not see them; and a code [G, 64] that differs between neighbours wherever an edge or a shadow's
    border runs.
    """
    shadow, occlusion = shadows(scene, tiles, hits, scale)
    floor = _ground(scene, tiles, shadow, occlusion, hits.owner)
    painted, faces = [], []
    for met in hits.met:
        # A window's corners, and what other objects hide, need no light.
        first = met.first(hits.depth)
        met, first = met.rows(torch.nonzero(first.amax(1))[:, 0], first)
        tile = met.visits.tile
        colours, face = _objects(met, 1 - shadow.index_select(0, tile))
        if face is not None:
            faces.append((tile, face.mul_(first)))
        painted.append((tile, [c.clamp_(0, 1).sqrt_().mul_(first) for c in colours]))
    code = shadow.add_(hits.owner, alpha=16)
    for tile, face in faces:
        code.index_add_(0, tile, face)
    return floor, painted, code


def _bare_ground(scene: Scene3D, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Ambient and key light that the ground sends back where nothing stands, at the corners of each tile: [G, 4] each."""
    pick = torch.tensor([0, TILE - 1, TILE * (TILE - 1), TILE * TILE - 1], device=scene.device)
    u, v = tiles.u + tiles.du[pick], tiles.v + tiles.dv[pick]
    rx, ry, _, ux, uy, uz, fx, fy, fz, px, py, pz, lx, ly, lz = scene.seats(tiles.image)
    depth = pz / torch.maximum(-(fz + v * uz), pz / FAR)
    x, y = px + depth * (fx + u * rx + v * ux), py + depth * (fy + u * ry + v * uy)
    cosine = lz * ((x - lx).square() + (y - ly).square() + lz * lz).rsqrt()
    radius2 = x.square() + y.square()
    pool = 1 / (1 + radius2 / 220)
    fog = (radius2 / 500).clamp(max=1)
    fog = fog * fog * (3 - 2 * fog)
    ambient = (1 - fog) * (_GROUND * (_AMBIENT + 0.22) * pool) + fog * _BACKDROP
    key = (1 - fog) * (_GROUND * _KEY * pool * (0.35 + 0.65 * cosine))
    return ambient, key


def _spread(corners: Tensor, scene: Scene3D) -> Tensor:
    """The plane through a tile's ``corners`` [T, 4]: [T, 64]. It bends too little within eight pixels to see."""
    line = torch.linspace(-0.5, 0.5, TILE, device=scene.device)
    a, b, c, d = corners.split(1, 1)
    across, down = 0.5 * (b - a + d - c), 0.5 * (c - a + d - b)
    return (across * line.repeat(TILE)).add_(down * line.repeat_interleave(TILE)).add_(0.25 * (a + b + c + d))


def _ground(scene: Scene3D, tiles: Tiles, shadow: Tensor, occlusion: Tensor, owner: Tensor) -> Tensor:
    """Display gray of the ground [G, 64] with its shadows, 0 under objects."""
    ambient, key = _bare_ground(scene, tiles)
    gray = torch.empty_like(shadow)
    for low in range(0, len(gray), CHUNK):
        part = slice(low, low + CHUNK)
        light = _spread(ambient[part], scene).mul_((occlusion[part] * -0.85).add_(1))
        light.addcmul_(_spread(key[part], scene), 1 - shadow[part])
        seen = owner[part].clamp(max=1).neg_().add_(1)
        torch.mul(light.clamp_(0, 1).sqrt_(), seen, out=gray[part])
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


def _objects(met: Met, lit: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Linear red, green, blue of every visit's object where its ray enters it, [T, 64] each, and the face number there.

    Rays that miss get some finite colour: the caller masks it.
    """
    constants = met.visits.constants
    t = met.t.clamp(max=100)
    point = [torch.addcmul(o, t, d) for o, d in zip(constants["eye"], met.ray)]
    normal, face = _normals(met.visits.kind, point)
    to_eye = _toward(constants["eye"], point)
    facing = _dot(normal, to_eye)
    twice = facing * 2
    mirror = [(n * twice).sub_(e) for n, e in zip(normal, to_eye)]

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
    fresnel = _power((1 - facing).clamp_(0, 1), 2)
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
    busy = (gray * 255).round_().mul_(_GRAY)
    for tile, colours in painted:
        busy.index_add_(0, tile, _words(colours))
    rows, cols = scene.grid(1)
    words = torch.empty(len(scene.views) * rows * cols, TILE * TILE, device=scene.device)
    words[torch.from_numpy(tiles.place).to(scene.device)] = busy
    empty = scene.tiles(1, np.flatnonzero(tiles.lookup < 0))
    ambient, key = _bare_ground(scene, empty)
    for low in range(0, len(empty.place), CHUNK):
        part = slice(low, low + CHUNK)
        light = _spread(ambient[part].add_(key[part]), scene).clamp_(0, 1).sqrt_()
        words[torch.from_numpy(empty.place[part]).to(scene.device)] = light.mul_(255).round_().mul_(_GRAY)
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
        blocks[where // (rows * cols), where // cols % rows, :, where % cols] = _words(mean)
    # The alpha byte, 255, by two's complement.
    image = words[:, : scene.height, : scene.width].to(torch.int32).sub_(16777216).cpu()
    return image.view(torch.uint8).view(*image.shape, 4)


def _words(channels: list[Tensor]) -> Tensor:
    """Red, green, blue in [0, 1] as one number red + 256 green + 65536 blue of bytes, in the same shape."""
    red, green, blue = ((c * 255).round_() for c in channels)
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
