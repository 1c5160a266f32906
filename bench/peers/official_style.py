"""Peer A: the official arithmetic and launch pattern (clip4idc.md 1 to 5), in our words.

fp16 towers with fp16 optimiser state, an fp32 captioner, one optimiser update per tensor, the text tower run in captioning and dropped, both
pairs of a scene in a model call each, greedy decoding without a cache. `python -m bench.count` holds its operators against the official ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from bench.peers.official_model import Captioner, Clip
from bench.peers.stepper import Stage
from fastidc.checkpoint.names import ALIASES
from fastidc.config import CLIP_MEAN, CLIP_STD, PAD_ID, PRESETS, ModelConfig, Recipe
from fastidc.data.loaders import PairBatch

MAX_WORDS = 32


class Model(nn.Module):
    """Towers and, in the second stage, the captioner."""

    def __init__(self, config: ModelConfig, stage: Stage):
        super().__init__()
        self.clip = Clip(config)
        self.decoder = Captioner(config, self.clip.token_embedding.weight, self.clip.positional_embedding) if stage == "finetune" else None

    def encode(self, ids: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, L]; before, after [B, 1, 3, H, W] -> text [B, 1, E], pair [B, 1, E], hidden [B, 2(n+1), E]"""
        images = torch.cat([before, after], 1)
        text, _ = self.clip.encode_text(ids)
        pair, hidden = self.clip.encode_image(images.view(-1, *images.shape[2:]))
        return text, pair, hidden

    def retrieval_loss(self, ids: Tensor, before: Tensor, after: Tensor) -> Tensor:
        text, pair, _ = self.encode(ids, before, after)
        text, pair = text.contiguous(), pair.contiguous()  # gathered here, where there is more than one process
        pair = pair.squeeze(1)
        pair = pair / pair.norm(dim=-1, keepdim=True)
        text = text.squeeze(1)
        text = text / text.norm(dim=-1, keepdim=True)
        scores = self.clip.logit_scale.exp() * torch.matmul(text, pair.t())
        one_way, other_way = (-torch.diag(F.log_softmax(x, dim=-1)) for x in (scores, scores.T))
        return 0.0 + (one_way.mean() + other_way.mean()) / 2

    def caption_loss(self, ids: Tensor, before: Tensor, after: Tensor, words: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """The loss of one pair's captions; ``ids`` is the empty text, encoded for nothing."""
        _, _, hidden = self.encode(ids, before, after)
        logits = self.decoder(words, hidden, mask, torch.ones(hidden.shape[:2], device=hidden.device).long())
        return 0.0 + F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=PAD_ID)

    @torch.no_grad()
    def greedy(self, ids: Tensor, before: Tensor, after: Tensor, start_id: int, steps: int) -> Tensor:
        """Always ``steps`` passes of encoder and decoder over everything so far -> ids [B, steps]"""
        _, _, hidden = self.encode(ids, before, after)
        token_mask = torch.ones(hidden.shape[:2], device=hidden.device).long()
        words = torch.full((len(hidden), 1), start_id, dtype=torch.long, device=hidden.device)
        mask = torch.ones_like(words)
        for _ in range(steps):
            chosen = self.decoder(words, hidden, mask, token_mask)[:, -1].max(1)[1].unsqueeze(1)
            words = torch.cat([words, chosen], 1)
            mask = torch.cat([mask, torch.ones_like(chosen)], 1)
        return words[:, 1:]


def freeze(clip: nn.Module) -> None:
    """`--freeze_layer_num 0` on CLEVR-Change: stem, tables and `ln_pre` stay."""
    for name, parameter in clip.named_parameters():
        trains = name.startswith(("ln_final.", "text_projection", "logit_scale")) or ".resblocks." in "." + name
        trains = trains or name.startswith(tuple(f"visual.{n}" for n in ("ln_post.", "proj", "bef_", "aft_", "joint_", "ln_mid.")))
        parameter.requires_grad_(trains)


def parameter_groups(model: nn.Module, stage: Stage, recipe: Recipe) -> list[dict]:
    """Every parameter, frozen ones too: decay or none by name, and CLIP's rate or the full one (clip4idc.md 5.1)."""
    new = tuple(f"clip.visual.{n}" for n in ("ln_mid", "joint_positional_embedding", "bef_embedding", "aft_embedding"))
    groups = {}
    for name, parameter in model.named_parameters():
        full = name.startswith(new) if stage == "adapt" else not name.startswith("clip.")
        decay = 0.0 if "bias" in name or "LayerNorm.weight" in name else recipe.weight_decay
        group = {"params": [], "lr": recipe.lr * (1 if full else recipe.coef_lr), "weight_decay": decay}
        groups.setdefault((full, decay), group)["params"].append(parameter)
    return list(groups.values())


class BertAdam(torch.optim.Optimizer):
    """Tensor by tensor: clip, moments, decay, scheduled rate, each an operator of its own; state in the parameter's dtype."""

    def __init__(self, groups: list[dict], recipe: Recipe, total_steps: int):
        super().__init__(groups, {"betas": recipe.betas, "eps": recipe.eps, "max_norm": recipe.clip_norm, "warmup": recipe.warmup})
        self.kind, self.total_steps = recipe.schedule, total_steps

    def factor(self, step: int, warmup: float) -> float:
        x = step / self.total_steps
        if x < warmup:
            return x / warmup
        return 0.5 * (1 + math.cos(math.pi * x)) if self.kind == "warmup_cosine" else max((x - 1) / (warmup - 1), 0)

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad, state = p.grad.data, self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p.data), v=torch.zeros_like(p.data))
                m, v, (b1, b2) = state["m"], state["v"], group["betas"]
                clip_grad_norm_(p, group["max_norm"])
                m.mul_(b1).add_(grad, alpha=1 - b1)
                v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
                update = m / (v.sqrt() + group["eps"])
                if group["weight_decay"] > 0:
                    update += group["weight_decay"] * p.data
                p.data.add_(-(group["lr"] * self.factor(state["step"], group["warmup"]) * update))
                state["step"] += 1


@dataclass(frozen=True)
class Inputs:
    """What the official loader hands over: images normalised in float64, each [B, 1, 3, H, W]; captions are
    padded to `MAX_WORDS`."""

    ids: Tensor  # [B, L]
    before: Tensor
    others: tuple[Tensor, ...]  # P of them
    captions: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()  # P of words, mask, targets, each [B, T]


class OfficialStepper:
    """See `bench.peers.stepper.Stepper`."""

    def __init__(self, model: Model, config: ModelConfig, stage: Stage, total_steps: int):
        self.model, self.config, self.stage = model, config, stage
        recipe = getattr(PRESETS["clevr"], stage)
        self.optimizer = BertAdam(parameter_groups(model, stage, recipe), recipe, total_steps)
        self.clip_norm = recipe.clip_norm
        self.reads_loss = True  # the official loop adds it up on the host after every backward, which waits for the device

    def prepare(self, batch: PairBatch) -> Inputs:
        device = self.model.clip.logit_scale.device
        length = min(MAX_WORDS, self.config.context_length)

        def padded(ids: Tensor) -> Tensor:
            return F.pad(ids.to(device), (0, max(0, length - ids.shape[-1])), value=PAD_ID)

        mean, std = (torch.tensor(x, dtype=torch.float64, device=device).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
        images = (batch.images.to(device).permute(0, 1, 4, 2, 3) / 255.0 - mean) / std
        before, *others = (x.contiguous() for x in images.split(1, dim=1))
        if batch.text is not None and batch.input_ids is None:
            return Inputs(padded(batch.text.padded()), before, tuple(others))
        empty = torch.zeros(len(images), length, dtype=torch.long, device=device)
        empty[:, 0], empty[:, 1] = self.config.start_id, self.config.end_id
        if batch.input_ids is None:
            return Inputs(empty, before, tuple(others))
        if batch.input_ids.shape[2] != 1:
            raise ValueError(f"the official code learns from one caption a pair and step, the batch has {batch.input_ids.shape[2]}.")
        words, targets = padded(batch.input_ids[:, :, 0]), padded(batch.target_ids[:, :, 0])
        captions = tuple(
            (w.contiguous(), (t != PAD_ID).long(), t.contiguous()) for w, t in zip(words.unbind(1), targets.unbind(1), strict=True)
        )
        return Inputs(empty, before, tuple(others), captions)

    def loss(self, inputs: Inputs) -> Tensor:
        if self.stage == "adapt":
            return self.model.retrieval_loss(inputs.ids, inputs.before, inputs.others[0])
        pairs = zip(inputs.others, inputs.captions, strict=True)
        losses = [self.model.caption_loss(inputs.ids, inputs.before, other, *caption) for other, caption in pairs]
        return losses[0] + losses[1] if len(losses) == 2 else losses[0]

    def forward_backward(self, batch: PairBatch | Inputs) -> Tensor:
        self.model.train()
        loss = self.loss(batch if isinstance(batch, Inputs) else self.prepare(batch))
        loss.backward()
        if self.reads_loss:
            float(loss.detach())
        return loss.detach()

    def optimizer_step(self) -> None:
        clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.clamp_(self.model.clip.logit_scale.data, max=math.log(100))

    def step(self, batch: PairBatch | Inputs) -> Tensor:
        loss = self.forward_backward(batch)
        self.optimizer_step()
        return loss

    def generate(self, batch: PairBatch | Inputs, max_length: int = MAX_WORDS) -> Tensor:
        self.model.eval()
        inputs = batch if isinstance(batch, Inputs) else self.prepare(batch)
        pairs = [self.model.greedy(inputs.ids, inputs.before, other, self.config.start_id, max_length) for other in inputs.others]
        return torch.stack(pairs, dim=1)


def build(
    config: ModelConfig,
    state: Mapping[str, Tensor] | None,
    stage: Stage,
    device: torch.device | str,
    compiled: bool = False,
    *,
    towers: torch.dtype = torch.float16,
    total_steps: int = 100_000,
) -> OfficialStepper:
    """``towers`` is the dtype of the towers' matrices; the official one is fp16. The official code compiles nothing, so ``compiled`` is refused."""
    if compiled:
        raise ValueError("peer A is the official code as it is: eager.")
    if config.pair_input != "concat":
        raise ValueError('the official code knows pair_input "concat" only.')
    with torch.device(device):
        model = Model(config, stage)
    if state is not None:
        state = {**state, **{alias: state[name] for alias, name in ALIASES.items() if alias not in state}}
        own = model.state_dict().keys()
        model.load_state_dict({name: tensor for name, tensor in state.items() if name in own})
    model.clip.convert(towers)
    freeze(model.clip)
    return OfficialStepper(model, config, stage, total_steps)
