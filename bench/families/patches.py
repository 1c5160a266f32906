"""The patch gather: images of a uint8 store, picked by index, as rows of raw values 0 to 255 in the products' dtype. Forward only."""

import torch
from torch import Tensor

from bench import roofline
from bench.case import Case, Inputs, Variant
from bench.cases import Scale, of
from bench.ours import variants_of
from bench.peers import patches as peers
from fastidc import ops

ABOUT = "uint8 images by index -> rows of patches; % of floor is % of the copy bandwidth"
BASELINES = ("index + view",)
SIDE = 224


def cases(scale: Scale, device: str, dtype: torch.dtype) -> list[Case]:
    return [_case(*shape, SIDE if scale != "smoke" else 2 * shape[1], device, dtype) for shape in of("patches", scale)]


def _case(name: str, patch: int, count: int, side: int, device: str, dtype: torch.dtype) -> Case:
    def inputs(device: str, dtype: torch.dtype, seed: int) -> Inputs:
        draw = torch.Generator(device=device).manual_seed(seed)
        images = torch.randint(0, 256, (count, side, side, 3), generator=draw, device=device, dtype=torch.uint8)
        index = torch.randperm(count, generator=draw, device=device)  # all of a store: rotated copies are cold only if they are read whole
        return {"images": images, "index": index, "patch_size": patch, "dtype": dtype}

    return Case(
        family="patches",
        name=f"{name} P={patch} {side}x{side} K={count}",
        shape={"patch": patch, "count": count, "side": side},
        device=device,
        dtype=dtype,
        make_inputs=inputs,
        exact=truth,
        plain=peers.index_and_view,
        outputs=((count, (side // patch) ** 2, 3 * patch * patch),),
        floor=roofline.patches(count, side, patch, dtype.itemsize),
        items=("images", count),
    )


def truth(images: Tensor, index: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    """images [I, H, W, 3], index [K] -> [K, n, 3*P*P]: patches row by row, within one channel by channel, as a convolution's weight has it."""
    picked = images[index].permute(0, 3, 1, 2).double()  # [K, 3, H, W]
    rows = [
        picked[:, :, y : y + patch_size, x : x + patch_size].flatten(1)
        for y in range(0, picked.shape[2], patch_size)
        for x in range(0, picked.shape[3], patch_size)
    ]
    return torch.stack(rows, dim=1)


def variants(case: Case) -> list[Variant]:
    def build(case: Case, backend: str):
        return lambda images, index, patch_size, dtype: ops.patches(images, index, patch_size, dtype=dtype, backend=backend)

    def facts(case: Case) -> dict:
        return {"head_dim": 3 * case.shape["patch"] * case.shape["side"]}

    return [*variants_of("patches", build, facts), *peers.variants()]
