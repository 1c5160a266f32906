"""The families: each module has ``ABOUT``, ``BASELINES`` (the variants that ratios are against), ``cases(scale, device, dtype)`` and
``variants()``; where it differs from the default also ``SETTINGS`` (a scale's changes to `bench.harness.Settings`) and ``DTYPES``."""

NAMES = (
    "attention",
    "info_nce",
    "linear_cross_entropy",
    "layer_norm",
    "products",
    "patches",
    "loader",
    "feeding",
    "optimizer",
    "train_step",
    "generate",
)
