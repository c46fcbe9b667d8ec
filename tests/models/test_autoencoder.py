"""The autoencoder of streamlines: the same in both senses and in any grid, trained, saved and resumed like others."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers_data import make_file
from helpers_training import log_without_time, same_states
from torch import nn

from tractkit.cli.commands import main
from tractkit.core.files import DataError
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.interpolation import GroupInputs
from tractkit.data.loader import BatchLoaderOneInput, StreamlinesBatchLoader
from tractkit.data.sampler import BatchIDSampler
from tractkit.models.autoencoder import (
    Autoencoder,
    equal_points,
    lines_in_world,
    runs_backwards,
    world_points,
)
from tractkit.models.base import build_model, load_model, model_class, save_model
from tractkit.models.learn2track import Learn2Track
from tractkit.runs.log import RunLog
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume
from tractkit.tracking.tracker import Tracker
from tractkit.training.config import build_trainer, read_run_config
from tractkit.training.state import TrainerState
from tractkit.training.trainer import TrainerOneInput

SMALL = dict(nb_points=24, latent_size=8, layer_sizes=(8, 16, 16), scale=30.0)


def small(**options) -> Autoencoder:
    return Autoencoder(**{**SMALL, **options})


def arcs(n=40, seed=0) -> list[np.ndarray]:
    """Arcs of 20 to 60 mm around the origin, mm."""
    r = np.random.default_rng(seed)
    lines = []
    for _ in range(n):
        t = np.linspace(-1, 1, r.integers(5, 60))[:, None]
        a, b, c = r.normal(size=(3, 3)) * [[10], [15], [5]]
        lines.append((a + b * t + c * t**2).astype(np.float32))
    return lines


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data file, and the tractograms that are in it."""
    return make_file(tmp_path_factory.mktemp("data"), n=16, points=(4, 30))


@pytest.fixture(scope="module")
def data(made):
    return made[0]


def trainer_of(data, folder, name="run", loader=StreamlinesBatchLoader, **options) -> TrainerOneInput:
    dataset, model = MultiSubjectDataset(data).load_data(), small(seed=5)
    sampler = BatchIDSampler(dataset, "streamlines", 8, 8, rng=3)
    groups = ("input", "streamlines") if loader is BatchLoaderOneInput else ("streamlines",)
    made = loader(dataset, model, *groups, rng=4, reverse_ratio=.5, noise_gaussian_size_forward=.2)
    options = dict(max_epochs=3, learning_rate=[.01, .005], clip_grad=10.0, num_threads=1, device="cpu",
                   progress=False) | options
    return TrainerOneInput(model, folder, name, sampler, made, **options)


def test_both_senses_have_one_description_and_keep_their_own_in_the_reconstruction():
    model, lines = small(), arcs()
    backwards = [line[::-1] for line in lines]
    assert np.allclose(model.embed(lines), model.embed(backwards), atol=1e-5)
    forth, back = (model.reconstruct(x).points.reshape(-1, 24, 3) for x in (lines, backwards))
    assert np.allclose(forth, back[:, ::-1], atol=1e-3) and not np.allclose(forth, back, atol=1)
    points = torch.from_numpy(equal_points(lines, 24))
    assert torch.equal(runs_backwards(points.flip(1)), ~runs_backwards(points))  # to the bit
    assert .2 < runs_backwards(points).float().mean() < .8  # both occur here


def test_grids_of_other_voxels_give_the_same_description():
    model, world = small(), Streamlines.from_list(arcs())
    plain = model.embed(world)
    for sizes, turn in (((1, 1, 1), [0, 1, 2]), ((2, 2, 2), [0, 1, 2]), ((.8, 1.5, 3), [1, 2, 0])):
        affine = np.eye(4)
        affine[:3, :3] = np.diag(sizes)[turn] * [1, -1, 1]
        affine[:3, 3] = 31, -17, 5
        t = Tractogram(world.transform(np.linalg.inv(affine)), affine, (50, 50, 50))
        assert np.allclose(model.embed(t), plain, atol=1e-4)
        assert np.abs(model.embed(t.streamlines) - plain).max() > .01  # read as mm, voxels are something else


def test_a_batch_of_several_subjects_is_what_each_tractogram_is(made):
    dataset, model = MultiSubjectDataset(made[0]).load_data(), small()
    loader = StreamlinesBatchLoader(dataset, model, "streamlines")
    batch = loader.load_batch_streamlines([("sub-0", np.arange(5)), ("sub-1", np.arange(7))], training=False)
    lines = [made[1]["sub-0"][np.arange(5)], made[1]["sub-1"][np.arange(7)]]
    wanted = np.concatenate([equal_points(t, 24) for t in lines])
    assert np.allclose(world_points(batch).view(-1, 24, 3), wanted, atol=1e-3)
    with torch.no_grad():
        drawn = model(None, batch).view(-1, 24, 3)
    assert np.allclose(drawn.view(-1, 3), np.concatenate([model.reconstruct(t).points for t in lines]), atol=1e-2)


def test_the_loss_is_the_mean_of_squared_distances():
    model = small()
    targets = torch.zeros(6, 3)
    outputs = torch.tensor([[3., 0, 0], [0, 4, 0], [0, 0, 0], [1, 2, 2], [0, 0, 0], [0, 0, 1]])
    loss, n = model.compute_loss(outputs, targets)
    assert n == 6 and float(loss) == pytest.approx((9 + 16 + 0 + 9 + 0 + 1) / 6)
    each, n = model.compute_loss(outputs, targets, average_results=False)
    assert each.tolist() == [9, 16, 0, 9, 0, 1] and n == 6
    assert model.compute_loss(outputs[:0], targets[:0]) == (0, 0)


def test_the_network_is_that_of_finta():
    model = Autoencoder()
    shapes = [(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride) for layer in model.modules()
              if isinstance(layer, nn.Conv1d)]
    sizes = [3, 32, 64, 128, 256, 512, 1024]
    assert shapes[:6] == [(a, b, (3,), (2,)) for a, b in zip(sizes, sizes[1:], strict=False)]
    assert shapes[6:] == [(b, a, (3,), (1,)) for a, b in zip(sizes, sizes[1:], strict=False)][::-1]
    assert model.encoder.to_latent.out_features == 32 and model.encoder.lengths == [256, 128, 64, 32, 16, 8, 4]
    with torch.no_grad():  # what the encoder reads is centered and scaled, mm
        x = torch.randn(2, 24, 3)
        a, b = small(center=(5, -3, 2), scale=10.0), small(center=(0, 0, 0), scale=1.0)
        moved = x.where(~runs_backwards(x)[:, None, None], x.flip(1))
        assert torch.allclose(a.encode(moved * 10 + torch.tensor([5., -3, 2])), b.encode(moved), atol=1e-4)
        assert torch.allclose(a.decode(a.encode(x)), b.decode(a.encode(x)) * 10 + torch.tensor([5., -3, 2]), atol=1e-3)


@pytest.mark.parametrize("loader", [StreamlinesBatchLoader, BatchLoaderOneInput])
def test_it_is_trained_by_the_ordinary_trainer_and_no_volume_is_read(made, tmp_path, monkeypatch, loader):
    read: list[str] = []
    monkeypatch.setattr(GroupInputs, "fetch", lambda self, subject, *_: read.append(subject))
    monkeypatch.setattr(GroupInputs, "sample", lambda *_: read.append("points"))
    trainer = trainer_of(made[0], tmp_path, loader=loader, max_epochs=8)
    lines = made[1]["sub-0"]

    def error():
        return np.linalg.norm(trainer.model.reconstruct(lines).points - equal_points(lines, 24).reshape(-1, 3), axis=1)

    before = np.median(error())
    state = trainer.train_and_validate()
    assert read == [] and np.median(error()) < .6 * before
    losses = [(e["train_loss"], e["valid_loss"]) for e in state.epochs]
    assert all(np.isfinite(x) for pair in losses for x in pair) and losses[-1][0] < .5 * losses[0][0]
    assert trainer.batch_loader.load_batch_streamlines([("sub-0", np.arange(3))]).nb_points.tolist() == [24] * 3


def test_a_model_that_reads_a_volume_still_needs_a_loader_that_does(data, tmp_path):
    dataset = MultiSubjectDataset(data).load_data()
    model = Learn2Track(3, rnn_layer_sizes=[4])
    loader = StreamlinesBatchLoader(dataset, model, "streamlines")
    with pytest.raises(TypeError, match="needs a batch_loader with load_batch_inputs"):
        TrainerOneInput(model, tmp_path, "run", BatchIDSampler(dataset, "streamlines", 8), loader)


def test_stopped_anywhere_and_resumed_it_ends_in_the_same_bits(data, tmp_path):
    whole = trainer_of(data, tmp_path, "whole").train_and_validate()
    stops = iter([1, 4, 5])
    for stop in stops:
        trainer = trainer_of(data, tmp_path)
        trainer.listeners.append(lambda event, t, stop=stop: event == "batch" and t.status.phase == "training"
                                 and t.state.global_step >= stop and t.stop())
        assert trainer.train_and_validate().finished is None
    parts = trainer_of(data, tmp_path).train_and_validate()
    assert same_states(whole, parts) == []
    assert log_without_time(RunLog(tmp_path / "whole")) == log_without_time(RunLog(tmp_path / "run"))


CHILD = """
import sys
from test_autoencoder import trainer_of
trainer = trainer_of(sys.argv[1], sys.argv[2], checkpoint_every_batches=1)
kill = int(sys.argv[3])
if kill:
    import os, signal
    trainer.listeners.append(lambda event, t: event == "batch" and t.state.global_step >= kill
                             and os.kill(os.getpid(), signal.SIGKILL))
trainer.start(process=sys.argv[4] == "process")
trainer.wait()
"""


def run_child(data, folder, kill: int, how="thread") -> int:
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", CHILD, str(data), str(folder), str(kill), how], env=env,
                          capture_output=True, text=True, timeout=180)
    print(done.stderr[-2000:])
    return done.returncode


@pytest.mark.full
def test_killed_in_a_thread_and_gone_on_with_in_a_process(data, tmp_path):
    whole = trainer_of(data, tmp_path, "whole", checkpoint_every_batches=1).train_and_validate()
    assert run_child(data, tmp_path, kill=2) == run_child(data, tmp_path, kill=5) == -signal.SIGKILL
    assert run_child(data, tmp_path, kill=0, how="process") == 0
    assert same_states(whole, TrainerState.load(tmp_path / "run")) == []
    assert log_without_time(RunLog(tmp_path / "whole")) == log_without_time(RunLog(tmp_path / "run"))


def test_saved_built_and_loaded_it_is_the_same(tmp_path):
    model = small(center=(1, 2, 3), seed=9)
    save_model(model, tmp_path)
    assert np.array_equal(load_model(tmp_path).embed(arcs()), model.embed(arcs()))
    again = build_model("Autoencoder", model.hyperparameters)
    assert again.hyperparameters == model.hyperparameters and "step_size" not in model.hyperparameters
    assert model_class("autoencoder") is Autoencoder
    a, b, c = small(seed=1), small(seed=1), small(seed=2)
    assert torch.equal(a.encoder.to_latent.weight, b.encoder.to_latent.weight)
    assert not torch.equal(a.encoder.to_latent.weight, c.encoder.to_latent.weight)


def test_what_lies_between_two_streamlines_begins_and_ends_with_them():
    model, lines = small(), arcs()
    a, b = lines[0], lines[1]
    between = model.interpolate(a, b, 5)
    assert np.allclose(between[0], model.reconstruct([a])[0], atol=1e-3) and len(between) == 5
    end = model.reconstruct([b])[0]
    assert min(np.abs(between[4] - end).max(), np.abs(between[4] - end[::-1]).max()) < 1e-3
    back = model.interpolate(a[::-1], b, 5)
    assert np.allclose(np.stack(list(back)), np.stack(list(between))[:, ::-1], atol=1e-3)
    middle = model.decode(torch.from_numpy(model.embed([a, b]).mean(0, keepdims=True)))[0].detach().numpy()
    assert min(np.abs(between[2] - x).max() for x in (middle, middle[::-1])) < 1e-3
    with pytest.raises(ValueError, match="n must be of at least 2"):
        model.interpolate(a, b, 1)
    with pytest.raises(ValueError, match="one streamline is needed at each end, here are 40"):
        model.interpolate(Streamlines.from_list(lines), b, 3)


def test_batches_of_any_size_give_the_same():
    model, lines = small(), arcs(21)
    assert np.allclose(model.embed(lines, batch_size=4), model.embed(lines), atol=1e-5)
    assert model.embed([]).shape == (0, 8) and model.embed([]).dtype == np.float32
    assert len(model.reconstruct([])) == 0 and model.embed(lines).dtype == np.float32
    from nibabel.streamlines import ArraySequence

    assert np.array_equal(model.embed(ArraySequence(lines)), model.embed(lines))


@pytest.mark.parametrize("wrong, message", [
    ([np.zeros((5, 3)), np.zeros((1, 3))], "1 of 2 streamlines have fewer than two points; streamline 1 has 1"),
    ([np.zeros((0, 3)), np.ones((4, 3))], "streamline 0 has 0"),
    ([np.full((4, 3), np.nan)], "NaN"), ([np.zeros((4, 2))], r"shape \(k, 3\)")])
def test_what_has_no_shape_is_refused_in_one_sentence(wrong, message):
    with pytest.raises(DataError, match=message):
        small().embed(wrong)


def test_settings_that_cannot_be():
    with pytest.raises(TypeError, match=r"give a list of them"):
        lines_in_world(np.zeros((5, 3)))
    for options, message in (
            (dict(nb_points=4), "an nb_points of at least 5, not 4"),
            (dict(layer_sizes=[]), "layer_sizes must be a list"),
            (dict(center=[1, 2]), "three numbers"), (dict(scale=0), "scale must be positive"),
            (dict(latent_size=0), "latent_size must be of at least 1"), (dict(layer_sizes=[8, 0]), "at least 1")):
        with pytest.raises(ValueError, match=message):
            small(**options)
    with torch.no_grad():  # a point has no direction to be turned into, and is finite
        assert torch.isfinite(small().rebuild(torch.ones(1, 24, 3))).all()
        odd = small(nb_points=17)
        assert odd.rebuild(torch.randn(2, 17, 3)).shape == (2, 17, 3)


def test_parts_of_streamlines_are_refused_with_the_setting_that_makes_them(data, tmp_path):
    trainer = trainer_of(data, tmp_path)
    trainer.batch_loader.change(split_ratio=1.0)
    with pytest.raises(ValueError, match=r"reads streamlines of 24 points.*split_ratio at 0"):
        trainer.train_and_validate()


def test_a_streamline_without_points_in_a_batch_counts_for_nothing(made):
    model, dataset = small(), MultiSubjectDataset(made[0]).load_data()
    batch = StreamlinesBatchLoader(dataset, model, "streamlines").load_batch_streamlines([("sub-0", np.arange(3))])
    with torch.no_grad():
        whole = model(None, batch)
        batch.offsets = torch.tensor([0, 24, 24, 48, 72])
        assert torch.equal(model(None, batch), whole) and whole.shape == (72, 3)


def test_it_does_not_track():
    model, volume = small(), Volume(np.zeros((4, 4, 4, 1), np.float32), np.eye(4))
    # What a model that is only trained is to say, see TractographyModel.step.
    with pytest.raises(NotImplementedError, match="Autoencoder cannot track"):
        model.step(torch.zeros(1, 1), torch.zeros(1, 3), ())
    with pytest.raises(TypeError, match="Autoencoder cannot track: .*such as Learn2Track"):
        Tracker(model, volume, Volume(np.ones((4, 4, 4), np.uint8), np.eye(4)))


def test_from_a_command_line_and_its_config(data, tmp_path, capsys):
    argv = ["train", str(data), "--model", "autoencoder", "--nb_points", "24", "--latent_size", "8", "--layer_sizes",
            "8", "16", "--center", "1", "2", "3", "--experiments_path", str(tmp_path), "--experiment_name", "run",
            "--max_epochs", "2", "--reverse_ratio", "0.5", "--device", "cpu", "--num_threads", "1", "--no-progress",
            "--rng", "7"]
    assert main(argv) == 0
    assert "streamlines 'streamlines'" in capsys.readouterr().out
    config = read_run_config(tmp_path / "run")
    assert config["model"] == {"class": "Autoencoder", "nb_points": 24, "latent_size": 8, "layer_sizes": [8, 16],
                               "center": [1.0, 2.0, 3.0], "scale": 50.0, "seed": config["model"]["seed"]}
    assert config["loader"]["class"] == "StreamlinesBatchLoader" and config["loader"].get("input_group_name") is None
    config["trainer"] |= {"experiments_path": str(tmp_path), "experiment_name": "again"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    build_trainer(tmp_path / "mine.yaml").train_and_validate()
    assert same_states(TrainerState.load(tmp_path / "run"), TrainerState.load(tmp_path / "again")) == []
    assert main([*argv[:-2], "--step_size", "1", "--experiment_name", "other"]) == 2
    assert "model.step_size is not known" in capsys.readouterr().err


def test_the_code_of_a_run_builds_its_model(data, tmp_path):
    from tractkit.lab.settings_code import code_of_settings

    code = code_of_settings(trainer_of(data, tmp_path).config())
    assert "from tractkit.models.autoencoder import Autoencoder" in code and "StreamlinesBatchLoader(" in code
    assert "latent_size=8" in code and "center" not in code  # what is the default is left out


def test_tractograms_of_dipy_and_nibabel_are_taken_and_stay_as_they_are(tmp_path):
    import nibabel as nib

    model, affine = small(), np.diag([-2.0, 2, 2, 1])
    affine[:3, 3] = 60, -50, -50
    t = Tractogram(Streamlines.from_list(arcs()).transform(np.linalg.inv(affine)), affine, (90, 90, 90))
    wanted = model.embed(t)
    sft = t.to_sft()
    sft.to_vox()
    sft.to_corner()
    before = sft.streamlines.copy()
    assert np.allclose(model.embed(sft), wanted, atol=1e-4)
    assert sft.space.value == "vox" and sft.origin.value == "corner"
    assert np.array_equal(sft.streamlines.get_data(), before.get_data())
    for name in ("a.trk", "a.tck"):
        t.save(tmp_path / name)
        for lazy in (False, True):
            loaded = nib.streamlines.load(tmp_path / name, lazy_load=lazy)
            for given in (loaded, loaded.tractogram):
                assert np.allclose(model.embed(given), wanted, atol=1e-3)
    in_voxels = nib.streamlines.Tractogram([*t.streamlines], affine_to_rasmm=affine)
    assert np.allclose(model.embed(in_voxels), wanted, atol=1e-4)
    with pytest.raises(DataError, match="affine_to_rasmm"):
        model.embed(nib.streamlines.Tractogram(arcs()))
    for path in (tmp_path / "a.trk", "a.trk"):
        with pytest.raises(TypeError, match=r"load it, tk.Tractogram.load\(path\)"):
            model.embed(path)


def test_nan_and_length_zero_name_the_streamline():
    lines = arcs(3)
    lines[2] = lines[2].copy()
    lines[2][1] = np.nan
    n = len(lines[0]) + len(lines[1]) + 1
    with pytest.raises(DataError, match=f"the first is point {n}, which is point 1 of streamline 2"):
        small().embed(lines)
    with pytest.raises(DataError, match="1 of 3 streamlines have a length of 0; all points of streamline 2 are"):
        small().embed([*lines[:2], np.ones((5, 3))])
