"""Two source roots: the library and its kernels. Everything else is in pyproject.toml; nothing here probes the machine.

FASTIDC_BUILD_CUDA=1 has CMake build the CUDA C++ kernels into the package, for which nvcc must be there; otherwise nothing is compiled, and the
kernels are where they are first used.
"""

import os
import subprocess
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

BUILD_CUDA = os.environ.get("FASTIDC_BUILD_CUDA") == "1"
ROOT = Path(__file__).resolve().parent


class BuildWithFatbin(build_py):
    """Puts the fatbin beside its source: into the wheel, or into this tree where it is installed in place."""

    def run(self):
        super().run()
        prefix = ROOT / "kernels" if self.editable_mode else Path(self.build_lib).resolve()
        with tempfile.TemporaryDirectory() as folder:
            for command in (
                ["cmake", "-S", str(ROOT), "-B", folder, "-DCMAKE_BUILD_TYPE=Release", "-DFASTIDC_CUDA=ON", "-DFASTIDC_HOST=OFF"],
                ["cmake", "--build", folder],
                ["cmake", "--install", folder, "--prefix", str(prefix)],
            ):
                subprocess.run(command, check=True)


setup(
    packages=[*find_packages(include=["fastidc", "fastidc.*"]), *find_packages("kernels")],
    package_dir={"fastidc_kernels": "kernels/fastidc_kernels"},
    package_data={"fastidc": ["**/*.j2", "py.typed"], "fastidc_kernels": ["cuda/*.cu", "cuda/*.cuh"]},
    cmdclass={"build_py": BuildWithFatbin} if BUILD_CUDA else {},
    setup_requires=["cmake>=3.27"] if BUILD_CUDA else [],  # pip takes them for the isolated build, and only then
)
