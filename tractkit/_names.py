"""Where each public name lives. Written by tools/export.py."""

NAMES = {
    "DataError": "files",
    "KEYED_VERSION": "keyed",
    "Origin": "space",
    "Space": "space",
    "apply_affine": "space",
    "atomic_path": "files",
    "cache_folder": "files",
    "check_affine": "space",
    "conversion_affine": "space",
    "convert_points": "space",
    "data_folder": "files",
    "fold": "keyed",
    "fold_ids": "keyed",
    "normal": "keyed",
    "permutation": "keyed",
    "random_bits": "keyed",
    "torch_seed": "keyed",
    "uniform": "keyed",
    "voxel_order": "space",
    "voxel_sizes": "space",
}
