"""`python -m bench.render [--smoke]`: scenes per second and core of the mini CLEVR-Change renderer, PNG encoding apart.

One thread, CPU time of this process, so that other processes on the machine disturb it as little as can be; each row is the median over
repetitions with its fastest and slowest. A scene is three images, drawn, traced, checked for visibility, shaded and smoothed.
"""

import argparse
import time
from statistics import median

from fastidc.data.render import RenderConfig
from fastidc.data.render.config import TYPES
from fastidc.data.render.png import encode_png
from fastidc.data.render.raycast import single_thread
from fastidc.data.render.scene import draw_scenes
from fastidc.data.render.shading import picture
from fastidc.data.render.writer import scenes_together

# (width, height, jitter, most objects, scenes per second and core to reach)
CASES = ((480, 320, 1.0, 10, 25), (240, 160, 1.0, 10, 80), (112, 112, 0.3, 6, None))


def measure(width: int, height: int, jitter: float, most: int, repetitions: int, scenes: int) -> dict[str, list[float]]:
    """Scenes per CPU second of drawing, of rendering, of both, and images per CPU second of PNG encoding; one value a repetition."""
    config = RenderConfig(15, width, height, jitter, max_objects=most)
    rates: dict[str, list[float]] = {"draw": [], "render": [], "both": [], "png": []}
    size = scenes_together(width, height)
    with single_thread():
        for repetition in range(repetitions + 1):
            draw = render = png = 0.0
            count = 0
            while count < scenes:
                # The same scenes in every repetition: the spread is the machine's.
                jobs = [(i, TYPES[i % len(TYPES)]) for i in range(count, count + size)]
                start = time.process_time()
                _, traced = draw_scenes(config, jobs)
                drawn = time.process_time()
                images = picture(traced.scene3d, traced.tiles, traced.hits).numpy()
                rendered = time.process_time()
                for image in images:
                    encode_png(image)
                png += time.process_time() - rendered
                draw, render, count = draw + drawn - start, render + rendered - drawn, count + size
            if repetition:  # the first one warms up
                for name, value in (("draw", count / draw), ("render", count / render), ("both", count / (draw + render))):
                    rates[name].append(value)
                rates["png"].append(3 * count / png)
    return rates


def main() -> None:
    """Print one row per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few scenes, to see that it runs")
    smoke = parser.parse_args().smoke
    print("size      scenes/s/core (min-max)   target   drawing alone   rendering alone   PNG images/s")
    for width, height, jitter, most, target in CASES:
        rates = measure(width, height, jitter, most, repetitions=1 if smoke else 7, scenes=2 if smoke else 40)
        both, draw, render, png = (rates[name] for name in ("both", "draw", "render", "png"))
        print(
            f"{f'{width}x{height}':<9} {median(both):8.1f} ({min(both):.1f}-{max(both):.1f}) {target or '-':>13} "
            f"{median(draw):15.1f} {median(render):17.1f} {median(png):14.1f}"
        )


if __name__ == "__main__":
    main()
