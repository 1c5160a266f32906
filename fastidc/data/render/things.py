"""The objects of a scene and their attributes (data_evaluation.md 2.1)."""

from dataclasses import dataclass

SHAPES = ("cube", "sphere", "cylinder")
SIZES = {"large": 0.7, "small": 0.35}
MATERIALS = ("rubber", "metal")
COLORS = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}


@dataclass(frozen=True)
class Thing:
    """One object that stands on the ground at (``x``, ``y``), turned by ``rotation`` degrees about z."""

    shape: str
    size: str
    color: str
    material: str
    x: float
    y: float
    rotation: float

    @property
    def radius(self) -> float:
        """CLEVR's size in scene units, which the distance between surfaces is measured with."""
        return SIZES[self.size]

    @property
    def extent(self) -> float:
        """Half the height: the radius of a sphere or cylinder, half the side of a cube (whose side is divided by sqrt 2)."""
        return self.radius / 2**0.5 if self.shape == "cube" else self.radius
