"""What is written beside a scene's images: its graph, boxes and overlap, as plain JSON values."""

from collections.abc import Sequence

from fastidc.data.render.scene import VIEWS, Scene

Box = tuple[int, int, int, int]


def scene_record(number: int, scene: Scene, boxes: Sequence[Sequence[Box]], visible: Sequence[Sequence[int]]) -> dict:
    """The scene graph of one scene; enough to check every caption again.

    Coordinates are in scene units, ``rotation`` in degrees, ``box`` (x0, y0, x1, y1) in pixels, half open, around what is visible.
    ``changed_object`` is an index into the before view's objects, for an added object into the after view's.
    """
    views, lights = {}, scene.views[0].lights
    for k, (name, view) in enumerate(zip(VIEWS, scene.views)):
        objects = [
            {
                "shape": o.shape,
                "size": o.size,
                "color": o.color,
                "material": o.material,
                "3d_coords": [o.x, o.y, round(o.extent, 6)],
                "rotation": o.rotation,
                "box": list(boxes[k][i]),
                "visible_pixels": visible[k][i],
            }
            for i, o in enumerate(view.objects)
        ]
        directions = {direction: list(xy) for direction, xy in view.camera.directions.items()}
        views[name] = {"camera": list(view.camera.position), "directions": directions, "objects": objects}
    return {
        "image_index": number,
        "change_type": scene.change,
        "changed_object": scene.changed,
        "lights": {"key": list(lights.key), "fill": list(lights.fill), "back": list(lights.back)},
        **views,
    }


def changed_boxes(record: dict) -> dict[str, list[int] | None]:
    """The changed object's visible box in each view, None where it is not there."""
    change, changed = record["change_type"], record["changed_object"]
    absent = {"add": ("before", "distractor"), "drop": ("after",)}.get(change, ())
    return {view: None if view in absent else record[view]["objects"][changed]["box"] for view in VIEWS}


def overlap(record: dict) -> float:
    """Intersection over union of the changed object's boxes before and after.

    An added or dropped object has only one; as the difficulty meant is that of the changed viewpoint, the mean over the objects
    that are in both images stands in.
    """
    boxes = changed_boxes(record)
    if boxes["before"] is not None and boxes["after"] is not None:
        return _iou(boxes["before"], boxes["after"])
    # An added object comes last, so pairing in order is right; a dropped one is taken out first.
    before = [o["box"] for o in record["before"]["objects"]]
    after = [o["box"] for o in record["after"]["objects"]]
    if record["change_type"] == "drop":
        del before[record["changed_object"]]
    return sum(_iou(a, b) for a, b in zip(before, after)) / min(len(before), len(after))


def _iou(a: list[int], b: list[int]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    total = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - inside
    return inside / total
