"""`python -m bench.render [--smoke]`: scenes per second and core of the mini CLEVR-Change renderer, PNG encoding apart.

One thread, CPU time of this process, so that other processes on the machine disturb it as little as can be; each row is the median over
repetitions with its fastest and slowest. A scene is three images. "ray-casting" traces and shades finished scenes (and smooths where that is the default, below 128 rows);
"all" adds what finding such scenes takes: placement, captions, and the draws thrown away because an object was hidden.
"""

import argparse
import time
from statistics import median

from fastidc.data.render import RenderConfig
from fastidc.data.render.config import TYPES
from fastidc.data.render.png import encode_png
from fastidc.data.render.raycast import single_thread
from fastidc.data.render.scene import draw_scenes, trace
from fastidc.data.render.shading import picture
from fastidc.data.render.writer import scenes_together

# (width, height, jitter, most objects, scenes per second and core to reach)
CASES = ((480, 320, 1.0, 10, 25), (240, 160, 1.0, 10, 80), (112, 112, 0.3, 6, None))


def measure(width: int, height: int, jitter: float, most: int, repetitions: int, scenes: int) -> dict[str, list[float]]:
    """Scenes per CPU second of ray-casting and of everything, and images per CPU second of PNG encoding; one value a repetition."""
    config = RenderConfig(15, width, height, jitter, max_objects=most)
    rates: dict[str, list[float]] = {"cast": [], "all": [], "png": []}
    size = scenes_together(width, height)
    with single_thread():
        for repetition in range(repetitions + 1):
            draw = cast = png = 0.0
            count = 0
            while count < scenes:
                # The same scenes in every repetition: the spread is the machine's.
                jobs = [(i, TYPES[i % len(TYPES)]) for i in range(count, count + size)]
                start = time.process_time()
                scenes_drawn, _ = draw_scenes(config, jobs)
                drawn = time.process_time()
                traced = trace(scenes_drawn, width, height)
                traced_at = time.process_time()
                images = picture(traced.scene3d, traced.tiles, traced.hits, config.smooth_edges).numpy()
                rendered = time.process_time()
                for image in images:
                    encode_png(image)
                png += time.process_time() - rendered
                cast += rendered - drawn
                # Drawing has traced the scene already, so "all" pays for that once.
                draw, count = draw + drawn - start + rendered - traced_at, count + size
            if repetition:  # the first one warms up
                rates["cast"].append(count / cast)
                rates["all"].append(count / draw)
                rates["png"].append(3 * count / png)
    return rates


def main() -> None:
    """Print one row per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few scenes, to see that it runs")
    smoke = parser.parse_args().smoke
    print("size      ray-casting scenes/s/core (min-max)   target   all scenes/s/core (min-max)   PNG images/s")
    for width, height, jitter, most, target in CASES:
        rates = measure(width, height, jitter, most, repetitions=1 if smoke else 7, scenes=2 if smoke else 40)
        cast, everything = (f"{median(rates[name]):.1f} ({min(rates[name]):.1f}-{max(rates[name]):.1f})" for name in ("cast", "all"))
        print(f"{f'{width}x{height}':<9} {cast:>36} {target or '-':>8} {everything:>29} {median(rates['png']):14.1f}")


if __name__ == "__main__":
    main()
