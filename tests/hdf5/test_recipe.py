"""A model keeps how its input was made: the same is made for a new subject, and another one is refused."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from test_orientation import config, write_subject

import tractkit
from tractkit.core.files import DataError
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.loader import BatchLoaderOneInput
from tractkit.data.sampler import BatchIDSampler
from tractkit.hdf5.create import create_hdf5
from tractkit.hdf5.extract import extract_hdf5
from tractkit.hdf5.features import InputRecord
from tractkit.hdf5.recipe import join_inputs, prepare_input, recipe_in, recipe_of
from tractkit.hdf5.validate import validate_hdf5
from tractkit.models.base import load_model, save_model
from tractkit.models.learn2track import Learn2Track
from tractkit.spatial.space import apply_affine
from tractkit.spatial.volume import Volume
from tractkit.tracking.tracker import Tracker
from tractkit.training.trainer import TrainerOneInput

pytestmark = pytest.mark.filterwarnings("ignore:The legacy:PendingDeprecationWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of one batch, trained on a subject in LAS; and a folder with one in AIR."""
    root = tmp_path_factory.mktemp("recipe")
    for orientation in ("LAS", "AIR"):
        write_subject(root / orientation, orientation, "voxel")
    out = create_hdf5(root, root / "data.hdf5", config(standardization="independent"),
                      {"training": ["LAS"], "validation": ["AIR"]}, progress=False)
    dataset = MultiSubjectDataset(out).load_data()
    model = Learn2Track(22, rnn_layer_sizes=(8,), seed=0, step_size=1.0)
    trainer = TrainerOneInput(model, root, "run", BatchIDSampler(dataset, "streamlines"),
                              BatchLoaderOneInput(dataset, model, "input", "streamlines"),
                              max_epochs=1, max_batches_per_epoch_training=1, device="cpu", progress=False)
    trainer.train_and_validate()
    return root, dataset


def mask_of(volume: Volume) -> Volume:
    return Volume(np.ones(volume.shape3d, np.uint8), volume.affine)


def test_the_input_of_a_new_subject_is_that_of_the_data_file(trained):
    root, dataset = trained
    folder, stored = root / "run" / "best_model", dataset.subject("AIR").volumes["input"].volume
    model = load_model(folder)
    for of in (folder, str(folder), model):
        made = prepare_input(of, root / "AIR")
        np.testing.assert_array_equal(made.data, stored.data)
        assert np.array_equal(made.affine, stored.affine) and made.record == stored.record
    (recipe,) = recipe_in(folder).values()
    assert recipe.files == ("sh.nii.gz", "peaks.nii.gz", "fa.nii.gz") and recipe.orientation == "RAS"
    assert len(recipe.mean) == len(recipe.std) == 22 and len(recipe.voxel_sizes) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tracker(model, made, mask_of(made))


@pytest.mark.parametrize("changes, words", [
    ({"standardization": "none"}, "its standardization is 'none', not 'independent'"),
    ({"standardization": "all"}, "its standardization is 'all'"),
    ({"std_mask": "fa.nii.gz"}, "over fa.nii.gz, not 'independent'"),
    ({"files": ["peaks.nii.gz", "sh.nii.gz", "fa.nii.gz"], "features": ["peaks", "sh:descoteaux07_legacy", "scalars"]},
     "the order of its files is peaks.nii.gz, sh.nii.gz"),
    ({"features": ["sh:tournier07", "peaks", "scalars"]}, "its features are sh:tournier07, peaks"),
    ({"features": (), "axes": None}, "not said, .* its voxel axes run AIR, not RAS"),
])
def test_an_input_made_otherwise_is_refused(trained, changes, words):
    root, _ = trained
    groups = config(standardization="independent")
    groups["input"] |= changes
    out = create_hdf5(root, root / "other.hdf5", groups, {"training": ["AIR"]}, progress=False, overwrite=True)
    volume = MultiSubjectDataset(out).load_data().training_set[0].volumes["input"].volume
    with pytest.raises(DataError, match=words) as e:
        Tracker(load_model(root / "run" / "best_model"), volume, mask_of(volume))
    assert "prepare_input" in e.value.fix and "other.hdf5" in e.value.file


def test_a_plain_array_is_said_and_a_model_of_before_says_nothing(trained):
    root, dataset = trained
    model, volume = load_model(root / "run" / "best_model"), dataset.subject("LAS").volumes["input"].volume
    plain = replace(volume, record=None)
    with pytest.warns(UserWarning, match="could not be compared"):
        Tracker(model, plain, mask_of(volume))
    folder = root / "before"
    save_model(model, folder)
    card = json.loads((folder / "model.json").read_text())
    assert card["input"]["input"]["standardization"] == "independent"  # saved again, it is still there
    fresh = Learn2Track(22, rnn_layer_sizes=(8,), seed=0, step_size=1.0)
    save_model(fresh, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tracker(load_model(folder), plain, mask_of(volume))
    with pytest.raises(DataError, match="does not say how its input was made"):
        prepare_input(folder, root / "LAS")


def several(root, **of_maps):
    """The inputs of AIR in two groups, made as the config says."""
    both = config(standardization="independent")["input"]
    maps = {**both, "files": ["peaks.nii.gz", "fa.nii.gz"], "features": ["peaks", "scalars"], **of_maps}
    groups = config() | {"input": both | {"files": ["sh.nii.gz"], "features": both["features"][:1]}, "maps": maps}
    out = create_hdf5(root, root / "several.hdf5", groups, {"training": ["AIR"]}, progress=False, overwrite=True)
    return {n: v.volume for n, v in MultiSubjectDataset(out).load_data().training_set[0].volumes.items()}


def test_each_of_several_inputs_is_compared(trained):
    root, _ = trained
    inputs = several(root)
    model = Learn2Track(22, rnn_layer_sizes=(8,), seed=0, step_size=1.0)
    recipe = {name: recipe_of([InputRecord.from_plain(v.record)]) for name, v in inputs.items()}
    vars(model)["input_recipe"] = recipe
    made = {name: prepare_input(model, root / "AIR", group=name) for name in inputs}
    joined = join_inputs(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tracker(model, joined, mask_of(joined))
    np.testing.assert_array_equal(joined.data, np.concatenate([v.data for v in inputs.values()], axis=-1))
    Tracker(Learn2Track(22, rnn_layer_sizes=(8,), seed=0, step_size=1.0), joined, mask_of(joined))  # without a recipe
    with pytest.raises(DataError, match="its inputs are maps, input, not input, maps"):
        Tracker(model, join_inputs(dict(reversed(made.items()))), mask_of(joined))
    with pytest.raises(DataError, match="maps.*its standardization is 'none', not 'independent'"):
        Tracker(model, join_inputs(several(root, standardization="none")), mask_of(joined))
    for record in (None, made["input"].record):  # joined by hand
        with pytest.warns(UserWarning, match=r"could not be compared .*input: sh.nii.gz.*maps: peaks.nii.gz"):
            Tracker(model, replace(joined, record=record), mask_of(joined))
    with pytest.raises(DataError, match="maps.*has shape"):
        join_inputs({"input": made["input"], "maps": replace(made["maps"], data=made["maps"].data[1:])})


def test_a_new_subject_leads_to_a_tracker(trained):
    root, _ = trained
    model = load_model(root / "run" / "best_model")
    volume = tractkit.prepare_input(model, root / "LAS")
    own = Volume.load(root / "LAS" / "fa.nii.gz")  # as it lies there, not turned
    rng = np.random.default_rng(0)
    mask = Volume((rng.random(own.shape3d) < 0.8).astype(np.uint8), own.affine)
    with pytest.raises(DataError, match=r"the same voxels, with axes that run differently.*turned_like"):
        Tracker(model, volume, mask)
    turned = mask.turned_like(volume)
    Tracker(model, volume, turned)
    assert turned.same_grid(volume) and turned.turned_like(volume) is turned
    for voxel in np.argwhere(turned.data)[:9]:  # the same value at the same place
        there = np.rint(apply_affine(np.linalg.inv(mask.affine) @ turned.affine, voxel[None])[0]).astype(int)
        assert mask.data[tuple(there)] == 1
    np.testing.assert_array_equal(turned.turned_like(mask).data, mask.data)
    moved = Volume(mask.data, mask.affine + np.pad(np.ones((3, 1)), ((0, 1), (3, 0))))
    for volume_of_other_points in (moved, Volume(mask.data[1:], mask.affine)):
        with pytest.raises(DataError, match="Resample"):
            volume_of_other_points.turned_like(volume)


def test_files_that_a_new_subject_lacks_are_named_with_what_makes_them(trained, tmp_path):
    root, _ = trained
    (tmp_path / "sub-07").mkdir()
    with pytest.raises(DataError) as e:
        prepare_input(root / "run" / "best_model", tmp_path / "sub-07")
    assert str(tmp_path / "sub-07") == e.value.file
    assert "sh.nii.gz, peaks.nii.gz, fa.nii.gz: no such file" in str(e.value)
    assert "from-bids" in e.value.fix and "prepare_subject" in e.value.fix
    assert "config" not in str(e.value) and "enforce_files_presence" not in str(e.value)


def test_no_bars_where_none_can_move(trained, capsys):
    root, dataset = trained
    volume = dataset.subject("LAS").volumes["input"].volume
    Tracker(load_model(root / "run" / "best_model"), volume, mask_of(volume), min_length=0).track()
    path = create_hdf5(root, root / "bars.hdf5", config(standardization="independent"), {"training": ["LAS"]})
    validate_hdf5(path)
    extract_hdf5(path, root / "extracted")
    assert capsys.readouterr().err == ""
