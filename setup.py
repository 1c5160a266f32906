"""Two source roots: the library and its kernels. Everything else is in pyproject.toml; nothing here probes the machine."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastidc", "fastidc.*"]), *find_packages("kernels")],
    package_dir={"fastidc_kernels": "kernels/fastidc_kernels"},
    package_data={"fastidc": ["**/*.j2", "py.typed"], "fastidc_kernels": ["cuda/*.cu", "cuda/*.cuh"]},
)
