"""A map of patches laid over the picture that it belongs to, with numpy and Pillow alone."""

from typing import Any

import numpy as np

# matplotlib's inferno at eight even places, black to light yellow: brightness alone tells more from less
_COLOURS = np.array(
    [(0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21), (250, 193, 39), (252, 255, 164)], np.float32
)
_LEAST, _MOST = 0.2, 0.65  # how much of the colour covers the picture where nothing and where most is looked at


def upsampled(heat: Any, size: tuple[int, int]) -> np.ndarray:
    """heat [h, w], numbers from 0 up -> float32 [height, width] of ``size`` (width, height), bicubic, its overshoots below 0 cut off."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(heat, dtype=np.float32))
    return np.maximum(np.asarray(picture.resize(size, Image.Resampling.BICUBIC)), 0)


def overlaid(picture, heat: Any, peak: float):
    """A PIL image of any mode and a map [h, w] of it -> RGB of the same size: the more is looked at, the brighter; ``peak`` is brightest."""
    from PIL import Image

    share = np.minimum(upsampled(heat, picture.size) / (peak or 1), 1)[..., None]
    places = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(share[..., 0], places, channel) for channel in _COLOURS.T], axis=-1)
    cover = _LEAST + (_MOST - _LEAST) * share
    blended = cover * colours + (1 - cover) * np.asarray(picture.convert("RGB"), dtype=np.float32)
    return Image.fromarray((blended + 0.5).astype(np.uint8))
