"""Captions: referring expressions that hold of exactly one object, and the phrases that say what happened to it.

The grammar and its words are those of the released CLEVR-Change (data_evaluation.md 2.2): zero-hop ``the <size> <color> <material>
<shape>`` and one-hop ``<zero-hop> [that is] <relation> <zero-hop>``, with at least one of the four attributes left out.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np

from fastidc.data.render.camera import Camera
from fastidc.data.render.things import Thing

# An object is left of another when it lies at least this far along the camera's left direction on the ground.
RELATION_EPSILON = 0.2
ONE_HOP_SHARE = 0.4

SIZE_WORDS = {"large": ("large", "big"), "small": ("small", "tiny")}
SHAPE_WORDS = {"cube": ("cube", "block"), "sphere": ("sphere", "ball"), "cylinder": ("cylinder",), None: ("thing", "object")}
MATERIAL_WORDS = {"metal": ("metallic", "metal", "shiny"), "rubber": ("rubber", "matte")}
RELATION_WORDS = {
    "left": ("left of", "to the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right side of"),
    "behind": ("behind",),
    "front": ("in front of",),
}
VALUE_PHRASES = ("changed to", "turned", "became")
PHRASES = {
    "add": ("has appeared", "has been newly placed", "has been added"),
    "drop": ("has disappeared", "is missing", "is gone", "is no longer there"),
    "move": ("changed its location", "is in a different location", "was moved"),
}
DOMINANT_NO_CHANGE = "the scene is the same as before"
NO_CHANGE = (
    DOMINANT_NO_CHANGE,
    "no change was made",
    "there is no change",
    "the two scenes seem identical",
    "the scene remains the same",
    "nothing has changed",
    "nothing was modified",
    "no change has occurred",
    "there is no difference",
)

# Which of (size, color, material, shape) an expression names: each template of the generator leaves at least one out.
_MASKS = [mask for mask in product((False, True), repeat=4) if not all(mask)]
# How often an expression takes each mask: a template forces one attribute out, so three named ones are the rule.
_WEIGHTS = np.array([(0, 1, 2, 8)[sum(mask)] + 1e-9 for mask in _MASKS])
_RELATIONS = tuple(RELATION_WORDS)


class Expressions:
    """All zero- and one-hop expressions that hold of object ``referent`` alone among ``objects``, as ``camera`` sees them."""

    def __init__(self, objects: Sequence[Thing], camera: Camera, referent: int) -> None:
        self.objects, self.referent = objects, referent
        count = len(objects)
        attributes = np.array([[o.size, o.color, o.material, o.shape] for o in objects], dtype=object)
        same = attributes[:, None] == attributes[None]  # [n, n, 4]: object i agrees with object j
        masks = np.array(_MASKS)
        # fits[k, m, j]: object j fits the description of object k that mask m leaves
        self._fits = (same[:, None] | ~masks[None, :, None]).all(-1)
        self._unique = self._fits.sum(-1) == 1
        self.zero_hop = [m for m in range(len(_MASKS)) if self._unique[referent, m]]

        position = np.array([[o.x, o.y] for o in objects])
        offset = position[:, None] - position[None]  # [n, n, 2]: from object j to object i
        informative, redundant = [], []
        for relation in _RELATIONS:
            along = offset @ np.asarray(camera.directions[relation])
            for anchor in range(count):
                if anchor == referent or along[referent, anchor] <= RELATION_EPSILON or not self._unique[anchor].any():
                    continue
                # Stricter than the definition: an object that is left of the anchor by a hair counts as a rival too.
                rivals = along[:, anchor] > 0
                rivals[[anchor, referent]] = False
                for m in np.flatnonzero(~(self._fits[referent] & rivals).any(1)).tolist():
                    (redundant if self._unique[referent, m] else informative).append((m, relation, anchor))
        self.one_hop = informative or redundant

    def __bool__(self) -> bool:
        return bool(self.zero_hop or self.one_hop)

    def draw(self, rng: np.random.Generator) -> str:
        """One expression, with synonyms drawn; some one-hop (``ONE_HOP_SHARE``) where both kinds exist."""
        if self.zero_hop and not (self.one_hop and rng.random() < ONE_HOP_SHARE):
            return self._noun(self.referent, _pick_mask(rng, self.zero_hop), rng)
        mask = _pick_mask(rng, sorted({m for m, _, _ in self.one_hop}))
        _, relation, anchor = _pick(rng, [hop for hop in self.one_hop if hop[0] == mask])
        anchor_mask = _pick_mask(rng, np.flatnonzero(self._unique[anchor]))
        parts = [self._noun(self.referent, mask, rng)]
        if rng.random() < 0.5:
            parts.append("that is")
        parts += [_pick(rng, RELATION_WORDS[relation]), self._noun(anchor, anchor_mask, rng)]
        return " ".join(parts)

    def _noun(self, index: int, mask: int, rng: np.random.Generator) -> str:
        thing, (size, color, material, shape) = self.objects[index], _MASKS[mask]
        words = ["the"]
        if size:
            words.append(_pick(rng, SIZE_WORDS[thing.size]))
        if color:
            words.append(thing.color)
        if material:
            words.append(_pick(rng, MATERIAL_WORDS[thing.material]))
        words.append(_pick(rng, SHAPE_WORDS[thing.shape if shape else None]))
        return " ".join(words)


def change_captions(change: str, expressions: Expressions, new: Thing, count: int, rng: np.random.Generator) -> list[str]:
    """``count`` sentences on one change, distinct where the expressions allow it.

    ``expressions`` must be those of the changed object in the scene in which it is resolved: after for ``add``, before otherwise.
    ``new`` is the object as it is afterwards; its colour or material is the value that a caption names.
    """
    captions: list[str] = []
    for _ in range(20 * count):
        if change in ("color", "material"):
            value = new.color if change == "color" else _pick(rng, MATERIAL_WORDS[new.material])
            phrase = f"{_pick(rng, VALUE_PHRASES)} {value}"
        else:
            phrase = _pick(rng, PHRASES[change])
        caption = f"{expressions.draw(rng)} {phrase}"
        if caption not in captions:
            captions.append(caption)
        if len(captions) == count:
            return captions
    return [captions[i % len(captions)] for i in range(count)]


def no_change_captions(count: int, dominance: float, rng: np.random.Generator) -> list[str]:
    """``count`` no-change sentences: the dominant one for a share ``dominance`` of them, the others distinct while they last."""
    dominant = round(dominance * count)
    pool = NO_CHANGE[1:] if dominance else NO_CHANGE
    rest = [pool[i] for i in rng.permutation(len(pool))]
    captions = [DOMINANT_NO_CHANGE] * dominant + [rest[i % len(rest)] for i in range(count - dominant)]
    return [captions[i] for i in rng.permutation(count)]


def _pick(rng: np.random.Generator, options: Sequence):
    return options[int(rng.integers(len(options)))]


def _pick_mask(rng: np.random.Generator, masks: Sequence[int]) -> int:
    """One of ``masks``, numbers in `_MASKS`, by `_WEIGHTS`."""
    total = np.cumsum(_WEIGHTS[masks])
    return masks[int(np.searchsorted(total, rng.random() * total[-1], side="right"))]
