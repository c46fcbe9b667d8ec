"""Tracking with Learn2Track (45 features, LSTM 100-100) beside the model's steps alone: the same numbers of tips, step
for step, without reading the volume, moving, stopping and joining. What the ratio is above 1 is the tracker's own cost.
And distances between tractograms (1,000 to 1,000 streamlines, MDF of 12 points) beside DIPY's matrix of all of them."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from dipy.tracking.distances import bundles_distances_mdf

from benchmarks.pairs import Ratio, compare
from tractkit.core.rng import fold, normal, uniform
from tractkit.evaluation.scoring import nearest_mdf
from tractkit.models.learn2track import Learn2Track
from tractkit.spatial.resample import resample_nb_points
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume
from tractkit.tracking.tracker import Tracker, seeds_from_mask

SHAPE, FEATURES, SEEDS = (48, 48, 12), 45, 1000


class Onward(Learn2Track):
    """Computes all that Learn2Track computes, then goes straight on: untrained weights would go in circles."""

    def step(self, inputs, previous, state):
        direction, state = super().step(inputs, previous, state)
        flat = direction * torch.tensor([1.0, 1, 0])  # the grid is flat
        return torch.where((previous == 0).all(1, keepdim=True), flat, previous), state


class Counting(Onward):
    """Notes how many tips there were at each step."""

    sizes: list[int] = []

    def step(self, inputs, previous, state):
        self.sizes.append(len(inputs))
        return super().step(inputs, previous, state)


def lines(seed: int, n: int) -> Tractogram:
    ends = uniform(fold("lines", seed), np.arange(n * 6).reshape(n, 2, 3)) * (np.array(SHAPE) - 1)
    t = np.linspace(0, 1, 60, dtype=np.float32)[:, None]
    return Tractogram(Streamlines.from_list([a + (b - a) * t for a, b in ends]), np.diag([2, 2, 2, 1.0]), SHAPE)


def rows() -> Iterator[Ratio]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _rows()
    finally:
        torch.set_num_threads(threads)


def _rows() -> Iterator[Ratio]:
    affine = np.diag([2, 2, 2, 1.0])
    volume = Volume(normal(fold("volume"), np.arange(np.prod(SHAPE) * FEATURES).reshape(*SHAPE, FEATURES)), affine)
    mask = Volume(np.ones(SHAPE, bool), affine)
    seeds = seeds_from_mask(mask)[::27][:SEEDS]
    count = Counting(FEATURES)
    Tracker(count, volume, mask, min_length=0).track(seeds, progress=False)
    model = Onward(FEATURES).eval()
    tracker = Tracker(model, volume, mask, min_length=0)

    @torch.no_grad()
    def steps_alone():
        inputs, previous, state = (
            torch.zeros(2 * SEEDS, FEATURES),
            torch.zeros(2 * SEEDS, 3),
            model.init_state(2 * SEEDS),
        )
        for n in Counting.sizes:
            model.step(inputs[:n], previous[:n], model.select_state(state, slice(n)))

    ratio = compare(
        f"Tracker, {SEEDS:,} seeds, {sum(Counting.sizes):,} steps of tips",
        lambda: tracker.track(seeds, progress=False),
        "model steps alone",
        steps_alone,
    )
    speed = 1e3 * SEEDS / ratio.ours_ms
    yield replace(ratio, note=f"{speed:,.0f} streamlines/s, CPU, 1 thread")

    a, b = lines(1, 1000), lines(2, 1000)

    def dipys():
        ra, rb = (list(resample_nb_points(t.rasmm(), 12)[0]) for t in (a, b))
        return bundles_distances_mdf(ra, rb).min(1)

    np.testing.assert_allclose(nearest_mdf(a, b), dipys(), rtol=1e-4)
    yield compare(
        "nearest_mdf, 1,000 to 1,000",
        lambda: nearest_mdf(a, b),
        "DIPY bundles_distances_mdf, then min",
        dipys,
        note="1 thread",
    )
