"""The lazy top level, for editors and type checkers. Written by tools/export.py."""

from .phantom import BUNDLES as BUNDLES
from .files import DataError as DataError
from .keyed import KEYED_VERSION as KEYED_VERSION
from .phantom import LAYOUTS as LAYOUTS
from .phantom import Layout as Layout
from .space import Origin as Origin
from .phantom import PHANTOM_VERSION as PHANTOM_VERSION
from .phantom import PhantomSettings as PhantomSettings
from .phantom import PhantomSubject as PhantomSubject
from .streamlines import PointMap as PointMap
from .space import Space as Space
from .streamlines import Streamlines as Streamlines
from .tractogram import Tractogram as Tractogram
from .volume import Volume as Volume
from .space import apply_affine as apply_affine
from .files import atomic_path as atomic_path
from .files import cache_folder as cache_folder
from .space import check_affine as check_affine
from .streamlines import compress as compress
from .streamlines import concatenate_streamlines as concatenate_streamlines
from .tractogram import concatenate_tractograms as concatenate_tractograms
from .space import conversion_affine as conversion_affine
from .space import convert_points as convert_points
from .files import data_folder as data_folder
from .keyed import fold as fold
from .keyed import fold_ids as fold_ids
from .phantom import make_phantom as make_phantom
from .volume import neighborhood_vectors as neighborhood_vectors
from .keyed import normal as normal
from .keyed import permutation as permutation
from .keyed import random_bits as random_bits
from .streamlines import resample_nb_points as resample_nb_points
from .streamlines import resample_step as resample_step
from .streamlines import reverse as reverse
from .phantom import sample_subjects as sample_subjects
from .streamlines import segment_directions as segment_directions
from .phantom import simulate_subject as simulate_subject
from .streamlines import split as split
from .streamlines import take as take
from .keyed import torch_seed as torch_seed
from .keyed import uniform as uniform
from .space import voxel_order as voxel_order
from .space import voxel_sizes as voxel_sizes

__version__: str
__all__: list[str]
