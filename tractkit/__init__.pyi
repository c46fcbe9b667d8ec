"""The lazy top level, for editors and type checkers. Written by tools/export.py."""

from .files import DataError as DataError
from .files import atomic_path as atomic_path
from .files import cache_folder as cache_folder
from .files import data_folder as data_folder

__version__: str
__all__: list[str]
