"""Augmentation: off unless asked for, as the paper trains without any. Its draws only; pixels change in `fastidc.ops.patches`."""

import math
from dataclasses import dataclass, fields

import numpy as np

from fastidc.data.random import briefly
from fastidc.errors import FastidcError

_ANSWERS = {"yes": True, "no": False}
COLUMNS = 15
"""What `draw` gives for an image: `fastidc.ops.patches.COLUMNS`."""


@dataclass(frozen=True)
class Augmentation:
    """What may be done to a pair's images. As it stands it does nothing.

    crop: the least part of the area that is cut out and stretched over the image, 1 for all of it; its sides' ratio is drawn from 3/4 to 4/3.
    brightness, contrast, saturation: factors are drawn from 1 - x to 1 + x; contrast is about mid-grey. noise: the greatest standard deviation
    of Gaussian noise, in levels. erase: how often a box of 2 % to ``erase_area`` of the image turns mid-grey.
    same_colours: whether the images of a pair share their colours' factors. Cut and box are always shared, or a difference would be made that
    no caption speaks of; noise never is.
    """

    crop: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    noise: float = 0.0
    erase: float = 0.0
    erase_area: float = 0.2
    same_colours: bool = True

    def __post_init__(self):
        for name, least, most in (
            ("crop", 0.05, 1),
            *((name, 0, 1) for name in ("brightness", "contrast", "saturation", "erase")),
            ("noise", 0, 255),
            ("erase_area", 0.02, 1),
        ):
            if not least <= getattr(self, name) <= most:
                raise FastidcError(f"--augment: {name} must be from {least} to {most}, got {getattr(self, name)}.")

    @classmethod
    def parse(cls, text: str) -> "Augmentation":
        """What ``--augment`` says: "crop=0.8,brightness=0.2,contrast=0.2,saturation=0.2,noise=4,erase=0.25,erase_area=0.2,same_colours=no", any of
        them; empty for none. FastidcError names the part that does not fit."""
        values: dict[str, float | bool] = {}
        known = {field.name: field.type for field in fields(cls)}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = (x.strip() for x in part.partition("="))
            name = name.replace("-", "_")
            if name not in known or name in values:
                raise FastidcError(
                    f"--augment: {part!r} is none of {', '.join(known)}, each once; write it as in --augment crop=0.8,noise=4."
                )
            try:
                values[name] = _ANSWERS[value.lower()] if name == "same_colours" else float(value)
            except (KeyError, ValueError):
                wanted = "yes or no" if name == "same_colours" else "a number"
                raise FastidcError(f"--augment: {part!r} needs {wanted}; write it as in --augment crop=0.8,same_colours=no.") from None
        return cls(**values)

    def __bool__(self) -> bool:
        """Whether it does anything."""
        return self.crop < 1 or any((self.brightness, self.contrast, self.saturation, self.noise, self.erase))

    def draw(self, seed: int, epoch: int, sample: str, images: int, size: int) -> np.ndarray:
        """fp32 [images, 15] for the images of a sample, each ``size`` x ``size``; a function of its arguments and of nothing else."""
        out = np.empty((images, COLUMNS), dtype=np.float32)
        place = briefly(seed, "augmentation", epoch, sample)
        out[:, 0:4] = _box(place, self.crop, 1.0, size)
        erased = place.random() < self.erase
        box = _box(place, min(0.02, self.erase_area), self.erase_area, size, whole=True)  # drawn in any case: one chance moves no other
        out[:, 10:14] = box if erased else 0.0
        out[:, 14] = 128
        for i in range(images):
            colours = briefly(seed, "augmentation colours", epoch, sample, *(() if self.same_colours else (i,)))
            factors = colours.uniform(-1, 1, 3) * (self.brightness, self.contrast, self.saturation)
            out[i, 4:7] = 1 + factors
            out[i, 7] = self.noise * colours.random()
            out[i, 8:10] = briefly(seed, "augmentation noise", epoch, sample, i).integers(0, 1 << 24, 2)
        return out


def unchanged(samples: int, images: int, size: int) -> np.ndarray:
    """fp32 [samples, images, 15] that leave every pixel as it is."""
    one = np.array([0, 0, size, size, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 128], dtype=np.float32)
    return np.tile(one, (samples, images, 1))


def mirrored(parameters: np.ndarray, size: int) -> np.ndarray:
    """fp32 [..., 15] for images ``size`` wide -> the same, and the results left for right but for their noise: what is cut out is read backwards,
    and a box that is erased lies on the other side."""
    out = parameters.copy()
    out[..., 1], out[..., 3] = parameters[..., 1] + parameters[..., 3], -parameters[..., 3]
    out[..., 11] = np.where(parameters[..., 13] > 0, size - parameters[..., 11] - parameters[..., 13], parameters[..., 11])
    return out


def _box(draw: np.random.Generator, least: float, most: float, size: int, whole: bool = False) -> tuple[float, float, float, float]:
    """Top, left, height and width, in pixels, of a box of ``least`` to ``most`` of the area; whole pixels where ``whole``."""
    area, ratio, down, across = draw.random(4)
    area = least + area * (most - least)
    ratio = math.exp((2 * ratio - 1) * math.log(4 / 3))
    height, width = (size * min(1.0, math.sqrt(x)) for x in (area * ratio, area / ratio))
    if least >= 1:
        height = width = float(size)
    top, left = down * (size - height), across * (size - width)
    return tuple(map(round, (top, left, height, width))) if whole else (top, left, height, width)
