"""Every direction getter, trained on the phantom with the same budget: `python -m benchmarks models --getters`.

Learn2Track (LSTM 100-100, dropout .1, one previous direction) reads spherical harmonics at steps of a voxel, 2 mm.
Each getter gets the same 600 batches of 64 streamlines of 32 subjects, split, turned and with noise on the previous
directions as in `tractkit demo`, with the same learning rates; what it is after the last batch is judged, on 4
subjects that were used for nothing else. Angle: the median, between its most likely direction and the true next one.
Valid: of the streamlines from 1,000 seeds in each white matter (`tractkit.evaluation.scoring`), where each step is the
most likely one, or is drawn. Distance: of the angles that a density predicts to those that occur (Kolmogorov;
`tractkit.evaluation.calibration`), as trained, and with one temperature fitted on 4 other subjects; the last column is
minus its mean log density per steradian, then. The loss of training is not shown: its unit is another for each getter.
Seconds are those of a processor, not of the clock. An interrupted run continues after the last getter that is done."""

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tractkit.core.files import atomic_path, cache_folder
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.loader import BatchLoaderOneInput
from tractkit.data.sampler import BatchIDSampler
from tractkit.demo.pipeline import groups_of, prepare_subjects
from tractkit.demo.results import Demo
from tractkit.demo.settings import DemoSettings
from tractkit.demo.steps import LONGEST, USUAL_THETA, seeds_and_mask
from tractkit.demo.trainer import INPUT, STREAMLINES, learning_rates
from tractkit.evaluation.calibration import (
    Answers,
    Calibration,
    calibrate,
    calibrate_previous_direction,
    collect_answers,
    plot_calibrations,
    tempered,
)
from tractkit.evaluation.scoring import score_tractogram
from tractkit.hdf5.create import create_hdf5
from tractkit.models.direction_getters import DIRECTION_GETTERS
from tractkit.models.learn2track import Learn2Track
from tractkit.tracking.tracker import Tracker
from tractkit.training.trainer import TrainerOneInput
from tractkit.viz.figure import save_figure

NAMES = tuple(f"sub-{k:02}" for k in range(1, 41))
SETTINGS = DemoSettings(NAMES[:32], NAMES[32:36], NAMES[36:], max_epochs=12, max_batches=50, batch_size=64,
                        layers=(100, 100), max_seeds=1000)
STRAIGHT = "straight on"  # the row of the baseline
EVERY = 8  # points of unseen subjects that are judged: each so many-th


@dataclass(frozen=True)
class Row:
    """What was found of a getter."""

    name: str
    seconds: float | None  # of training
    angle: float           # degrees, median
    valid: float | None    # share, most likely direction
    drawn: float | None    # share, drawn directions
    calibration: Calibration | None

    def to_json(self) -> str:
        c = self.calibration
        found = None if c is None else {**vars(c), "pit": c.pit.round(4).tolist()}
        return json.dumps(vars(self) | {"calibration": found})

    @classmethod
    def from_json(cls, text: str) -> "Row":
        values = json.loads(text)
        c = values.pop("calibration")
        return cls(**values, calibration=None if c is None else Calibration(**c | {"pit": np.array(c["pit"])}))

    def cells(self) -> list[str]:
        c = self.calibration
        share = ["" if x is None else f"{100 * x:.1f}" for x in (self.valid, self.drawn)]
        of_density = ["", "", "", ""] if c is None else [
            f"{c.distance_before:.3f}", f"{c.temperature:.2f}", f"{c.distance:.3f}", f"{c.loss:.2f}"]
        seconds = "" if self.seconds is None else f"{self.seconds:.0f}"
        return [self.name, seconds, f"{self.angle:.2f}", *share, *of_density]


HEADINGS = ["getter", "training, s of a core", "angle, degrees", "valid, %", "valid, drawn, %", "distance as trained",
            "temperature", "distance", "−log density"]


def prepared(epochs: int) -> Demo:
    """The data of all subjects, made once and kept in the cache folder; the training has so many epochs."""
    demo = Demo(cache_folder() / "benchmarks" / f"getters-1-{len(NAMES)}", replace(SETTINGS, max_epochs=epochs))
    demo.folder.mkdir(parents=True, exist_ok=True)
    prepare_subjects(demo, print, progress=False)
    if not (demo.folder / "data.hdf5").exists():
        create_hdf5(demo.folder / "subjects", demo.folder / "data.hdf5", groups_of(demo), demo.splits,
                    accept_wrong_space=True, progress=False)
    return demo


class Course:
    """The same training and the same examination for each getter."""

    def __init__(self, demo: Demo):
        self.demo, s = demo, demo.settings
        self.dataset = MultiSubjectDataset(demo.folder / "data.hdf5").load_data()
        self.volume = self.dataset.training_set[0].volumes[INPUT].volume
        self.sampler = BatchIDSampler(self.dataset, STREAMLINES, batch_size_training=s.batch_size,
                                      batch_size_validation=4 * s.batch_size, rng=s.seed, bucket=True)

    def loader(self, model: Learn2Track) -> BatchLoaderOneInput:
        return BatchLoaderOneInput(self.dataset, model, INPUT, STREAMLINES, rng=self.demo.settings.seed,
                                   split_ratio=0.7, reverse_ratio=0.5, noise_gaussian_size_forward=0.2)

    def train(self, key: str) -> tuple[Learn2Track, float]:
        """Train a model with a getter; return the seconds that it took."""
        s = self.demo.settings
        model = Learn2Track(self.volume.nb_features, rnn_layer_sizes=s.layers, dropout=0.1, seed=s.seed, dg_key=key,
                            step_size=round(float(self.volume.voxel_sizes.min()), 3))
        with tempfile.TemporaryDirectory() as folder:
            trainer = TrainerOneInput(
                model, folder, key, self.sampler, self.loader(model), learning_rate=learning_rates(s), weight_decay=0,
                max_epochs=s.max_epochs, max_batches_per_epoch_training=s.max_batches,
                max_batches_per_epoch_validation=1, clip_grad=1.0, rng=s.seed, num_threads=1, device="cpu",
                progress=False)
            began = time.process_time()
            trainer.train_and_validate()
            return model.eval(), time.process_time() - began

    def answers(self, model: Learn2Track, subset: str, every: int = EVERY) -> Answers:
        """What the model answers on the subjects of a subset."""
        return collect_answers(model, self.loader(model), self.sampler.plan(0, subset), every)

    def valid(self, model: Learn2Track, algo: str) -> float:
        """The share of streamlines that are valid, on the mean of the test subjects."""
        return float(np.mean([self._valid(model, algo, test) for test in self.demo.tests]))

    def _valid(self, model: Learn2Track, algo: str, test: Demo) -> float:
        work, name = test.subject()
        seeds, mask = seeds_and_mask(work, test.settings.seed, test.settings.max_seeds)
        tracker = Tracker(model, self.dataset.subject(name).volumes[INPUT].volume, mask, theta=USUAL_THETA,
                          min_length=test.settings.min_length, max_length=LONGEST, algo=algo)
        return score_tractogram(tracker.track(seeds, progress=False), test.truth()).share("valid")

    def row(self, key: str) -> Row:
        """Train one getter and examine it."""
        model, seconds = self.train(key)
        getter, unseen = model.direction_getter, self.answers(model, "testing")
        found = None
        if getter.unit_of_density:
            found = calibrate(getter, self.answers(model, "validation"), unseen)
            model.direction_getter = tempered(getter, found.temperature)
        drawn = self.valid(model, "prob") if found else None
        angle = median_angle(getter.direction(unseen.outputs), unseen)
        return Row(key, seconds, angle, self.valid(model, "det"), drawn, found)

    def straight(self) -> Row:
        """Going on in the previous direction, with one κ."""
        model = Learn2Track(self.volume.nb_features, step_size=round(float(self.volume.voxel_sizes.min()), 3))
        unseen = self.answers(model, "testing")
        found, kappa = calibrate_previous_direction(self.answers(model, "training"), unseen)
        return Row(f"{STRAIGHT}, κ = {kappa:.0f}", None, median_angle(unseen.previous, unseen), None, None, found)


def median_angle(directions: torch.Tensor, answers: Answers) -> float:
    """Degrees between directions and the true ones."""
    half = torch.linalg.vector_norm(directions.double() - answers.directions.double(), dim=1) / 2
    return float(torch.rad2deg(2 * torch.arcsin(half.clamp_max(1))).median())


def kept_row(course: Course, key: str) -> Row:
    """A getter's row, or that of a run that was interrupted."""
    file = course.demo.folder / f"rows-{course.demo.settings.max_epochs}" / f"{key}.json"
    if not file.exists():
        row = course.straight() if key == STRAIGHT else course.row(key)
        file.parent.mkdir(exist_ok=True)
        with atomic_path(file) as temporary:
            temporary.write_text(row.to_json(), encoding="utf-8")
        print("  " + " | ".join(row.cells()), flush=True)
    return Row.from_json(file.read_text(encoding="utf-8"))


def table(keys: Sequence[str] = (*DIRECTION_GETTERS, STRAIGHT), epochs: int = SETTINGS.max_epochs) -> str:
    """Train and examine each getter: a Markdown table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        course = Course(prepared(epochs))
        rows = [kept_row(course, key) for key in keys]
    finally:
        torch.set_num_threads(threads)
    save_figure(plot_calibrations({r.name: r.calibration for r in rows if r.calibration}),
                course.demo.folder / f"calibration-{epochs}.png")
    shutil.rmtree(course.demo.folder / f"rows-{epochs}")
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def long_table() -> str:
    """The densities after four times as many batches, 2,400: `python -m benchmarks models --getters-long`.

    All else is as in the table of all getters: how far a density can be believed takes longer to learn than where it
    points to."""
    return table([*(key for key, getter in DIRECTION_GETTERS.items() if getter.unit_of_density), STRAIGHT], 48)
