"""Each process holds a part of the parameters, their gradients and moments (FSDP2's fully_shard), for towers that would not fit beside their batch."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fastidc.config import Recipe
from fastidc.errors import FastidcError
from fastidc.train.distributed import World


def check(recipe: Recipe, precision: str, world: World) -> None:
    """FastidcError where sharding makes no sense or would change what is computed."""
    if world.size == 1:
        raise FastidcError("--fsdp shares the model out among processes, and there is one; start several with torchrun, or leave it out.")
    if precision not in ("bf16", "fp32"):
        raise FastidcError(
            f"--fsdp goes with --precision bf16 or fp32, not with {precision}, whose scaling or dtypes cannot be shared out."
        )
    if recipe.optimizer == "muon":
        raise FastidcError("--fsdp does not go with the optimiser muon, which needs whole matrices; take a preset with another one.")


def shard(model: nn.Module, world: World, device: torch.device) -> None:
    """Shares ``model``'s parameters out among ``world``'s processes, block by block; to be called before an optimiser is made.

    A block's weights are together only while it runs. The tables, norms and projections outside the blocks are, from a forward pass to its
    backward pass. logit_scale, which is one number, stays whole: `average_the_rest` is for its gradient.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world.size,))
    towers = [model.pair_encoder.blocks, model.text_encoder.blocks]
    if model.captioner is not None:
        towers += [model.captioner.encoder, model.captioner.decoder]
    for tower in towers:
        for block in tower:
            fully_shard(block, mesh=mesh)
            if hasattr(block, "at"):
                register_fsdp_forward_method(block, "at")
    fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})


def is_sharded(model: nn.Module) -> bool:
    return any(is_part(p) for p in model.parameters())


def is_part(x: Tensor) -> bool:
    return hasattr(x, "to_local")  # a DTensor, without importing what makes one


def like(whole: Tensor, p: Tensor) -> Tensor:
    """``whole``, which every process has, shared out as ``p`` is; itself where p is whole."""
    if not is_part(p):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)


def local(x: Tensor) -> Tensor:
    """This process's part of x, or x itself where it is whole; the same memory."""
    return x.to_local() if is_part(x) else x


@contextmanager
def gradients_stay(model: nn.Module) -> Iterator[None]:
    """A backward pass inside leaves whole gradients on each process, for a later one to sum and share out."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def average_the_rest(model: nn.Module, world: World) -> None:
    """Averages over processes the gradients that fully_shard does not know of."""
    for p in model.parameters():
        if p.grad is not None and not is_part(p):
            world.mean(p.grad)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` over parameters of which each process has a part: scales the gradients to a global norm of at most
    ``max_norm`` and returns the norm that they had, the same on every process."""
    parameters = [p for p in parameters if p.grad is not None]
    parts = [local(p.grad) for p in parameters if is_part(p)]
    wholes = [p.grad for p in parameters if not is_part(p)]

    def square(tensors: list[Tensor]) -> Tensor:
        return torch.stack([n.double() for n in torch._foreach_norm(tensors)]).square().sum()

    total = square(parts)
    dist.all_reduce(total)
    if wholes:
        total += square(wholes)
    norm = total.sqrt().float()
    torch._foreach_mul_([*parts, *wholes], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


@torch.no_grad()
def copy_whole(model: nn.Module, into: nn.Module) -> None:
    """Copies the parameters that all processes hold together into ``into``, an unsharded model of the same shape, on every process."""
    whole = dict(into.named_parameters())
    for name, p in model.named_parameters():
        whole[name].copy_(p.full_tensor() if is_part(p) else p)
