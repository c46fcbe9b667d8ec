"""Trainings of every body and every direction getter, which tests kill: one for each line of JSON on the standard
input, alone or as one rank of two."""

import os
import time
from pathlib import Path

from helpers_children import fork_for_each_line

from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.loader import BatchLoaderOneInput
from tractkit.data.sampler import BatchIDSampler
from tractkit.models.base import model_class
from tractkit.models.direction_getters import DIRECTION_GETTERS
from tractkit.training.ranks import Ranks
from tractkit.training.torchrun import take_rank
from tractkit.training.trainer import TrainerOneInput

RECURRENT = dict(rnn_layer_sizes=(8, 6), dropout=0.2)
TRANSFORMER = dict(nheads=2, n_layers_e=1, input_embedded_size=8, dropout_rate=0.2)
BODIES = {
    "lstm": ("learn2track", dict(RECURRENT, use_skip_connection=True)),
    "gru": ("learn2track", dict(RECURRENT, rnn_key="gru", use_layer_normalization=True, nb_previous_dirs=2)),
    "tts": ("tts", dict(TRANSFORMER, nb_previous_dirs=2, prev_dirs_embedding_key="nn_embedding",
                        prev_dirs_embedded_size=4)),
    "tto": ("tto", dict(TRANSFORMER, position_encoding="rotary")),
    "ttst": ("ttst", dict(TRANSFORMER, target_embedded_size=8, norm_first=True)),
}
GETTERS = tuple(DIRECTION_GETTERS)


class Slow(TrainerOneInput):
    """Takes its time, so that it can be killed in the midst."""

    def compute_batch_loss(self, batch):
        time.sleep(0.05)
        return super().compute_batch_loss(batch)


def make_trainer(root: str | Path, name: str, body: str, getter: str) -> Slow:
    """A training of 12 batches: dropout everywhere, splits, reversal, noise."""
    key, options = BODIES[body]
    dataset = MultiSubjectDataset(Path(root) / "data.hdf5").load_data()
    model = model_class(key)(
        3, dg_key=getter, dg_dropout=0.1, add_eos=GETTERS.index(getter) % 2 == 0, step_size=2.0, seed=5, **options)
    sampler = BatchIDSampler(dataset, "streamlines", 8, 8, rng=3)
    loader = BatchLoaderOneInput(dataset, model, "input", "streamlines", rng=4, split_ratio=0.3, reverse_ratio=0.5,
                                 noise_gaussian_size_forward=0.1, noise_gaussian_size_loss=0.05)
    return Slow(model, root, name, sampler, loader, max_epochs=3, max_batches_per_epoch_training=4, clip_grad=1.0,
                learning_rate=[0.01, 0.005], checkpoint_every_batches=2, num_threads=1, device="cpu", progress=False)


def child(job: dict) -> None:
    environment = job.pop("rank", None)
    if environment:
        os.environ |= environment | {"GLOO_SOCKET_IFNAME": "lo"}
        ranks, trainer = Ranks.join(), make_trainer(**job)
        take_rank(trainer, ranks)
        trainer.train_and_validate()
        return ranks.leave()
    trainer = make_trainer(**job)
    trainer.start()
    trainer.wait()


def warm_up(job: dict) -> None:
    import torch._dynamo  # noqa: F401 - torch loads it when the first optimizer is made

    make_trainer(job["root"], "not trained", job["body"], job["getter"])


if __name__ == "__main__":
    fork_for_each_line(child, warm_up)
    os._exit(0)
