"""The mini CLEVR-Change renderer: its file tree, its determinism and its ray-caster."""

import hashlib
import io
import json
import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastidc.data.render import RenderConfig, render_dataset, writer
from fastidc.data.render.camera import BASE_POSITION, Camera, focal_length
from fastidc.data.render.config import TYPES
from fastidc.data.render.layout import scene_ids, split_ids
from fastidc.data.render.png import encode_png
from fastidc.data.render.raycast import primary, single_thread
from fastidc.data.render.scene import VIEWS, draw_scenes, trace
from fastidc.data.render.shading import picture
from fastidc.data.render.shadow import shadows
from fastidc.data.render.space import Lights, Scene3D, View
from fastidc.data.render.things import Thing
from fastidc.errors import FastidcError

SMALL = RenderConfig(20, 96, 64, 0.3, 3, 4, seed=5)
FOLDERS = {"images": "default", "sc_images": "semantic", "nsc_images": "nonsemantic"}
REAL = Path(os.environ.get("FASTIDC_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "clevr_change"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    out = tmp_path_factory.mktemp("render") / "data"
    return out, render_dataset(SMALL, out, workers=1, progress=False)


def load(out: Path, name: str):
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


def digest(out: Path) -> dict[str, str]:
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.rglob("*")) if p.is_file()}


def test_tree(tree):
    out, summary = tree
    ids = [record["image_index"] for record in load(out, "scene_graphs")["scenes"]]
    names = [f"CLEVR_default_{i:06d}.png" for i in ids]
    for folder, kind in FOLDERS.items():
        assert sorted(p.name for p in (out / folder).iterdir()) == [f"CLEVR_{kind}_{i:06d}.png" for i in sorted(ids)]
    image = Image.open(out / "sc_images" / names[0].replace("default", "semantic"))
    assert (image.mode, image.size, image.getchannel("A").getextrema()) == ("RGBA", (96, 64), (255, 255))
    for name in ("change_captions", "no_change_captions", "bounding_boxes"):
        assert list(load(out, name)) == names
    overlap = load(out, "change_captions_by_IOU")
    assert list(overlap) == [str(i) for i in ids]
    assert all(isinstance(v, str) and 0 <= float(v) <= 1 for v in overlap.values())
    mapping, splits = load(out, "type_mapping"), load(out, "splits")
    assert sorted(chain(*mapping.values())) == sorted(f"{i:06d}.png" for i in ids)
    assert sorted(chain(*splits.values())) == sorted(ids)
    assert (summary["scenes"], summary["pairs"], summary["types"]) == (20, 40, dict.fromkeys(TYPES, 4))
    assert load(out, "render")["summary"] == summary
    assert load(out, "render")["config"]["seed"] == 5
    assert not list(out.parent.glob(".*"))


def test_schema_is_that_of_the_released_files(tree):
    if not (REAL / "splits.json").is_file():
        pytest.skip(f"the released splits.json is not in {REAL}; name its folder in FASTIDC_TEST_DATA")
    out, _ = tree
    for name in ("splits", "type_mapping"):
        ours, real = (root / f"{name}.json" for root in (out, REAL))
        assert list(json.loads(ours.read_text())) == list(json.loads(real.read_text()))
        shapes = [{(key, type(v)) for key, values in json.loads(p.read_text()).items() for v in values} for p in (ours, real)]
        assert shapes[0] == shapes[1]
        # The same separators and no trailing newline.
        assert ours.read_text() == json.dumps(json.loads(ours.read_text()))
        assert real.read_text() == json.dumps(json.loads(real.read_text()))


@pytest.mark.parametrize("scenes", [15, 16, 23, 100, 4001])
def test_splits_and_blocks(scenes):
    config = RenderConfig(scenes)
    ids = scene_ids(config)
    splits = split_ids(config, ids)
    everything = list(chain(*ids.values()))
    assert len(everything) == scenes == len(set(everything))
    assert sorted(chain(*splits.values())) == sorted(everything)
    for numbers in ids.values():
        for part in splits.values():
            assert set(numbers) & set(part)
    assert [min(numbers) for numbers in ids.values()] == [i * min(ids["material"]) for i in range(5)]
    assert max(everything) + 1 > scenes
    if scenes >= 100:
        assert len(splits["train"]) / scenes == pytest.approx(0.85, abs=0.01)
        assert len(splits["test"]) / scenes == pytest.approx(0.10, abs=0.01)


def test_same_bytes_for_any_worker_count(tree, tmp_path):
    out, _ = tree
    render_dataset(SMALL, tmp_path / "two", workers=2, progress=False)
    assert digest(tmp_path / "two") == digest(out)


def test_scene_does_not_depend_on_its_company():
    jobs = [(i, TYPES[i]) for i in range(5)]
    with single_thread():
        _, together = draw_scenes(SMALL, jobs)
        images = picture(together.scene3d, together.tiles, together.hits, True)
        for i in (0, 3):
            _, alone = draw_scenes(SMALL, jobs[i : i + 1])
            assert (picture(alone.scene3d, alone.tiles, alone.hits, True) == images[3 * i : 3 * i + 3]).all()


def test_coarse_look_keeps_the_rules():
    # Large enough that most drafts are judged in a smaller image first.
    config, jobs = RenderConfig(20, 240, 160, min_objects=7), [(i, TYPES[i % 5]) for i in range(8)]
    with single_thread():
        scenes, traced = draw_scenes(config, jobs)
        assert all(draw_scenes(config, jobs[i : i + 1])[0] == scenes[i : i + 1] for i in (0, 5))
    assert min(chain(*chain(*traced.visible))) >= 200 * (240 / 320) ** 2


def test_other_seed_other_bytes(tree):
    out, _ = tree
    other = RenderConfig(20, 96, 64, 0.3, 3, 4, seed=6)
    with single_thread():
        scenes, _ = draw_scenes(other, [(0, "color")])
    assert list(scenes[0].change_captions) != load(out, "change_captions")["CLEVR_default_000000.png"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_on_error(tmp_path, monkeypatch, error):
    calls = []

    def fail(image):
        calls.append(image)
        if len(calls) > 10:
            raise error
        return encode_png(image)

    monkeypatch.setattr(writer, "encode_png", fail)
    with pytest.raises(error):
        render_dataset(SMALL, tmp_path / "out", workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_existing_folder(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(FastidcError, match="not an empty folder"):
        render_dataset(SMALL, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    with pytest.raises(FastidcError, match="workers"):
        render_dataset(SMALL, tmp_path / "new", workers=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(FastidcError, match="could not be written"):
        render_dataset(SMALL, tmp_path / "file" / "out", workers=1, progress=False)


@pytest.mark.parametrize(
    "values",
    [
        {"scenes": 14},
        {"scenes": 10**6},
        {"scenes": 20.0},
        {"width": 10},
        {"width": 900, "height": 100},
        {"jitter": -1},
        {"jitter": float("nan")},
        {"min_objects": 1},
        {"min_objects": 5, "max_objects": 4},
        {"max_objects": 11},
        {"seed": -1},
        {"references": 0},
        {"no_change_dominance": 1.5},
        {"smooth": "yes"},
    ],
)
def test_bad_values_are_refused(values):
    with pytest.raises(
        FastidcError,
        match=next(
            (name for name in values if name in ("scenes", "jitter", "seed", "references", "no_change_dominance", "smooth")), "size|objects"
        ),
    ):
        RenderConfig(**{"scenes": 20, **values})


def brute_force(view: View, width: int, height: int):
    """Depth, object (0 ground, i + 1) and shadow of every pixel, all objects against all rays, in float64 and world coordinates."""
    focal = focal_length(width, height)
    right, up, forward = view.camera.axes
    x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, height / 2 - np.arange(height) - 0.5)
    rays = forward + x[..., None] / focal * right + y[..., None] / focal * up
    eye = np.array(view.camera.position)
    depth = np.where(rays[..., 2] < -eye[2] / 80, -eye[2] / np.minimum(rays[..., 2], -1e-9), 80.0)
    owner = np.zeros((height, width), int)
    for i, thing in enumerate(view.objects):
        t = enter(thing, np.broadcast_to(eye, rays.shape), rays)
        owner[t < depth] = i + 1
        depth = np.minimum(depth, t)
    point = eye + depth[..., None] * rays
    light = np.array(view.lights.key)
    shadow = np.zeros((height, width), bool)
    for i, thing in enumerate(view.objects):
        shadow |= (enter(thing, np.broadcast_to(light, point.shape), point - light) < 1) & (owner != i + 1)
    return depth, owner, shadow


def enter(thing: Thing, origin: np.ndarray, ray: np.ndarray) -> np.ndarray:
    half = {"cube": {"large": 0.7, "small": 0.35}[thing.size] / 2**0.5}.get(thing.shape, {"large": 0.7, "small": 0.35}[thing.size])
    angle = np.deg2rad(thing.rotation)
    turn = np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    o, d = (origin - (thing.x, thing.y, half)) @ turn.T, ray @ turn.T
    with np.errstate(all="ignore"):
        if thing.shape == "sphere":
            a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - half**2
            root = np.sqrt(b * b - a * c)
            near, far = (-b - root) / a, (-b + root) / a
        elif thing.shape == "cube":
            ends = np.sort(np.stack([(-half - o) / d, (half - o) / d]), 0)
            near, far = ends[0].max(-1), ends[1].min(-1)
        else:
            a, b, c = (d * d)[..., :2].sum(-1), (o * d)[..., :2].sum(-1), (o * o)[..., :2].sum(-1) - half**2
            root = np.sqrt(b * b - a * c)
            ends = np.sort(np.stack([(-half - o[..., 2]) / d[..., 2], (half - o[..., 2]) / d[..., 2]]), 0)
            near, far = np.maximum((-b - root) / a, ends[0]), np.minimum((-b + root) / a, ends[1])
        return np.where((near < far) & (near > 0), near, np.inf)


LIGHTS = Lights((5.5, -3.2, 7.0), (-4.67, -4.01, 3.01), (-1.17, 2.65, 5.82))
CLOSE = Camera((3.5, -3.4, 2.4))  # parts of the scene lie behind this camera, and sky shows


@pytest.mark.parametrize("size", [(120, 80), (113, 67), (64, 96)])
@pytest.mark.parametrize("camera", [Camera(BASE_POSITION), Camera((5.3, -8.6, 3.2)), CLOSE])
def test_against_brute_force(size, camera):
    objects = tuple(
        Thing(shape, extent, "red", "metal", x, y, rotation)
        for shape, extent, x, y, rotation in (
            ("cube", "large", -1.5, 0.5, 10.0),
            ("cube", "small", 2.9, -2.9, 45.0),
            ("sphere", "large", 0.9, 1.7, 0.0),
            ("sphere", "small", -3.0, -3.0, 0.0),
            ("cylinder", "large", 0.2, -1.2, 33.0),
            ("cylinder", "small", 3.0, 3.0, 0.0),
            ("cube", "large", -2.9, 3.0, 90.0),
        )
    )
    # Two views, so that the wrong image would show.
    views = [View(camera, objects, LIGHTS), View(Camera(BASE_POSITION), objects[::-1], LIGHTS)]
    with single_thread():
        scene = Scene3D(views, *size)
        tiles = scene.tiles(1, scene.touched())
        hits = primary(scene, tiles, 1)
        shadow, _ = shadows(scene, tiles, hits, 1)
        owner, depth, shadow = (scene.rows(tiles, x).numpy()[:, : size[1], : size[0]] for x in (hits.owner, hits.depth, shadow))
    for k, view in enumerate(views):
        number = np.zeros(len(scene.kind) + 1, int)
        number[[p + 1 for p in scene.pair_of[k]]] = np.arange(len(objects)) + 1
        true_depth, true_owner, true_shadow = brute_force(view, *size)
        mine = number[owner[k].astype(int)]
        same = mine == true_owner
        # float32 against float64 may part on a silhouette.
        assert (~same).sum() <= 3
        traced = depth[k] > 0
        assert traced[true_owner > 0].all()
        assert np.abs(depth[k] / true_depth - 1)[same & traced].max() < 2e-3
        assert (shadow[k][same] != true_shadow[same]).sum() <= 6
        assert true_shadow.sum() > 20


def test_boxes_are_around_what_differs():
    config = RenderConfig(20, 120, 80, jitter=0, min_objects=3, max_objects=5)
    jobs = [(i, TYPES[i % 5]) for i in range(10)]
    with single_thread():
        scenes, traced = draw_scenes(config, jobs)
        images = picture(traced.scene3d, traced.tiles, traced.hits, False).numpy().astype(int)
    for s, scene in enumerate(scenes):
        before, after, distractor = images[3 * s : 3 * s + 3]
        assert (before == distractor).all()
        differs = np.abs(before - after).max(-1) > 0
        union = np.zeros_like(differs)
        for view in (0, 1):
            index = scene.index_in(view)
            if index is not None:
                x0, y0, x1, y1 = traced.boxes[s][view][index]
                union[y0:y1, x0:x1] = True
        assert differs[union].mean() > 0.2
        if scene.change in ("color", "material"):
            assert not differs[~union].any()


def test_box_follows_object_at_the_edge_of_the_image():
    thing = Thing("sphere", "large", "red", "rubber", 0.0, 0.0, 0.0)
    camera = Camera((7.21, -6.83, 5.12))
    view = View(camera, (thing, Thing("cube", "large", "blue", "metal", 40.0, 40.0, 0.0)), LIGHTS)
    with single_thread():
        scenes, _ = draw_scenes(SMALL, [(0, "color")])
        scene = type(scenes[0])("color", 0, (view, view, view), (), ())
        traced = trace([scene], 120, 80)
    _, owner, _ = brute_force(view, 120, 80)
    down, across = np.nonzero(owner == 1)
    assert traced.boxes[0][0][0] == (across.min(), down.min(), across.max() + 1, down.max() + 1)
    assert traced.visible[0][0] == [len(down), 0]
    assert len(VIEWS) == 3


@pytest.mark.parametrize("shape", ["cube", "sphere", "cylinder"])
@pytest.mark.parametrize("color", ["gray", "yellow", "blue"])
def test_rubber_and_metal_differ_visibly(shape, color):
    views = [View(Camera(BASE_POSITION), (Thing(shape, "large", color, m, 0.0, 0.0, 20.0),), LIGHTS) for m in ("rubber", "metal")]
    with single_thread():
        scene = Scene3D(views, 112, 112)
        tiles = scene.tiles(1, scene.touched())
        hits = primary(scene, tiles, 1)
        rubber, metal = picture(scene, tiles, hits, True).numpy()[..., :3].astype(int)
        seen = scene.rows(tiles, hits.owner)[0, :112, :112].numpy() > 0
    assert np.abs(rubber - metal)[seen].mean() > 12


def test_png_is_lossless():
    image = np.random.default_rng(0).integers(0, 256, (7, 13, 4), dtype=np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(encode_png(image)))) == image).all()
    with pytest.raises(ValueError, match="uint8"):
        encode_png(image[..., :3])


def test_settings_of_torch_come_back():
    import torch

    threads = torch.get_num_threads()
    with single_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
