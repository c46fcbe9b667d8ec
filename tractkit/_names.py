"""Where each public name lives. Written by tools/export.py."""

NAMES = {
    "DataError": "files",
    "PointMap": "streamlines",
    "Streamlines": "streamlines",
    "atomic_path": "files",
    "cache_folder": "files",
    "compress": "streamlines",
    "concatenate_streamlines": "streamlines",
    "data_folder": "files",
    "resample_nb_points": "streamlines",
    "resample_step": "streamlines",
    "reverse": "streamlines",
    "segment_directions": "streamlines",
    "split": "streamlines",
    "take": "streamlines",
}
