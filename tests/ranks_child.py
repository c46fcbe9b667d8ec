"""Trainings for one process and for several, the same ones: as a program, one rank of two that run them all in turn."""

import os
import sys
import time
from pathlib import Path

import torch
from draws_child import KINDS, WHERE, make_trainer
from helpers_training import Fit, Points, fit, toy_model
from torch import nn

from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.loader import BatchLoaderOneInput
from tractkit.data.sampler import BatchIDSampler
from tractkit.models.learn2track import Learn2Track
from tractkit.training.callbacks import OnNonFinite
from tractkit.training.policy import Policy
from tractkit.training.ranks import Ranks
from tractkit.training.torchrun import take_rank
from tractkit.training.trainer import TrainerOneInput


class FitSometimes(Fit):
    """One number of the 48 gives no loss, in whichever part of a batch it is; a few are not counted."""

    def compute_batch_loss(self, batch):
        x, y = batch
        if self.model.training and bool((x == 17 / 48 * 2 - 1).any()):
            return self.model(x).sum() * torch.nan, len(x)
        kept = x[:, 0] > -.6
        return nn.functional.mse_loss(self.model(x[kept]), y[kept]), int(kept.sum())


class FitLast(Fit):
    """Counts the last number of a batch only: one rank has nothing to count."""

    def compute_batch_loss(self, batch):
        x, y = batch
        kept = torch.zeros(len(x), dtype=torch.bool)
        kept[-1:] = self.ranks.rank == self.ranks.size - 1
        return nn.functional.mse_loss(self.model(x[kept]), y[kept]), int(kept.sum())


class FitOwn(Fit):
    """Has its own loops, which see what one rank sees."""

    def train_one_epoch(self, batches):
        for batch in batches:
            loss, _ = self.run_one_batch(batch)
            self.back_propagation(loss)

    def validate_one_epoch(self):
        losses = [self.run_one_batch(b)[0].item() for b in self.validation_batches()]
        self.epoch_metrics = {"twice": 2 * sum(losses) / len(losses)}
        return sum(losses) / len(losses)


class FitSlow(Fit):
    def compute_batch_loss(self, batch):
        time.sleep(0.005 + 0.02 * self.ranks.rank)
        return super().compute_batch_loss(batch)


class FitAgrees(Fit):
    """Fails at the first batch before which the ranks are not the same, to the last bit."""

    def compute_batch_loss(self, batch):
        weights = [p.detach().numpy().tobytes() for p in self.model.parameters()]
        rates = [group["lr"] for group in self.state.optimizer.param_groups]
        self.ranks.check_same((self.state.global_step, rates, self.settings.clip_grad, weights), "weights or settings")
        return super().compute_batch_loss(batch)


class ChangedByFirst(Policy):
    """As somebody at a panel changes it: only the first rank is told."""

    remembers = ()

    def training_started(self, trainer):
        self.trainer = trainer

    def train_step_finished(self, epoch, iteration, loss):
        if self.trainer.ranks.first and self.trainer.state.global_step == 4:
            self.trainer.change(learning_rate=.02, clip_grad=.5, max_epochs=2, reverse_ratio=0., batch_size_training=6)


def two_models():
    model = toy_model(0)
    model.unused = nn.Linear(2, 2)  # no gradient: weight decay must leave it alone
    nn.init.ones_(model.unused.weight)
    nn.init.ones_(model.unused.bias)
    model.forward = lambda x: nn.Sequential.forward(nn.Sequential(*list(model)[:4]), x)
    return model


def streamlines(root, name, size=8, **options):
    dataset = MultiSubjectDataset(root / "data.hdf5").load_data()
    model = Learn2Track(3, rnn_layer_sizes=(6, 5), step_size=.5, seed=5)
    sampler = BatchIDSampler(dataset, "streamlines", size, 8, rng=3)
    loader = BatchLoaderOneInput(
        dataset,
        model,
        "input",
        "streamlines",
        rng=4,
        split_ratio=0.3,
        reverse_ratio=0.5,
        noise_gaussian_size_forward=0.1,
    )
    options = (
        dict(
            optimizer="SGD",
            learning_rate=0.5,
            weight_decay=0,
            max_epochs=2,
            num_threads=1,
            device="cpu",
            progress=False,
        )
        | options
    )
    return TrainerOneInput(model, root, name, sampler, loader, **options)


def toy(root, name, kind=Fit, **options):
    return fit(
        root, name, kind=kind, **dict(model=toy_model(0), optimizer="SGD", learning_rate=0.1, weight_decay=0) | options
    )


CASES = {
    "unequal": lambda root, name: streamlines(root, name, clip_grad=.2),
    "alone": lambda root, name: streamlines(root, name, size=1, max_epochs=1, max_batches_per_epoch_training=6),
    "adam": lambda root, name: toy(root, name, optimizer="Adam", learning_rate="0.01 0.001", points=Points(n=5)),
    "accumulate": lambda root, name: toy(root, name, accumulate=4, max_epochs=2),
    "sometimes": lambda root, name: toy(root, name, FitSometimes, policies=[OnNonFinite(.5)], accumulate=2),
    "unused": lambda root, name: toy(root, name, model=two_models(), weight_decay=.1, max_epochs=2),
    "own": lambda root, name: toy(root, name, FitOwn),
    "iterations": lambda root, name: toy(root, name, iterations_per_epoch=9, max_epochs=2),
    "changed": lambda root, name: streamlines(root, name, max_epochs=3, policies=[ChangedByFirst()]),
    "patience": lambda root, name: toy(root, name, learning_rate=0, patience=2, max_epochs=9),
}
TOGETHER = {  # not the same alone: that all ranks do the same is what counts
    "last": lambda root, name: toy(root, name, FitLast),
    "limit": lambda root, name: toy(root, name, FitSlow, points=Points(n=2, n_valid=6), validation_time_limit=0.03),
    "buffers": lambda root, name: toy(
        root, name, model=nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), max_epochs=2
    ),
    "dropout": lambda root, name: toy(root, name, model=toy_model(0.5)),
}


def train_with_draws(root: Path, ranks: Ranks) -> None:
    """Everybody draws from global generators, in a run that is stopped and gone on with, and in one that is not."""
    for i, (name, stop) in enumerate([("draws", None), ("draws-parts", 8), ("draws-parts", None)]):
        torch.manual_seed(i + ranks.rank)
        trainer = make_trainer(root, name, dict.fromkeys(WHERE, KINDS), max_epochs=2)
        take_rank(trainer, ranks)
        trainer.listeners.append(
            lambda event, t, stop=stop: ranks.first and event == "batch" and t.state.global_step == stop
            and t.control.stop())
        trainer.train_and_validate()
        assert trainer.state.global_step == (stop or 12)


def main() -> None:
    ranks, root = Ranks.join(), Path(sys.argv[1])
    for name, make in (CASES | TOGETHER).items():
        torch.manual_seed(ranks.rank)  # a model that is not the same on every rank becomes so
        trainer = make(root, f"{name}-2")
        take_rank(trainer, ranks)
        trainer.train_and_validate()
        weights = {k: v.tolist() for k, v in trainer.model.state_dict().items()}
        ranks.check_same(weights, f"weights after {name!r}")
        ranks.check_same(trainer.state.validation, f"length of the validation of {name!r}")
    train_with_draws(root, ranks)
    ranks.leave()


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    main()
