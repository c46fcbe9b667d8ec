"""Numbers of NumPy and torch are taken wherever a number is taken, and kept as plain numbers; others are refused."""

import json
import math
import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
import yaml
from helpers_data import make_file
from helpers_training import Fit, Points, Straight, fit, leaves, toy_model
from torch import nn

from tractkit.core.settings import plain_numbers, settings_of
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.loader import BatchLoaderOneInput
from tractkit.data.sampler import BatchIDSampler
from tractkit.data.settings import DatasetSettings, SamplerSettings
from tractkit.functional.torch_model import TorchModel, train_model
from tractkit.models.base import TractographyModel, load_model
from tractkit.models.learn2track import Learn2Track
from tractkit.spatial.volume import Volume
from tractkit.tracking.tracker import Tracker, dilate_mask, seeds_from_mask
from tractkit.training.optimizers import make_optimizer
from tractkit.training.policy import (
    DecreasingOnPlateau,
    Exponential,
    LossStop,
    Patience,
    PerEpoch,
    Schedule,
    Switch,
    as_value_policy,
)
from tractkit.training.settings import TrainerSettings

KINDS = {
    "float64": np.float64, "float32": np.float32, "array": lambda x: np.array(x), "tensor": lambda x: torch.tensor(x),
    "integer": lambda x: np.int64(x) if isinstance(x, int) else np.float64(x)}
PLAIN = (bool, int, float, str, type(None))


def are_plain(tree) -> bool:
    return all(type(value) in PLAIN for _, value in leaves(tree))


def test_what_is_plain():
    given = {"a": [np.float32(.5), torch.tensor(2)], np.int64(3): (np.bool_(True), np.array([1, 2])), "b": "text"}
    found = plain_numbers(given)
    assert found == {"a": [.5, 2], 3: (True, [1, 2]), "b": "text"} and are_plain(found)
    assert plain_numbers(given["b"]) is given["b"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_a_trainer(kind):
    for name, record in settings_of(TrainerSettings).items():
        for number in {int: [3], float: [.25], bool: [True]}.get(next((t for t in (int, float, bool)
                                                                        if t in record.types), None), []):
            given = KINDS[kind](number) if number is not True or kind in ("array", "tensor") else np.bool_(True)
            kept = getattr(TrainerSettings(**{name: given}), name)
            assert type(kept) is type(number) or (type(kept), type(number)) == (float, int), name
            assert kept == pytest.approx(number), name
    one, other = (
        TrainerSettings(max_epochs=f(4), clip_grad=f(0.5), learning_rate=[f(0.5)]) for f in (KINDS[kind], float)
    )
    assert pickle.dumps(one) == pickle.dumps(other)


RATES = {
    "number": np.logspace(-3, -1, 3)[1], "float32": np.float32(.01), "tensor": torch.tensor(.01), "0-d": np.array(.01),
    "array": np.array([.01, .005]), "list": [np.float64(.01), torch.tensor(.005)], "tensors": torch.tensor([.01, .005]),
    "exponential": Exponential(np.float64(.01), torch.tensor(.9), np.int64(1)), "per epoch": PerEpoch(np.array([.01])),
    "schedule": Schedule(np.float32(.01), {np.int64(1): np.float64(.5)}),
    "switch": Switch(torch.tensor(.01), {1: np.float64(.005)}),
    "plateau": DecreasingOnPlateau(initial=np.float64(.01), multiplier=torch.tensor(.5), patience=np.int64(1),
                                   rtol=np.float64(0), atol=np.float32(0))}


@pytest.mark.parametrize("name", RATES)
def test_a_learning_rate(tmp_path, name):
    trainer = fit(tmp_path, learning_rate=RATES[name], max_epochs=np.int64(2), patience=torch.tensor(5),
                  rng=np.uint32(3), policies=[Patience(np.int64(9), np.float32(.1)), LossStop(torch.tensor(99.))])
    state = trainer.train_and_validate()
    config = yaml.safe_load((trainer.folder / "config.yaml").read_text())["trainer"]
    assert config["max_epochs"] == 2 and type(state.seed) is int and "only_in_python" not in json.dumps(config)
    assert [len(trainer.log.batches()["learning_rate"]), state.epoch] == [12, 2]
    assert all(isinstance(v, (torch.Tensor, *PLAIN)) for _, v in leaves(state.state_dict()))
    assert type(state.optimizer.param_groups[0]["lr"]) is float
    pickle.loads(pickle.dumps(trainer.settings))


@pytest.mark.parametrize("name, wrong", [
    ("max_epochs", np.array([1, 2])), ("max_epochs", np.float64(2.5)), ("max_epochs", torch.tensor(math.nan)),
    ("learning_rate", np.float64("nan")), ("learning_rate", [.1, math.inf]), ("learning_rate", 1j),
    ("learning_rate", np.array([["a"]])), ("learning_rate", None), ("learning_rate", -.1), ("weight_decay", math.nan),
    ("weight_decay", math.inf), ("patience_delta", np.float32("nan")), ("clip_grad", np.datetime64("2020-01-01")),
    ("rng", math.inf), ("accumulate", math.inf), ("num_workers", np.array("2")), ("patience", [3]),
    ("checkpoint_every_seconds", math.nan), ("keep_checkpoints", torch.tensor([2, 3]))])
def test_others_are_refused_before_there_is_a_folder(tmp_path, name, wrong):
    with pytest.raises((ValueError, TypeError), match=name.replace("_", ".")):
        fit(tmp_path, **{name: wrong})
    assert not list(tmp_path.iterdir())


def test_commands(tmp_path):
    trainer = fit(tmp_path, max_epochs=3, keep_checkpoints=9)
    trainer.step(np.int64(2))
    assert trainer.state.global_step == 2
    trainer.change(learning_rate=np.float64(.02), max_epochs=np.int64(2), clip_grad=torch.tensor(.5))
    trainer.resume()
    trainer.wait()
    changes = trainer.state.fingerprints["changes"]
    assert are_plain(changes) and changes["max_epochs"] == [3, 2] and trainer.state.epoch == 2
    trainer.change(learning_rate=torch.tensor(.03), patience=np.array(4))
    assert type(trainer.learning_rate.value) is float and type(trainer.settings.patience) is int
    assert trainer.rewind(torch.tensor(2)).epoch == 2 and trainer.rewind(np.int64(1)).epoch == 1
    for wrong in (2.5, None, [1]):
        with pytest.raises(TypeError, match="finished epochs or.* a checkpoint"):
            trainer.rewind(wrong)
    with pytest.raises(ValueError, match="n must be a whole number"):
        trainer.step(2.5)
    assert not trainer.running


def test_samplers_loaders_and_models(tmp_path):
    data, _ = make_file(tmp_path / "data", n_subjects=2, n=12, points=(12, 20))
    dataset = MultiSubjectDataset(data, lazy=np.bool_(True), cache_size=np.int64(4)).load_data()
    model = Learn2Track(
        np.int64(3),
        rnn_layer_sizes=np.array([4, 4]),
        dropout=np.float32(0.25),
        dg_dropout=torch.tensor(0.0),
        nb_previous_dirs=np.int8(1),
        step_size=np.float64(2),
        seed=np.int64(5),
    )
    same = Learn2Track(3, rnn_layer_sizes=[4, 4], dropout=.25, step_size=2.0, seed=5)
    assert model.hyperparameters == same.hyperparameters and are_plain(model.hyperparameters)
    assert all(map(torch.equal, model.parameters(), same.parameters())) and type(model.step_size) is float
    sampler = BatchIDSampler(
        dataset, "streamlines", np.int64(8), torch.tensor(8.0), rng=np.uint8(3), bucket=np.bool_(True)
    )
    loader = BatchLoaderOneInput(
        dataset,
        model,
        "input",
        "streamlines",
        rng=torch.tensor(4),
        split_ratio=np.float32(0.25),
        noise_gaussian_size_forward=np.float64(0.1),
        device_bytes=np.int64(2**20),
    )
    assert are_plain(sampler.settings()) and are_plain(loader.settings()) and are_plain(dataset.settings())
    sampler.change(np.int64(6))
    loader.change(reverse_ratio=np.float64(.5))
    assert are_plain(sampler.settings()) and are_plain(loader.settings())
    for made in (
        lambda: BatchIDSampler(dataset, "streamlines", np.array([8])),
        lambda: Learn2Track(3, dropout=math.nan),
        lambda: Learn2Track(np.array([3, 4])),
        lambda: Learn2Track(3, step_size=math.inf),
        lambda: BatchLoaderOneInput(dataset, model, "input", "streamlines", step_size=math.nan),
    ):
        with pytest.raises((ValueError, TypeError), match="batch_size_training|dropout|nb_features|step_size"):
            made()


def test_models_of_a_user(tmp_path):
    class Mine(TractographyModel):
        def __init__(self, width, step_size=1.0):
            super().__init__(step_size, width=width)

    mine = Mine(np.int64(3), step_size=torch.tensor(.5))
    assert mine.hyperparameters == {"step_size": .5, "width": 3} and type(mine.step_size) is float
    with pytest.raises(TypeError, match="width"):
        Mine(object())

    model = toy_model()
    model.hyperparameters = {"width": np.int64(16), "rate": torch.tensor(.5), "sizes": np.array([1, 2])}
    trainer = fit(tmp_path, model=model, max_epochs=1)
    trainer.train_and_validate()
    config = yaml.safe_load((trainer.folder / "config.yaml").read_text())
    assert config["model"]["width"] == 16 and config["model"]["sizes"] == [1, 2]
    assert load_model(trainer.folder / "best_model", toy_model())
    again = fit(tmp_path, model=model, max_epochs=2)
    assert again.train_and_validate().epoch == 2


def test_what_methods_of_a_user_return(tmp_path):
    class Own(Fit):
        def compute_batch_loss(self, batch):
            loss, n = super().compute_batch_loss(batch)
            return loss, torch.tensor(n)

        def validate_one_epoch(self):
            self.epoch_metrics = {"score": torch.tensor(.5), "other": np.float32(.25)}
            return torch.tensor(super().validate_one_epoch())

        def train_one_epoch(self):
            return np.float64(super().train_one_epoch())

    class Described(Points):
        def settings(self):
            return {"n": np.int64(self.n), "sizes": np.array([1, 2]), "share": torch.tensor(.5)}

    state = fit(tmp_path, kind=Own, points=Described(), max_epochs=1).train_and_validate()
    assert are_plain(state.epochs) and state.epochs[0]["score"] == .5 and are_plain(state.fingerprints["sampler"])
    assert fit(tmp_path, kind=Own, points=Described(), max_epochs=2).train_and_validate().epoch == 2


def test_optimizers_and_functions(tmp_path):
    made = make_optimizer(nn.Linear(1, 1), "SGD", np.float64(.1), torch.tensor(0.), momentum=np.float32(.5))
    assert are_plain({k: v for k, v in made.param_groups[0].items() if k != "params"})
    assert type(as_value_policy(np.array(.5)).value) is float
    model = TorchModel(toy_model(), lambda x: x, nn.functional.mse_loss, "Adam")
    batches = [(np.ones((4, 1), np.float32), np.ones((4, 1), np.float32))] * 3
    train_model(model, batches, np.int64(2), np.float32(.01), checkpoints_path=tmp_path / "run", seed=torch.tensor(3))
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["trainer"]
    assert config["max_epochs"] == 2 and config["rng"] == 3


# -- the dataset and the tracker

@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_a_dataset(tmp_path, kind):
    of, data = KINDS[kind], make_file(tmp_path / "data", n_subjects=2, n=2, points=(5, 6))[0]
    numbers = dict(cache_size=3, cache_bytes=2**20, block_bytes=2**21)
    true = np.bool_(True) if kind not in ("array", "tensor") else of(True)
    made = MultiSubjectDataset(data, true, of(3), cache_bytes=of(2**20), block_bytes=of(2**21))
    assert {k: made.settings()[k] for k in numbers} == numbers
    made.load_data(load_testing=true, subj_id=np.array(["sub-0"]), volume_groups=np.str_("input"))
    assert are_plain(made.settings()) and made.settings()["subj_id"] == ["sub-0"] and len(made.subjects()) == 1
    given = DatasetSettings(str(data), true, **{k: of(v) for k, v in numbers.items()}, streamline_groups=("a", "b"))
    assert pickle.dumps(given) == pickle.dumps(
        DatasetSettings(str(data), True, **numbers, streamline_groups=["a", "b"])
    )


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("lazy", "no"),
        ("lazy", np.array([1, 0])),
        ("cache_size", 2.5),
        ("cache_size", -1),
        ("cache_size", np.array([1, 2])),
        ("cache_bytes", "1 GB"),
        ("cache_bytes", math.nan),
        ("cache_bytes", -1),
        ("block_bytes", 0),
        ("block_bytes", None),
        ("path", 3),
        ("load_training", "no"),
        ("subj_id", 3),
        ("subj_id", [1, 2]),
        ("volume_groups", np.array([1.5])),
        ("streamline_groups", [None]),
    ],
)
def test_others_are_refused_by_a_dataset(tmp_path, name, wrong):
    data = make_file(tmp_path / "data", n_subjects=1, n=2, points=(5, 6))[0]
    with pytest.raises(ValueError, match=f"^{name} must be"):
        DatasetSettings(**{"path": str(data), name: wrong})
    with pytest.raises(ValueError, match=f"^{name} must be"):
        if name in ("subj_id", "volume_groups", "streamline_groups", "load_training"):
            MultiSubjectDataset(data).load_data(**{name: wrong})
        else:
            MultiSubjectDataset(**{"path": data, name: wrong})


def test_blocks_of_a_url():
    for wrong in (0, 2.5, "64 kB", math.inf):
        with pytest.raises(ValueError, match="^block_size must be"):
            MultiSubjectDataset("memory://no-such-file", block_size=wrong)
        with pytest.raises(ValueError, match="^folder_bytes must be"):
            MultiSubjectDataset("memory://no-such-file", folder_bytes=wrong)


def track(of, **options):
    volume = Volume(np.ones((12, 3, 3), np.float32), np.eye(4))
    numbers = dict(step_size=1, theta=45, min_length=3, max_length=9, seed=3, batch_size=5, num_threads=1) | options
    tracker = Tracker(Straight(), volume, volume, **{k: of(v) for k, v in numbers.items()})
    return tracker, tracker.track(npv=of(2), progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_a_tracker(kind):
    tracker, found = track(KINDS[kind])
    same, expected = track(lambda x: x)
    assert np.array_equal(found.streamlines.points, expected.streamlines.points) and len(found.streamlines)
    numbers = [{k: v for k, v in vars(t).items() if isinstance(v, PLAIN)} for t in (tracker, same)]
    assert numbers[0] == numbers[1] and len(numbers[0]) >= 7
    mask = Volume(np.eye(3)[:, :, None], np.eye(4))
    assert np.array_equal(dilate_mask(mask, KINDS[kind](1)).data, dilate_mask(mask, 1).data)


@pytest.mark.parametrize("name, wrong", [
    ("step_size", "1"), ("step_size", [1.0]), ("theta", "60"), ("theta", np.array([60, 30])), ("theta", math.nan),
    ("min_length", None), ("min_length", math.nan), ("max_length", math.inf), ("max_length", torch.tensor([1., 2.])),
    ("seed", 1.5), ("seed", "a"), ("batch_size", 2.5), ("batch_size", "10"), ("num_threads", 0), ("num_threads", 1.5)])
def test_others_are_refused_by_a_tracker(name, wrong):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        track(lambda x: x, **{name: wrong})


@pytest.mark.parametrize("wrong", [1.5, "2", np.array([1, 2])])
def test_seeds_and_masks(wrong):
    mask = Volume(np.ones((3, 3, 3)), np.eye(4))
    with pytest.raises(ValueError, match="^npv must be"):
        seeds_from_mask(mask, npv=wrong)
    with pytest.raises(ValueError, match="^seed must be"):
        seeds_from_mask(mask, 1, wrong)
    for voxels in (wrong, -1):
        with pytest.raises(ValueError, match="^voxels must be"):
            dilate_mask(mask, voxels)


@pytest.mark.parametrize("of", [Fraction, np.longdouble])
def test_fractions_and_long_doubles(tmp_path, of):
    trainer = fit(tmp_path, clip_grad=of(.5), weight_decay=of(.25), learning_rate=[of(.125)], max_epochs=of(1))
    kept = trainer.settings
    assert are_plain([kept.clip_grad, kept.weight_decay, kept.max_epochs, kept.learning_rate]) and kept.clip_grad == .5
    assert trainer.train_and_validate().epoch == 1
    assert are_plain(plain_numbers([of(1), np.array([1.5], np.longdouble), {of(2): Fraction(1, 2)}]))


@pytest.mark.parametrize("name, wrong, words", [
    ("prefetch", -1, "prefetch must be"), ("num_workers", -1, "num_workers must be"),
    ("policies", (print,), "policies must be a list of policies"), ("policies", print, "policies must be a list of"),
    ("policies", Patience(3), "policies must be a list of"), ("policies", [Patience], "policies must be a list of"),
    ("clip_grad", Decimal("0.5"), "clip_grad must be"), ("weight_decay", np.clongdouble(1j), "weight_decay must be")])
def test_these_are_refused_too(tmp_path, name, wrong, words):
    with pytest.raises(ValueError, match=words):
        fit(tmp_path, **{name: wrong})
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_streamline_in_a_batch_is_refused():
    with pytest.raises(ValueError, match="batch_size_training must be a whole number of streamlines, not 4.5"):
        SamplerSettings("streamlines", 4.5)
    with pytest.raises(ValueError, match="batch_size_validation must be a whole number of streamlines, not 0.5"):
        SamplerSettings("streamlines", 4, .5)
    assert SamplerSettings("streamlines", 4.5, batch_size_units="length_mm").batch_size_training == 4.5


def test_the_time_to_wait(tmp_path):
    trainer = fit(tmp_path)
    trainer.start(paused=True)
    for seconds in (np.float32(.0625), torch.tensor(.0625), Fraction(1, 16)):
        with pytest.raises(TimeoutError, match="still running after 0.0625 s"):
            trainer.wait(seconds)
    trainer.stop(wait=True)
