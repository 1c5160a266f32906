"""Which parameters train, at which rate, and the optimisers (clip4idc.md 5)."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastidc import ops
from fastidc.config import Recipe
from fastidc.errors import FastidcError
from fastidc.train import shards

Stage = Literal["adapt", "finetune"]
MAX_LOGIT_SCALE = math.log(100)

# `--freeze_layer_num 0` still freezes these: the patch stem, both position tables and the tied word table.
_STEM = (
    "pair_encoder.patch_embed.",  # conv1, class token, positions, ln_pre
    "text_encoder.position",
)
_TOKENS = "text_encoder.token_embedding"
# What CLIP4IDC adds to the vision tower trains at the full rate in adaptation, and at CLIP's small one in fine-tuning.
_NEW = ("pair_encoder.before_embedding", "pair_encoder.after_embedding", "pair_encoder.joint_position", "pair_encoder.inter_norm.")


def is_frozen(name: str, recipe: Recipe) -> bool:
    """Whether the official freezing rules keep this parameter (clip4idc.md 5.2); -1 freezes nothing, k > 0 also the first k blocks."""
    if recipe.freeze_layers < 0:
        return False
    if name == _TOKENS:
        return recipe.freeze_tokens
    block = re.match(r"(?:pair|text)_encoder\.blocks\.(\d+)\.", name)
    return name.startswith(_STEM) or (block is not None and int(block[1]) < recipe.freeze_layers)


def takes_part(name: str, stage: Stage) -> bool:
    """Whether a stage's loss depends on the parameter: adaptation has no captioner, captioning no text tower but for its tables."""
    if stage == "adapt":
        return not name.startswith("captioner.")
    return name != "logit_scale" and (not name.startswith("text_encoder.") or name in (_TOKENS, "text_encoder.position"))


def parameter_groups(model: nn.Module, stage: Stage, recipe: Recipe) -> list[dict]:
    """The official groups as ``[{"params", "names", "lr", "weight_decay"}]``, trainable parameters only; sets ``requires_grad``.

    Biases do not decay, nor do the captioner's LayerNorm weights; CLIP's LayerNorm weights do.
    """
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(takes_part(name, stage) and not is_frozen(name, recipe))
        if not parameter.requires_grad:
            continue
        is_new = name.startswith(_NEW) if stage == "adapt" else name.startswith("captioner.")
        lr = recipe.lr if is_new else recipe.lr * recipe.coef_lr
        decays = not name.endswith("bias") and not (name.startswith("captioner.") and name.endswith("norm.weight"))
        weight_decay = recipe.weight_decay if decays else 0.0
        group = groups.setdefault((lr, weight_decay), {"params": [], "names": [], "lr": lr, "weight_decay": weight_decay})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def schedule(recipe: Recipe, total_steps: float) -> Callable[[int], float]:
    """step (from 0) -> factor of every group's rate. The official two start at 0, and the cosine drops where warm-up ends."""
    warmup = recipe.warmup

    def warmup_cosine(step: int) -> float:
        x = step / total_steps
        return x / warmup if x < warmup else 0.5 * (1 + math.cos(math.pi * x))

    def warmup_linear(step: int) -> float:
        x = step / total_steps
        return x / warmup if x < warmup else max((x - 1) / (warmup - 1), 0.0)

    def cosine(step: int) -> float:
        ramp = max(1, round(warmup * total_steps))
        if step < ramp:
            return (step + 1) / ramp
        return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total_steps - ramp)))

    return {"warmup_cosine": warmup_cosine, "warmup_linear": warmup_linear, "cosine": cosine}[recipe.schedule]


class BertAdam(torch.optim.Optimizer):
    """The official optimiser over `parameter_groups`: no bias correction, decay inside the update, per-tensor clip (clip4idc.md 5.1).

    Where the norm of all gradients is not finite, an update is left out; `skipped` counts those.
    """

    def __init__(self, groups: list[dict], *, betas: tuple[float, float], eps: float, clip_norm: float | None):
        super().__init__(groups, {"betas": betas, "eps": eps, "clip_norm": clip_norm})
        self._step = ops.BertAdamStep()

    @property
    def skipped(self) -> int:
        """Waits for the device."""
        return self._step.skipped

    def step(self, closure=None) -> None:
        self.update([group["lr"] for group in self.param_groups])

    @torch.no_grad()
    def update(self, lrs: Sequence[float] | Tensor, shadows: Any = None, **options) -> Tensor:
        """One step at the groups' rates ``lrs``; ``options`` and the norm that is returned are those of `fastidc.ops.BertAdamStep`.
        ``shadows``: a `fastidc.train.shadows.Shadows`, written in the same sweep."""
        groups = [self._group(group, shadows) for group in self.param_groups]
        norm = self._step(groups, lrs, **options)
        if shadows is not None:
            shadows.written(p for group in groups for p in group.params)
        return norm

    def _group(self, group: dict, shadows: Any) -> ops.BertAdamGroup:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p].update(first_moment=torch.zeros_like(p), second_moment=torch.zeros_like(p))
        states = [self.state[p] for p in params]
        parts = (params, [p.grad for p in params], [s["first_moment"] for s in states], [s["second_moment"] for s in states])
        constants = (group["betas"], group["eps"], group["weight_decay"], group["clip_norm"])
        beside = None if shadows is None else [shadows.of(p) for p in params]
        return ops.BertAdamGroup(*([shards.local(x) for x in part] for part in parts), *constants, shadows=beside)


def build_optimizers(groups: list[dict], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The optimisers that share ``groups``: one, or with "muon" two.

    "muon" is Muon for the matrices of the blocks and AdamW for tables, projections, norms and biases; rates mean the same in both. Muon
    orthogonalises each matrix's momentum (torch.optim.Muon, scaled to AdamW's update size): from random initialisation it needs far fewer
    samples, which is what a demo on two cores has little of.
    """
    adamw = {"betas": recipe.betas, "eps": recipe.eps, "fused": True}
    if recipe.optimizer == "bert_adam":
        # No clip of single tensors: `Optimizer` has clipped all of them together to the same norm, after which none exceeds it.
        return [BertAdam(groups, betas=recipe.betas, eps=recipe.eps, clip_norm=None)]
    if recipe.optimizer == "adamw":
        return [torch.optim.AdamW(groups, **adamw)]

    def is_block_matrix(name: str, p: Tensor) -> bool:
        return p.dim() == 2 and re.search(r"\.(blocks|encoder|decoder)\.\d+\.", name) is not None

    def part(muon: bool) -> list[dict]:
        parts = []
        for group in groups:
            named = [(n, p) for n, p in zip(group["names"], group["params"], strict=True) if is_block_matrix(n, p) == muon]
            if named:
                parts.append({**group, "names": [n for n, _ in named], "params": [p for _, p in named]})
        return parts

    matrices, rest = part(True), part(False)
    return [
        *([torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")] if matrices else []),
        *([torch.optim.AdamW(rest, **adamw)] if rest else []),
    ]


class Optimizer:
    """One training step after the backward: global clip, scheduled rates, update, clamp of the temperature.

    Where the model has shadows (`fastidc.train.shadows`), BertAdam writes them with the weights. After the other optimisers the model finds the
    weights changed and copies them anew.
    """

    def __init__(self, model: nn.Module, stage: Stage, recipe: Recipe, total_steps: float, scaler: torch.amp.GradScaler | None = None):
        self.model, self.recipe = model, recipe
        groups = parameter_groups(model, stage, recipe)
        self.parameters = [p for group in groups for p in group["params"]]
        self.sharded = shards.is_sharded(model)
        self.factor = schedule(recipe, total_steps)
        self.steps = 0
        self.slowed = 1.0  # what every rate is multiplied by: halved where a run goes back to an earlier step
        self.inner = build_optimizers(groups, recipe)
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        self.param_groups = [group for inner in self.inner for group in inner.param_groups]
        self.base_lrs = [group["lr"] for group in self.param_groups]
        self._rates: Tensor | None = None
        self.loaded = 0  # how often `load_state_dict` has put other tensors in the place of the moments

    @property
    def lrs(self) -> list[float]:
        """Rates of the next step, group by group."""
        return [lr * self.factor(self.steps) * self.slowed for lr in self.base_lrs]

    def step(self) -> Tensor:
        """Updates from the gradients that are there and clears them; returns the global gradient norm before clipping.

        With a gradient that is not finite the update is left out, and the norm says so; on CUDA the device alone decides, and nothing waits for
        it. Muon and AdamW go on there as they are, unless a loss scaler is at work.
        """
        self.set_rates()
        norm = self.update()
        self.steps += 1
        return norm

    def set_rates(self) -> None:
        """Gives every group the rate of the next step; on CUDA BertAdam reads it from the device, where a captured `update` finds it too."""
        for group, lr in zip(self.param_groups, self.lrs, strict=True):
            group["lr"] = lr
        device = self.parameters[0].device
        # fp16 parameters are multiplied by numbers: a rate on the device would be rounded to fp16 before
        single = all(p.dtype == torch.float32 for p in self.parameters)
        if device.type == "cuda" and single and isinstance(self.inner[0], BertAdam):
            rates = torch.tensor(self.lrs, dtype=torch.float32, pin_memory=True)
            self._rates = rates.to(device, non_blocking=True) if self._rates is None else self._rates.copy_(rates, non_blocking=True)

    def update(self) -> Tensor:
        """`step` at the rates that are set, without counting it."""
        for inner in self.inner:
            self.scaler.unscale_(inner)
        norm = self._bert_adam(self.inner[0]) if isinstance(self.inner[0], BertAdam) else self._several()
        for inner in self.inner:
            inner.zero_grad(set_to_none=True)
        self.scaler.update()
        return norm

    def _bert_adam(self, inner: BertAdam) -> Tensor:
        """Clip, update and clamp as one operation. A loss scaler has noted what it found and needs no more: the norm decides."""
        lrs = [group["lr"] for group in self.param_groups] if self._rates is None else self._rates
        norm = shards.clip_grad_norm(self.parameters, self.recipe.clip_norm) if self.sharded else None
        ceiling = (self.model.logit_scale, MAX_LOGIT_SCALE)
        return inner.update(lrs, self.model.shadows, clip_norm=self.recipe.clip_norm, norm=norm, ceiling=ceiling)

    def _several(self) -> Tensor:
        clip = shards.clip_grad_norm if self.sharded else nn.utils.clip_grad_norm_
        norm = clip(self.parameters, self.recipe.clip_norm)
        # One decision for all optimisers: the clip has spread what is not finite to every gradient. A GPU waits for it with a scaled loss only.
        skip = (self.scaler.is_enabled() or norm.device.type == "cpu") and not bool(norm.isfinite())
        for inner in self.inner:
            if not skip:
                self.scaler.step(inner)
        torch.autograd.graph.increment_version(self.parameters)  # torch's fused AdamW does not, and shadows are copied anew by it
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return norm

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """("name of the parameter/name of the moment", tensor) of all that the inner optimisers remember, by name rather than by place."""
        for inner in self.inner:
            for group in inner.param_groups:
                for name, p in zip(group["names"], group["params"], strict=True):
                    yield from ((f"{name}/{key}", value) for key, value in inner.state.get(p, {}).items())

    def state_of(self, moments: Mapping[str, Tensor], steps: int, scaler: dict) -> dict:
        """What `load_state_dict` takes, of what `moments` gave, in this optimiser's groups and with its constants."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for path, value in moments.items():
            name, _, key = path.rpartition("/")
            by_name.setdefault(name, {})[key] = value
        inners = []
        for inner in self.inner:
            names = [name for group in inner.param_groups for name in group["names"]]
            state = {i: by_name[name] for i, name in enumerate(names) if name in by_name}
            # an optimiser whose every step was left out has no moments yet
            inners.append({"state": state, "param_groups": inner.state_dict()["param_groups"], "untouched": not state})
        return {"steps": steps, "inner": inners, "scaler": scaler}

    def state_dict(self) -> dict:
        """Everything that the next step depends on besides weights and gradients; tensors, numbers and names only."""
        return {"steps": self.steps, "inner": [inner.state_dict() for inner in self.inner], "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict, source: str) -> None:
        """Undoes `state_dict`; FastidcError naming ``source`` where it belongs to other parameters or to another optimiser."""
        try:
            theirs = [[list(group["names"]) for group in inner["param_groups"]] for inner in state["inner"]]
            if theirs != [[list(group["names"]) for group in inner.param_groups] for inner in self.inner]:
                raise FastidcError(
                    f"{source}: its parameters are grouped otherwise than this run's; resume with the same task, optimiser, rates and freezing."
                )
            if not isinstance(state["steps"], int) or state["steps"] < 0:
                raise FastidcError(f"{source}: its number of steps is {state['steps']!r}; the file is damaged.")
            if bool(state["scaler"]) != self.scaler.is_enabled():
                raise FastidcError(f"{source}: it was written with another --precision, as far as loss scaling goes; resume with the same.")
            for inner, saved in zip(self.inner, state["inner"], strict=True):
                _check_moments(inner, saved["state"], 0 if saved.get("untouched") else state["steps"], source)
                inner.load_state_dict(saved)
            self.loaded += 1
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.steps = state["steps"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, FastidcError):
                raise
            raise FastidcError(f"{source}: not the optimiser's state of a fastidc run ({type(error).__name__}: {error}).") from None
        self.param_groups = [group for inner in self.inner for group in inner.param_groups]


_MOMENTS = {"BertAdam": ("first_moment", "second_moment"), "AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}


def _check_moments(inner: torch.optim.Optimizer, saved: dict, steps: int, source: str) -> None:
    """FastidcError unless a saved state has every parameter's moments, in its shape."""
    place = 0
    for group in inner.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            entry = saved.get(place, {})
            place += 1
            if steps and not entry:
                raise FastidcError(f"{source}: the moments of {name} are missing; the file is damaged.")
            needed = _MOMENTS.get(type(inner).__name__, entry.keys())
            if entry and entry.keys() != set(needed):
                raise FastidcError(
                    f"{source}: {name} has the moments {', '.join(entry)}, and {', '.join(needed)} are needed; the file is damaged."
                )
            for key, value in entry.items():
                if not isinstance(value, Tensor):
                    continue
                shape = [] if key == "step" else list(p.shape)
                if list(value.shape) != shape:
                    raise FastidcError(
                        f"{source}: {key} of {name} has shape {list(value.shape)}, the parameter {shape}; the file is damaged."
                    )
                if not value.is_floating_point() or (needed != _MOMENTS["Muon"] and key != "step" and value.dtype != p.dtype):
                    raise FastidcError(f"{source}: {key} of {name} is {value.dtype}, the parameter {p.dtype}; the file is damaged.")
