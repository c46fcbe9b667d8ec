"""Small trainings for tests: a toy that fits a cubic, and Learn2Track with everything random switched on."""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import tractkit
from tractkit.core.rng import fold, normal, permutation
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.loader import BatchLoaderOneInput
from tractkit.data.sampler import BatchIDSampler
from tractkit.models.layers import KeyedDropout, initialize_weights
from tractkit.models.learn2track import Learn2Track
from tractkit.training.trainer import Trainer, TrainerOneInput


class Points:
    """Sampler and loader in one: `n` batches of 8 numbers, shuffled anew in each epoch."""

    def __init__(self, n=6, n_valid=2, seed=1):
        self.n, self.n_valid, self.seed = n, n_valid, seed

    def plan(self, epoch, subset):
        n = self.n if subset == "training" else self.n_valid
        return permutation(fold(self.seed, epoch if subset == "training" else 0, subset), n * 8).reshape(n, 8)

    def load_batch_streamlines(self, ids, *, epoch, training):
        x = torch.from_numpy((ids[:, None] / 48 * 2 - 1).astype(np.float32))
        noise = normal(fold(2, epoch), ids) if training else np.zeros(len(ids))
        return x, x**3 + .1 * torch.from_numpy(noise.astype(np.float32))[:, None]


class Fit(Trainer):
    def compute_batch_loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y), len(x)


def toy_model(dropout=0.2):
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), KeyedDropout(dropout), nn.Linear(16, 1))
    initialize_weights(model, seed=0)
    return model


def fit(folder, name="run", kind=Fit, model=None, points=None, **options) -> Trainer:
    points = points or Points()
    options = dict(max_epochs=3, learning_rate=.01, progress=False, num_threads=1, device="cpu") | options
    return kind(model or toy_model(), folder, name, points, points, **options)


def streamline_trainer(
    data: Path, folder: Path, name="run", device_bytes=2**31, model=None, **options
) -> TrainerOneInput:
    """Learn2Track with dropout, or a model, with splits, reversal and noise."""
    dataset = MultiSubjectDataset(data).load_data()
    model = model or Learn2Track(3, rnn_layer_sizes=(10, 8), dropout=.2, dg_dropout=.1, step_size=2.0, seed=5)
    sampler = BatchIDSampler(dataset, "streamlines", 8, 8, rng=3)
    loader = BatchLoaderOneInput(
        dataset,
        model,
        "input",
        "streamlines",
        rng=4,
        split_ratio=0.3,
        reverse_ratio=0.5,
        noise_gaussian_size_forward=0.1,
        noise_gaussian_size_loss=0.05,
        device_bytes=device_bytes,
    )
    options = (
        dict(
            max_epochs=3,
            learning_rate=[0.01, 0.005],
            clip_grad=1.0,
            patience=50,
            num_threads=1,
            device="cpu",
            progress=False,
        )
        | options
    )
    return TrainerOneInput(model, folder, name, sampler, loader, **options)


def leaves(tree):
    """The tensors and plain values of a tree, in order, each with its path."""
    def walk(node, path):
        if isinstance(node, dict):
            for k, v in node.items():
                yield from walk(v, f"{path}/{k}")
        elif isinstance(node, (list, tuple)):
            for i, v in enumerate(node):
                yield from walk(v, f"{path}/{i}")
        else:
            yield path, node
    return list(walk(tree, ""))


OF_THE_CLOCK = ("/time", "/run_id", "/parent", "/log_path")  # and of the place


def same_states(a, b) -> list[str]:
    """Where two states differ, bit for bit, the clock left out."""
    left, right = (dict(leaves(s.state_dict())) for s in (a, b))
    if left.keys() != right.keys():
        return sorted(left.keys() ^ right.keys())
    def differs(x, y):
        if isinstance(x, torch.Tensor):
            return x.dtype != y.dtype or not torch.equal(x.cpu(), y.cpu())
        return x != y and not (x != x and y != y)
    return [k for k in left if not k.startswith(OF_THE_CLOCK) and differs(left[k], right[k])]


def log_without_time(log) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "time"} for r in log.records()]


class SlowPoints(Points):
    """Takes its time: for tests that do something meanwhile."""

    def load_batch_streamlines(self, ids, *, epoch, training):
        time.sleep(0.05)
        return super().load_batch_streamlines(ids, epoch=epoch, training=training)


class FitBreaks(Fit):
    def compute_batch_loss(self, batch):
        if self.state.global_step == 7:
            raise OSError("the disk is gone")
        return super().compute_batch_loss(batch)


class FitFrames(Fit):
    """Writes how many frames of the package lie between the call that trains (or its thread) and the loss."""

    def compute_batch_loss(self, batch):
        frame, ours, package = sys._getframe(1), 0, str(Path(tractkit.__file__).parent)
        while frame is not None:
            ours += frame.f_code.co_filename.startswith(package)
            frame = frame.f_back
        self.folder.with_name(f"{self.folder.name}.frames").write_text(str(ours))
        return super().compute_batch_loss(batch)


class FitOverrides(Fit):
    """Overrides every step of the loop, writes down that it was called, and calls its parent's."""

    def note(self, name):
        with open(self.folder.with_name(f"{self.folder.name}.called"), "a") as f:
            f.write(name + "\n")

    def compute_batch_loss(self, batch):
        self.note("compute_batch_loss")
        return super().compute_batch_loss(batch)

    def run_one_batch(self, batch):
        self.note("run_one_batch")
        return super().run_one_batch(batch)

    def back_propagation(self, loss):
        self.note("back_propagation")
        return super().back_propagation(loss)

    def fix_parameters(self):
        self.note("fix_parameters")
        super().fix_parameters()

    def train_one_epoch(self):
        self.note("train_one_epoch")
        return super().train_one_epoch()

    def validate_one_epoch(self):
        self.note("validate_one_epoch")
        return super().validate_one_epoch()

    def save_best_model(self):
        self.note("save_best_model")
        super().save_best_model()

    def train_and_validate(self, state=None):
        self.note("train_and_validate")
        return super().train_and_validate(state)


class Straight:
    """A model that goes straight on; along x from a seed."""

    nb_features, step_size = 1, 1.0

    def init_state(self, n, device):
        return None

    def select_state(self, state, ids):
        return None

    def step(self, inputs, previous, state):
        return torch.where((previous == 0).all(1, keepdim=True), torch.tensor([1.0, 0, 0]), previous), state
