"""The lazy top level, for editors and type checkers. Written by tools/export.py."""

from .models.directions import CosineRegression as CosineRegression
from .files import DataError as DataError
from .keyed import KEYED_VERSION as KEYED_VERSION
from .models.layers import KeyedDropout as KeyedDropout
from .models.learn2track import Learn2Track as Learn2Track
from .space import Origin as Origin
from .models.layers import PadBuckets as PadBuckets
from .space import Space as Space
from .models.layers import StackedRNN as StackedRNN
from .models.directions import Targets as Targets
from .models.base import TractographyModel as TractographyModel
from .volume import Volume as Volume
from .space import apply_affine as apply_affine
from .files import atomic_path as atomic_path
from .models.base import batch_voxel_sizes as batch_voxel_sizes
from .models.base import build_model as build_model
from .files import cache_folder as cache_folder
from .space import check_affine as check_affine
from .space import conversion_affine as conversion_affine
from .space import convert_points as convert_points
from .files import data_folder as data_folder
from .keyed import fold as fold
from .keyed import fold_ids as fold_ids
from .models.layers import initialize_weights as initialize_weights
from .models.base import load_model as load_model
from .volume import neighborhood_vectors as neighborhood_vectors
from .keyed import normal as normal
from .models.layers import pad_buckets as pad_buckets
from .keyed import permutation as permutation
from .models.directions import point_directions as point_directions
from .models.directions import previous_directions as previous_directions
from .keyed import random_bits as random_bits
from .models.base import register_model as register_model
from .models.base import save_model as save_model
from .keyed import torch_seed as torch_seed
from .keyed import uniform as uniform
from .models.directions import unit as unit
from .models.layers import use_generator as use_generator
from .space import voxel_order as voxel_order
from .space import voxel_sizes as voxel_sizes

__version__: str
__all__: list[str]
