"""The text that users of deep_pipe know, with its imports renamed, its data from scikit-learn and 20 iterations an
epoch."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from tractkit.functional import Infinite, TorchModel, load_by_random_id, train_model
from tractkit.models import layers
from tractkit.runs.log import RunLog
from tractkit.training.policy import EarlyStopping, Exponential, Policy


class Digits:
    """Images of digits, 16 x 16, one channel first, and what they show."""

    def __init__(self):
        images, self.labels = load_digits(return_X_y=True)
        self.images = np.kron(images.reshape(-1, 1, 8, 8) / 16, np.ones((2, 2)))
        self.ids = [f"digit-{i}" for i in range(len(images))]

    def load_image(self, identifier):
        return self.images[int(identifier.split("-")[1])]

    def load_label(self, identifier):
        return self.labels[int(identifier.split("-")[1])]


@pytest.fixture(scope="module")
def dataset():
    return Digits()


@pytest.fixture(autouse=True)
def quiet_and_seeded():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress")
        yield
    torch.set_num_threads(threads)


def make_architecture():
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3),
        nn.ReLU(),
        nn.Conv2d(64, 128, kernel_size=3),

        layers.PyramidPooling(nn.functional.max_pool2d),  # global pooling
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def make_model():
    return TorchModel(make_architecture(), nn.Softmax(-1), nn.CrossEntropyLoss(), torch.optim.Adam)


def make_batches(dataset, batch_size=100):
    return Infinite(
        load_by_random_id(dataset.load_image, dataset.load_label, ids=dataset.ids),
        batch_size=batch_size, n_iters_per_epoch=20,
    )


def test_training_the_model(dataset):
    model = make_model()
    state = train_model(model, make_batches(dataset), n_epochs=3, lr=1e-3)
    assert state.epoch == 3 and state.global_step == 60
    predicted = model.do_inf_step(dataset.images[:300])
    assert predicted.shape == (300, 10) and np.allclose(predicted.sum(-1), 1, atol=1e-5)
    assert np.mean(predicted.argmax(-1) == dataset.labels[:300]) > 0.7


def test_logs_checkpoints_and_going_on(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = dict(log_path="~/my_new_model/logs", checkpoints_path="~/my_new_model/checkpoints")

    torch.manual_seed(0)
    undisturbed = make_model()
    train_model(undisturbed, make_batches(dataset, 10), n_epochs=2, lr=1e-3)

    class SomethingBad(Policy):
        def train_step_finished(self, epoch, iteration, loss):
            if (epoch, iteration) == (1, 7):
                raise KeyboardInterrupt

    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        train_model(make_model(), make_batches(dataset, 10), n_epochs=2, lr=1e-3, **paths, bad=SomethingBad())
    assert list((tmp_path / "my_new_model/checkpoints").glob("*.ckpt"))

    model = make_model()  # other first weights
    state = train_model(model, make_batches(dataset, 10), n_epochs=2, lr=1e-3, **paths)
    assert state.global_step == 40
    for a, b in zip(model.model_core.parameters(), undisturbed.model_core.parameters(), strict=True):
        assert torch.equal(a, b)
    log = RunLog(tmp_path / "my_new_model/logs")
    assert log.batches()["step"].tolist() == list(range(1, 41))
    assert log.epochs()["epoch"].tolist() == [0, 1]


def test_early_stopping(dataset):
    class TrainLossStop(Policy):
        def epoch_finished(self, epoch: int, *, train_losses, metrics: dict = None):
            if np.mean(train_losses) < 1e6:  # in the text, 1e-5: which takes longer
                raise EarlyStopping

    state = train_model(make_model(), make_batches(dataset, 10), n_epochs=10, lr=1e-3, stop=TrainLossStop())
    assert state.epoch == 1


def test_policies_with_values(dataset, capsys):
    class WeightedModel(TorchModel):
        def do_train_step(self, *inputs, lr, weights):
            print("I received these weights:", weights)
            # do something with the weights ...
            # perform a train step ...
            loss = super().do_train_step(*inputs, lr=lr)
            return loss

    model = WeightedModel(make_architecture(), nn.Softmax(-1), nn.CrossEntropyLoss(), torch.optim.Adam)
    train_model(model, make_batches(dataset, 5), n_epochs=3, lr=1e-3, weights=Exponential(initial=10, multiplier=0.5))
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("I received")]
    assert printed == [f"I received these weights: {w}" for w in ["10.0"] * 20 + ["5.0"] * 20 + ["2.5"] * 20]


def test_validation(dataset, tmp_path):
    def validate():
        return {
            "acuracy": 0.95,
            "roc_auc": 0.91,
        }

    seen = []

    class Sees(Policy):
        def epoch_finished(self, epoch, *, train_losses=None, metrics=None):
            seen.append((epoch, len(train_losses), metrics["acuracy"], metrics["roc_auc"]))

    train_model(
        make_model(), make_batches(dataset, 5), n_epochs=2, lr=1e-3, validate=validate, log_path=tmp_path, sees=Sees()
    )
    assert seen == [(0, 20, 0.95, 0.91), (1, 20, 0.95, 0.91)]
    assert RunLog(tmp_path).epochs()["roc_auc"].tolist() == [0.91, 0.91]
