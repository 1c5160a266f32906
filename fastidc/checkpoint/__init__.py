"""Reading and writing weights: fastidc folders, official CLIP4IDC files, OpenAI and open_clip CLIPs."""

from fastidc.checkpoint.hub import NO_CHANGE_FILE
from fastidc.checkpoint.names import (
    OPENAI_EXTRAS,
    PAIR_PARAMETERS,
    from_official,
    is_half_officially,
    official_dtypes,
    official_keys,
    our_name,
    to_official,
)
from fastidc.checkpoint.read import (
    CONFIG_FILE,
    FORMAT,
    WEIGHTS_FILE,
    Layout,
    Read,
    check_fit,
    default_intra_layers,
    folder_of,
    read,
    read_config,
)
from fastidc.checkpoint.write import check_expressible, save, save_official, save_openai, write_config

__all__ = [
    "CONFIG_FILE",
    "FORMAT",
    "NO_CHANGE_FILE",
    "OPENAI_EXTRAS",
    "PAIR_PARAMETERS",
    "WEIGHTS_FILE",
    "Layout",
    "Read",
    "check_expressible",
    "check_fit",
    "default_intra_layers",
    "folder_of",
    "from_official",
    "is_half_officially",
    "official_dtypes",
    "official_keys",
    "our_name",
    "read",
    "read_config",
    "save",
    "save_official",
    "save_openai",
    "to_official",
    "write_config",
]
