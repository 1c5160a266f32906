"""Where shadows may fall: conservative outlines, from the geometry of objects and key light alone, that spare rays."""

from dataclasses import dataclass

import numpy as np

from fastidc.data.render.camera import ground_shadow, screen_window
from fastidc.data.render.things import SHAPES

# Ambient occlusion of the ground is dropped beyond this many extents from an object.
OCCLUSION_REACH = 1.6
_SIDES = 8


@dataclass
class Outlines:
    """Per pair: what ``Scene3D.shaded`` and ``shadow.shadows`` need to know.

    ``window`` [P, 4]: pixel rectangle around the object and its shadow on the ground, which hold every point between them, cut by
    ``slab`` [P, 4]: pixels p with low <= x p_x + y p_y <= high (rows x, y, low, high). ``reach`` [P, 4]: pixel rectangle of the ground
    that the object occludes. ``sides`` [P, 8, 3]: half planes around the ground's shadow, a + b u + c v >= 0 inside.
    """

    window: np.ndarray
    slab: np.ndarray
    reach: np.ndarray
    sides: np.ndarray


def outlines(scene) -> Outlines:
    """The outlines of a ``Scene3D``'s pairs."""
    middle, size = scene.focal, (scene.width, scene.height)
    square = np.array([[x, y, 0.0] for x in (-1, 1) for y in (-1, 1)]) * (OCCLUSION_REACH * scene.extent[:, None, None])
    reach = scene.center[:, None] + square
    reach[..., 2] = 0
    hull = scene.seen(np.concatenate([scene.solid, ground_shadow(scene.solid, scene.key[:, None])], 1))
    # Shadows run aslant: a slab along the line from the object to its shadow's end leaves out the corners of the rectangle.
    pixel = hull[..., :2] / np.maximum(hull[..., 2:], 0.05) * (middle, -middle) + (size[0] / 2, size[1] / 2)
    along = pixel[:, 8:].mean(1) - pixel[:, :8].mean(1)
    along /= np.maximum(np.linalg.norm(along, axis=1), 1e-9)[:, None]
    across = (pixel * np.stack([-along[:, 1], along[:, 0]], 1)[:, None]).sum(-1)
    slab = np.stack([-along[:, 1], along[:, 0], across.min(1) - 1, across.max(1) + 1], 1)
    slab[(hull[..., 2] <= 0.05).any(1), 2:] = (-np.inf, np.inf)
    return Outlines(screen_window(hull, middle, *size), slab, screen_window(scene.seen(reach), middle, *size), _sides(scene))


def _sides(scene) -> np.ndarray:
    """Half planes a + b u + c v >= 0, [P, 8, 3], that touch each pair's shadow on the ground from eight sides."""
    key, extent, eye = scene.key, scene.extent[:, None], scene.eye
    toward = scene.center[:, :2] - key[:, :2]
    angle = np.arctan2(toward[:, 1], toward[:, 0])[:, None] + np.arange(_SIDES) * (2 * np.pi / _SIDES)
    normal = np.stack([np.cos(angle), np.sin(angle)], -1)  # [P, 8, 2], outward
    ahead, height = (normal @ toward[..., None])[..., 0], key[:, 2:]
    # How far the shadow extends from the light's foot along each normal. Cubes and cylinders are prisms: bottom or top's shadow.
    turned = angle - scene.angle[:, None]
    cube = (scene.kind == SHAPES.index("cube"))[:, None]
    edge = ahead + extent * np.where(cube, abs(np.cos(turned)) + abs(np.sin(turned)), 1)
    prism = np.maximum(edge, edge * height / (height - 2 * extent))
    ball = height * np.tan(np.arctan2(ahead, height - extent) + np.arcsin(extent / np.hypot(ahead, height - extent)))
    far = np.where((scene.kind == SHAPES.index("sphere"))[:, None], ball, prism)
    # Ground seen at (u, v) is eye + eye_z / w * ray with w = -ray_z; the condition times w is linear in u and v.
    right, up, forward = (scene.axes[:, i] for i in range(3))
    far = far + (normal @ (key - eye)[:, :2, None])[..., 0]
    flat = [(normal @ axis[:, :2, None])[..., 0] * eye[:, 2:] for axis in (forward, right, up)]
    return np.stack([-far * forward[:, 2:] - flat[0], -flat[1], -far * up[:, 2:] - flat[2]], -1)
