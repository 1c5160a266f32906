"""Which ids a data set has, of which type, in which split: the arithmetic of the released files (data_evaluation.md 1.1)."""

from fastidc.data.random import generator
from fastidc.data.render.config import TYPES, RenderConfig

# The released type_mapping.json lists the types in this order.
MAPPING_ORDER = ("color", "material", "move", "drop", "add")
# 197 of 40,000 released ids are missing.
_MISSING = 0.005


def scene_ids(config: RenderConfig) -> dict[str, list[int]]:
    """The ids of each type, ascending: types are blocks of equally many ids, each with a few ids missing."""
    share, extra = divmod(config.scenes, len(TYPES))
    block = share + (extra > 0) + max(1, round(_MISSING * share))
    ids = {}
    for i, change in enumerate(TYPES):
        rng = generator(config.seed, "render ids", change)
        # Like the released blocks, every block starts with its first id.
        missing = set((1 + rng.permutation(block - 1)[: block - share - (i < extra)]).tolist())
        ids[change] = [i * block + j for j in range(block) if j not in missing]
    return ids


def split_ids(config: RenderConfig, ids: dict[str, list[int]]) -> dict[str, list[int]]:
    """85/5/10 of every type, at least one scene of each type in each split, in a drawn order."""
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for change, numbers in ids.items():
        rng = generator(config.seed, "render splits", change)
        order = [numbers[i] for i in rng.permutation(len(numbers))]
        val, test = (max(1, round(part * len(order))) for part in (0.05, 0.10))
        splits["val"] += order[:val]
        splits["test"] += order[val : val + test]
        splits["train"] += order[val + test :]
    for name, numbers in splits.items():
        rng = generator(config.seed, "render splits", name)
        splits[name] = [numbers[i] for i in rng.permutation(len(numbers))]
    return splits
