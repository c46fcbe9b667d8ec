"""The lazy top level, for editors and type checkers. Written by tools/export.py."""

from .files import DataError as DataError
from .streamlines import PointMap as PointMap
from .streamlines import Streamlines as Streamlines
from .files import atomic_path as atomic_path
from .files import cache_folder as cache_folder
from .streamlines import compress as compress
from .streamlines import concatenate_streamlines as concatenate_streamlines
from .files import data_folder as data_folder
from .streamlines import resample_nb_points as resample_nb_points
from .streamlines import resample_step as resample_step
from .streamlines import reverse as reverse
from .streamlines import segment_directions as segment_directions
from .streamlines import split as split
from .streamlines import take as take

__version__: str
__all__: list[str]
