"""Where each public name lives. Written by tools/export.py."""

NAMES = {
    "DataError": "files",
    "atomic_path": "files",
    "cache_folder": "files",
    "data_folder": "files",
}
