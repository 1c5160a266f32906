"""Patches of stored images, and what augmentation makes of an image: the specification."""

import torch
from torch import Tensor

COLUMNS = (
    *("top", "left", "height", "width"),  # the part of the image that fills it, in pixels
    *("brightness", "contrast", "saturation"),  # factors; 1 changes nothing
    "noise",  # standard deviation, in levels
    *("key_low", "key_high"),  # of the noise, 24 bits each
    *("erase_top", "erase_left", "erase_height", "erase_width", "fill"),  # what is erased, and the level that it becomes
)
"""One image's augmentation: fp32 numbers in this order."""


def patches(images: Tensor, index: Tensor, patch_size: int, augmentation: Tensor | None, dtype: torch.dtype) -> Tensor:
    """images uint8 [I, H, W, 3], index [K], augmentation fp32 [K, 15] or None -> [K, n, 3*P*P], values 0 to 255: patches row by row, within one
    channel by channel, as a convolution's weight has it."""
    picked = images[index] if augmentation is None else augmented(images[index], augmentation)
    picked = picked.permute(0, 3, 1, 2).to(dtype)  # [K, 3, H, W]
    rows = [
        picked[:, :, y : y + patch_size, x : x + patch_size].flatten(1)
        for y in range(0, picked.shape[2], patch_size)
        for x in range(0, picked.shape[3], patch_size)
    ]
    return torch.stack(rows, dim=1)


def augmented(images: Tensor, parameters: Tensor) -> Tensor:
    """images uint8 [K, H, W, 3], parameters fp32 [K, 15] (`COLUMNS`) -> uint8 [K, H, W, 3].

    A part of the image is stretched over all of it, bilinearly; brightness, then contrast about 127.5, then saturation about the grey value;
    noise; rounded and cut to 0..255; a box is erased.
    """
    count, height, width, _ = images.shape
    p = {name: parameters[:, i].view(-1, 1, 1, 1) for i, name in enumerate(COLUMNS)}
    y, x = (torch.arange(n, device=images.device) for n in (height, width))
    v, u = _places(y, p["top"], p["height"]), _places(x, p["left"], p["width"])  # [K, H], [K, W]
    y0, x0 = v.long(), u.long()
    y1, x1 = (y0 + 1).clamp(max=height - 1), (x0 + 1).clamp(max=width - 1)
    which = torch.arange(count, device=images.device).view(-1, 1, 1)
    corners = [images[which, rows[:, :, None], columns[:, None]].float() for rows in (y0, y1) for columns in (x0, x1)]
    below, beside = (v - y0).view(count, -1, 1, 1), (u - x0).view(count, 1, -1, 1)
    upper = corners[0] + beside * (corners[1] - corners[0])
    lower = corners[2] + beside * (corners[3] - corners[2])
    colour = p["contrast"] * (p["brightness"] * (upper + below * (lower - upper)) - 127.5) + 127.5  # [K, H, W, 3]
    grey = (0.299 * colour[..., 0] + 0.587 * colour[..., 1] + 0.114 * colour[..., 2]).unsqueeze(-1)
    level = grey + p["saturation"] * (colour - grey)
    if images.is_cuda or (p["noise"] > 0).any():  # a GPU is not asked
        place = torch.arange(height * width * 3, device=images.device).view(1, height, width, 3)
        level = level + p["noise"] / NOISE_DEVIATION * noise(place, p["key_low"].long(), p["key_high"].long())
    out = (level.clamp(0, 255) + 0.5).to(torch.uint8)
    down, across = y.view(1, -1, 1, 1) - p["erase_top"], x.view(1, 1, -1, 1) - p["erase_left"]
    erased = (down >= 0) & (down < p["erase_height"]) & (across >= 0) & (across < p["erase_width"])
    return torch.where(erased, p["fill"].to(torch.uint8), out)


def _places(i: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Where output pixels i [n] lie in an image of n, [K, n] between 0 and n - 1; NaN lies at 0."""
    at = start.view(-1, 1) + (i + 0.5) * (length.view(-1, 1) / len(i)) - 0.5
    return torch.where(at > 0, at.clamp(max=len(i) - 1), 0.0)


NOISE_DEVIATION = 53510.62  # of `noise`: sqrt(8 (65536^2 - 1) / 12)
_LOW = 0xFFFFFFFF


def noise(place: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Philox-4x32-10 of counter (place, 0, 0, 0) under key (low, high), all int64 holding 32 bits: the sum of its eight 16-bit halves, less its
    mean; int64. A sum of eight uniforms is Gaussian but for its tails, which end at 4.9 standard deviations."""
    place, low, high = torch.broadcast_tensors(place, low, high)
    a, b, c, d = place & _LOW, *(torch.zeros_like(place) for _ in range(3))
    for turn in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c  # products wrap at 64 bits, which leaves their halves right
        key = (low + turn * 0x9E3779B9) & _LOW, (high + turn * 0xBB67AE85) & _LOW
        a, b = (second >> 32 & _LOW) ^ b ^ key[0], second & _LOW
        c, d = (first >> 32 & _LOW) ^ d ^ key[1], first & _LOW
    return sum((word & 65535) + (word >> 16) for word in (a, b, c, d)) - 262140
