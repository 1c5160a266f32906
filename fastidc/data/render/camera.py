"""The perspective camera: its axes, the four ground directions that captions speak of, and screen-space windows.

World: x, y on the ground, z up, in CLEVR's units. A camera never rolls, so its right axis lies in the ground plane, and the depth
of the ground depends on the image row alone.
"""

from dataclasses import dataclass
from functools import cached_property
from math import hypot

import numpy as np

# CLEVR's base camera: 35 mm lens on a 32 mm sensor, seen from here; it keeps looking at the target while it jitters.
BASE_POSITION = (7.21, -6.83, 5.12)
TARGET = (0.15, -0.15, 0.1)
HALF_WIDTH = 16 / 35
ASPECT = 1.5


def focal_length(width: int, height: int) -> float:
    """Focal length in pixels at which the whole 3:2 view of CLEVR fits into ``width`` x ``height``, whatever its aspect."""
    return min(width, ASPECT * height) / (2 * HALF_WIDTH)


@dataclass(frozen=True)
class Camera:
    """A camera at ``position`` (x, y, z) that looks at ``TARGET``."""

    position: tuple[float, float, float]

    @cached_property
    def axes(self) -> np.ndarray:
        """float64 [3, 3]: rows right, up, forward, orthonormal, in world coordinates."""
        x, y, z = (t - p for t, p in zip(TARGET, self.position))
        flat, length = hypot(x, y), hypot(x, y, z)
        # right is forward turned by a quarter on the ground; up completes the three.
        right = (y / flat, -x / flat, 0.0)
        up = (-x * z / (flat * length), -y * z / (flat * length), flat / length)
        return np.array([right, up, (x / length, y / length, z / length)])

    @cached_property
    def directions(self) -> dict[str, tuple[float, float]]:
        """Unit (x, y) on the ground of left, right, front and behind as this camera sees them."""
        # Behind is forward along the ground, which is right turned by a quarter.
        x, y = self.axes[0, :2].tolist()
        return {"left": (-x, -y), "right": (x, y), "front": (y, -x), "behind": (-y, x)}

    def to_camera(self, points: np.ndarray) -> np.ndarray:
        """World points [..., 3] to (right, up, depth) [..., 3]."""
        return (points - np.asarray(self.position)) @ self.axes.T


_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)


def corners(center: np.ndarray, extent: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """World corners [P, 8, 3] of boxes with ``center`` [P, 3], half side ``extent`` [P], turned by ``rotation`` [P] radians about z."""
    cos, sin = np.cos(rotation)[:, None], np.sin(rotation)[:, None]
    local = _CORNERS[None] * extent[:, None, None]
    turned = np.stack([cos * local[..., 0] - sin * local[..., 1], sin * local[..., 0] + cos * local[..., 1], local[..., 2]], -1)
    return turned + center[:, None]


def ground_shadow(points: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Where the lines from ``light`` [..., 3] through world ``points`` [..., 3], all below it, meet the ground: [..., 3]."""
    scale = light[..., 2:] / (light[..., 2:] - points[..., 2:])
    return light + (points - light) * scale


def screen_window(points: np.ndarray, focal: float, width: int, height: int) -> np.ndarray:
    """Pixel rectangles int64 [P, 4] (x0, y0, x1, y1; half open, one pixel of slack, clipped) around camera-space points [P, N, 3].

    What reaches behind the camera gets the whole image. A rectangle outside the image is empty: x1 <= x0 or y1 <= y0.
    """
    depth = np.maximum(points[..., 2], 0.05)
    x = points[..., 0] / depth * focal + width / 2
    y = height / 2 - points[..., 1] / depth * focal
    window = np.stack([np.floor(x.min(1)) - 1, np.floor(y.min(1)) - 1, np.ceil(x.max(1)) + 1, np.ceil(y.max(1)) + 1], 1)
    window[(points[..., 2] <= 0.05).any(1)] = (0, 0, width, height)
    return np.clip(window, 0, (width, height, width, height)).astype(np.int64)


def sphere_window(center: np.ndarray, radius: np.ndarray, focal: float, width: int, height: int) -> np.ndarray:
    """As ``screen_window`` for spheres with camera-space ``center`` [P, 3] and ``radius`` [P]: tangent planes through the camera."""
    bounds = []
    depth2 = np.maximum(center[:, 2] ** 2 - radius**2, 1e-3)
    for axis in (0, 1):
        side = radius * np.sqrt(center[:, axis] ** 2 + depth2)
        middle = center[:, axis] * center[:, 2]
        bounds += [(middle - side) / depth2, (middle + side) / depth2]
    # At depth 1 a camera-space point is its own projection.
    low_x, high_x, low_y, high_y = bounds
    points = np.stack([np.stack([low_x, low_y, np.ones_like(low_x)], -1), np.stack([high_x, high_y, np.ones_like(low_x)], -1)], 1)
    window = screen_window(points, focal, width, height)
    window[center[:, 2] <= radius + 0.05] = (0, 0, width, height)
    return window
