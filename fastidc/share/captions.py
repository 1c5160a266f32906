"""The captioning path as one module that `torch.export` can follow: pixels in, greedy ids out, nothing of ours in between."""

import torch
from torch import Tensor, nn
from torch._higher_order_ops import while_loop
from torch.nn import functional as F

from fastidc.model.clip4idc import CLIP4IDC
from fastidc.model.layers import PatchEmbed
from fastidc.ops import fold_normalisation


class _Stem(nn.Module):
    """`PatchEmbed` of uint8 images in fp32, its normalisation folded once: as it is, it would be folded at every call of the program, and ask
    Python for the length of a batch, which makes it a constant."""

    def __init__(self, embed: PatchEmbed):
        super().__init__()
        self.patch_size = embed.patch_size
        for name, tensor in fold_normalisation(embed.weight.detach(), embed.mean, embed.std)._asdict().items():
            self.register_buffer(name, tensor)
        self.class_token, self.position, self.norm = embed.class_token, embed.position, embed.norm

    def forward(self, images: Tensor, index: None = None, augmentation: None = None) -> Tensor:
        """images uint8 [N, 3, S, S] -> [N, n+1, C]"""
        size = self.patch_size
        x = images.to(self.weight.dtype).unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [N, 3, rows, P, columns, P]
        x = F.linear(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), self.weight, self.bias)
        position = torch.cat([self.position[:1], self.position[1:] + self.remainder])
        return self.norm(torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1) + position)


class GreedyCaptions(nn.Module):
    """before, after uint8 [B, 3, S, S] -> ids [B, max_words] int64, zero after the end token: `CLIP4IDC.generate`, greedy and in fp32.

    The loop over words is `while_loop`, a part of the program, so it ends when all captions of the batch have; what it carries is made anew at
    every step, because a loop that is exported may write to nothing. Holds what captions need of ``model`` and nothing else: the text
    tower's blocks stay behind. ``model`` is used up, its patch embedding being replaced.
    """

    def __init__(self, model: CLIP4IDC, max_words: int):
        super().__init__()
        self.max_words, self.start, self.end = max_words, model.config.start_id, model.config.end_id
        self.pair_encoder, self.captioner = model.pair_encoder, model.captioner
        self.pair_encoder.patch_embed = _Stem(self.pair_encoder.patch_embed)
        self.words, self.positions = model.text_encoder.token_embedding, model.text_encoder.position

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        pairs, device = before.shape[0], before.device
        images = self.pair_encoder.intra(torch.stack([before, after]).flatten(0, 1)).unflatten(0, (2, pairs))
        tokens = self.pair_encoder.pool(self.pair_encoder.inter(images[0], images[1]))[1]
        encoded = zip(self.captioner.decoder, self.captioner.encode(tokens), strict=True)
        memory = [layer.keys_and_values(x) for layer, x in encoded]
        heads, size = memory[0].shape[2], memory[0].shape[4]
        start = (
            torch.zeros(1, dtype=torch.long, device=device),
            torch.full((pairs, 1), self.start, dtype=torch.long, device=device),
            torch.zeros(pairs, self.max_words, dtype=torch.long, device=device),
            torch.zeros(pairs, dtype=torch.bool, device=device),
            *(x.new_zeros(2, pairs, heads, self.max_words, size) for x in memory),
        )

        def goes_on(place: Tensor, last: Tensor, ids: Tensor, ended: Tensor, *caches: Tensor) -> Tensor:
            return (place[0] < self.max_words) & ~ended.all()

        def step(place: Tensor, last: Tensor, ids: Tensor, ended: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
            x = self.captioner.embed(last, self.words, self.positions.index_select(0, place))
            caches = tuple(cache.clone() for cache in caches)
            for layer, cache, pair in zip(self.captioner.decoder, caches, memory, strict=True):
                x = layer.step(x, cache, place, pair)
            logits = F.linear(self.captioner.transform(x[:, 0]), self.words, self.captioner.head_bias)
            chosen = logits.argmax(-1).masked_fill(ended, 0)[:, None]
            return place + 1, chosen, ids.index_copy(1, place, chosen), ended | (chosen[:, 0] == self.end), *caches

        return while_loop(goes_on, step, start)[2]
