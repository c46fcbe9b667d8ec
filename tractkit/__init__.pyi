"""The lazy top level, for editors and type checkers. Written by tools/export.py."""

<<<<<<< HEAD
from .phantom import BUNDLES as BUNDLES
=======
from .sampler import BatchIDSampler as BatchIDSampler
from .sampler import BatchIds as BatchIds
from .loader import BatchLoaderOneInput as BatchLoaderOneInput
from .scoring import BundleScores as BundleScores
from .dataset import ByteCache as ByteCache
from .models.directions import CosineRegression as CosineRegression
>>>>>>> main
from .files import DataError as DataError
from .baselines import DipySettings as DipySettings
from .scoring import GroundTruth as GroundTruth
from .hdf5 import HDF5_FORMAT as HDF5_FORMAT
from .scoring import INVALID_CONNECTION as INVALID_CONNECTION
from .keyed import KEYED_VERSION as KEYED_VERSION
<<<<<<< HEAD
from .phantom import LAYOUTS as LAYOUTS
from .phantom import Layout as Layout
from .space import Origin as Origin
from .phantom import PHANTOM_VERSION as PHANTOM_VERSION
from .phantom import PhantomSettings as PhantomSettings
from .phantom import PhantomSubject as PhantomSubject
=======
from .models.layers import KeyedDropout as KeyedDropout
from .models.learn2track import Learn2Track as Learn2Track
from .loader import MIN_PART as MIN_PART
from .dataset import MRIData as MRIData
from .dataset import MultiSubjectDataset as MultiSubjectDataset
from .dataset import MultisubjectSubset as MultisubjectSubset
from .scoring import NO_CONNECTION as NO_CONNECTION
from .space import Origin as Origin
from .models.layers import PadBuckets as PadBuckets
from .sampler import Plan as Plan
>>>>>>> main
from .streamlines import PointMap as PointMap
from .dataset import SFTData as SFTData
from .hdf5 import SPLITS as SPLITS
from .scoring import Scores as Scores
from .space import Space as Space
<<<<<<< HEAD
=======
from .hdf5 import SplitEntry as SplitEntry
from .models.layers import StackedRNN as StackedRNN
from .tracking import StepModel as StepModel
from .loader import StreamlineBatch as StreamlineBatch
from .scoring import StreamlineClasses as StreamlineClasses
>>>>>>> main
from .streamlines import Streamlines as Streamlines
from .loader import StreamlinesBatchLoader as StreamlinesBatchLoader
from .hdf5 import StreamlinesGroup as StreamlinesGroup
from .dataset import SubjectData as SubjectData
from .models.directions import Targets as Targets
from .scoring import TextTable as TextTable
from .tracking import Tracker as Tracker
from .tracking import TrackingReport as TrackingReport
from .tractogram import Tractogram as Tractogram
<<<<<<< HEAD
from .volume import Volume as Volume
=======
from .models.base import TractographyModel as TractographyModel
from .scoring import VALID as VALID
from .volume import Volume as Volume
from .hdf5 import VolumeGroup as VolumeGroup
from .scoring import WRONG_PATH as WRONG_PATH
>>>>>>> main
from .space import apply_affine as apply_affine
from .files import atomic_path as atomic_path
from .models.base import batch_voxel_sizes as batch_voxel_sizes
from .models.base import build_model as build_model
from .files import cache_folder as cache_folder
from .space import check_affine as check_affine
from .tracking import check_limits as check_limits
from .tracking import check_seeds as check_seeds
from .baselines import choose_dipy_settings as choose_dipy_settings
from .scoring import classify_streamlines as classify_streamlines
from .scoring import compare_tractograms as compare_tractograms
from .scoring import comparison_table as comparison_table
from .streamlines import compress as compress
from .streamlines import concatenate_streamlines as concatenate_streamlines
from .tractogram import concatenate_tractograms as concatenate_tractograms
from .space import conversion_affine as conversion_affine
from .space import convert_points as convert_points
from .hdf5 import create_hdf5 as create_hdf5
from .sampler import cut_batches as cut_batches
from .files import data_folder as data_folder
from .scoring import density_map as density_map
from .tracking import dilate_mask as dilate_mask
from .keyed import fold as fold
from .keyed import fold_ids as fold_ids
<<<<<<< HEAD
from .phantom import make_phantom as make_phantom
=======
from .hdf5 import group_checksum as group_checksum
from .hdf5 import hdf5_fingerprint as hdf5_fingerprint
from .models.layers import initialize_weights as initialize_weights
from .models.base import load_model as load_model
from .scoring import mdf as mdf
from .scoring import nearest_mdf as nearest_mdf
>>>>>>> main
from .volume import neighborhood_vectors as neighborhood_vectors
from .keyed import normal as normal
from .hdf5 import open_hdf5 as open_hdf5
from .models.layers import pad_buckets as pad_buckets
from .hdf5 import part_ids as part_ids
from .keyed import permutation as permutation
from .models.directions import point_directions as point_directions
from .baselines import previous_direction_loss as previous_direction_loss
from .models.directions import previous_directions as previous_directions
from .keyed import random_bits as random_bits
from .hdf5 import read_config as read_config
from .hdf5 import read_splits as read_splits
from .models.base import register_model as register_model
from .streamlines import resample_nb_points as resample_nb_points
from .streamlines import resample_step as resample_step
from .streamlines import reverse as reverse
<<<<<<< HEAD
from .phantom import sample_subjects as sample_subjects
=======
from .loader import sample_trilinear as sample_trilinear
from .models.base import save_model as save_model
from .scoring import score_table as score_table
from .scoring import score_tractogram as score_tractogram
from .tracking import seeds_from_mask as seeds_from_mask
>>>>>>> main
from .streamlines import segment_directions as segment_directions
from .phantom import simulate_subject as simulate_subject
from .streamlines import split as split
from .hdf5 import standardize as standardize
from .streamlines import take as take
from .keyed import torch_seed as torch_seed
from .baselines import track_dipy as track_dipy
from .baselines import track_oracle as track_oracle
from .keyed import uniform as uniform
from .models.directions import unit as unit
from .models.layers import use_generator as use_generator
from .space import voxel_order as voxel_order
from .space import voxel_sizes as voxel_sizes

__version__: str
__all__: list[str]
