"""Where each public name lives. Written by tools/export.py."""

NAMES = {
    "DataError": "files",
    "KEYED_VERSION": "keyed",
    "atomic_path": "files",
    "cache_folder": "files",
    "data_folder": "files",
    "fold": "keyed",
    "fold_ids": "keyed",
    "normal": "keyed",
    "permutation": "keyed",
    "random_bits": "keyed",
    "torch_seed": "keyed",
    "uniform": "keyed",
}
