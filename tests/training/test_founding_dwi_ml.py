"""A script written for dwi_ml, and its methods of a trainer written out as overrides, run as they are printed.

Names have lost the prefix `DWIML`, signatures are completed, and what the text leaves out with `...` is filled in;
those
places are marked. Every other line, comments and line breaks included, is as it stands there."""

# ruff: noqa: B007
import numpy as np
import pytest
from helpers_data import make_file
from helpers_training import log_without_time, same_states

from tractkit import BatchIDSampler, BatchLoaderOneInput, MultiSubjectDataset, TrainerOneInput
from tractkit.models.base import load_model
from tractkit.models.learn2track import Learn2Track

input_group_name, streamline_group_name = "input", "streamlines"
args = 3  # features under a point


def myModel(nb_features):
    return Learn2Track(nb_features, rnn_layer_sizes=(8,), dropout=.1, step_size=2.0, seed=5)


class ThisEpoch:
    """Asked whether it is the best epoch, when it is asked."""

    def __init__(self, trainer):
        self.trainer = trainer

    def __bool__(self):
        return self.trainer.is_best


class Printed(TrainerOneInput):
    # fmt: off
    def train_and_validate(self, nb_epochs=2):              # completed
        for epoch in range(nb_epochs):
            # 1) set the learning rate
            this_is_the_best_epoch = ThisEpoch(self)        # filled in
            self.calls.append(("epoch", epoch))             # filled in

            # 2) Train
            self.train_one_epoch()

            # 3) Validate
            self.validate_one_epoch()

            # 4) Save the model if it's the best epoch
            if this_is_the_best_epoch:
                self.save_best_model()                      # filled in

            # 5) Save a checkpoint
            self.save_checkpoint()

    def train_one_epoch(self, batches):                     # completed
        for batch in batches:
            self.run_one_batch()

            # If training: back-prop includes:
            # - clip gradients
            # - update torch's optimizer: self.optimizer.step()
            # - reset torch's gradients: self.optimizer.zero_grad(set_to_none=True)
            self.back_propagation()

    def run_one_batch(self):                                # completed
        # 1) Send data to GPU if available
        streamlines = self.batch.to(self.device)            # filled in
        ids_per_subj = streamlines_f = streamlines          # filled in
        targets = self.model.targets(streamlines)           # filled in

        # 2) Formats the streamlines if required by the model
        # ex: SOS, EOS

        # 3) Interpolate the input (done in the BatchLoader)
        batch_inputs = self.batch_loader.load_batch_inputs(
            streamlines, ids_per_subj)

        # 4) Data augmentation if required
        streamlines = self.batch_loader.add_noise_streamlines_forward(
            streamlines, self.device)

        # 5) Call the model
        model_outputs = self.model(batch_inputs, streamlines_f)

        # 6) Compute the loss
        mean_loss, n = self.model.compute_loss(model_outputs, targets,
            average_results=True)

        return mean_loss, n
    # fmt: on

    calls: list = []


def script(hdf5_file, experiments_path, experiment_name, TrainerOneInput):
    # Loading the data, possibly with lazy option
    dataset = MultiSubjectDataset(hdf5_file)
    dataset.load_data()

    # Preparing your model
    model = myModel(args)

    # Preparing the BatchSampler
    batch_sampler = BatchIDSampler(
        dataset=dataset, streamline_group_name=streamline_group_name)

    # Preparing the BatchLoader.
    batch_loader = BatchLoaderOneInput(
        dataset=dataset, model=model,
        input_group_name=input_group_name,
        streamline_group_name=streamline_group_name)

    # Preparing your trainer
    trainer = TrainerOneInput(
        model=model, experiments_path=experiments_path,
        experiment_name=experiment_name, batch_sampler=batch_sampler,
        batch_loader=batch_loader)

    # Run the training!
    trainer.train_and_validate()
    return trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path, _ = make_file(tmp_path_factory.mktemp("founding") / "data", n_subjects=3, n=150, points=(8, 14))
    return path


def quiet(kind, **options):
    """A class with other defaults."""
    options = dict(progress=False, device="cpu", num_threads=1, max_epochs=2) | options

    class Quiet(kind):
        def __init__(self, **given):
            super().__init__(**(options | given))

    return Quiet


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    return script(data, tmp_path_factory.mktemp("plain"), "plain", quiet(TrainerOneInput))


def test_the_script_runs(plain):
    assert plain.state.epoch == 2 and np.isfinite(plain.state.history["valid_loss"]).all()
    assert type(load_model(plain.folder / "best_model")) is Learn2Track


def test_the_printed_methods_do_what_the_trainer_does(data, plain, tmp_path):
    Printed.calls.clear()
    printed = script(data, tmp_path, "printed", quiet(Printed))
    assert Printed.calls == [("epoch", 0), ("epoch", 1)]
    assert printed.state.global_step == plain.state.global_step > 2
    assert same_states(printed.state, plain.state) == []
    assert log_without_time(printed.log) == log_without_time(plain.log)
    best = [(t.folder / "best_model/model.safetensors").read_bytes() for t in (printed, plain)]
    assert best[0] == best[1]


def test_the_printed_methods_can_be_interrupted_and_gone_on_with(data, plain, tmp_path):
    """Their loop counts epochs from where it is called: the one that is left is asked for."""
    def stop(event, trainer):
        if event == "batch" and trainer.state.global_step == plain.state.global_step // 2 + 1:
            trainer.stop()

    class Stopping(quiet(Printed)):
        def __init__(self, **given):
            super().__init__(**given)
            self.listeners.append(stop)

    cut = script(data, tmp_path, "cut", Stopping)
    assert cut.status.phase == "stopped" and cut.state.global_step < plain.state.global_step
    again = Printed(
        cut.model, tmp_path, "cut", cut.batch_sampler, cut.batch_loader, progress=False, device="cpu", num_threads=1
    )
    again.train_and_validate(nb_epochs=2 - cut.state.epoch)
    assert same_states(again.state, plain.state) == []


def test_in_the_background_too(data, plain, tmp_path):
    trainer = quiet(Printed)(
        model=myModel(args),
        experiments_path=tmp_path,
        experiment_name="behind",
        batch_sampler=plain.batch_sampler,
        batch_loader=plain.batch_loader,
    )
    trainer.start()
    trainer.wait()
    assert same_states(trainer.state, plain.state) == []


def test_one_epoch_at_a_time_from_cells(data, plain, tmp_path):
    trainer = quiet(TrainerOneInput)(model=myModel(args), experiments_path=tmp_path, experiment_name="cells",
                                     batch_sampler=plain.batch_sampler, batch_loader=plain.batch_loader)
    for _ in range(2):
        trainer.train_one_epoch()
        assert trainer.state.batch > 0 and trainer.state.finished is None
        loss = trainer.validate_one_epoch()
        assert loss == trainer.state.epochs[-1]["valid_loss"]
        trainer.save_checkpoint()
    trainer.state.finished = plain.state.finished
    assert same_states(trainer.state, plain.state) == []
