"""The plan of an epoch of 1 M streamlines in every mode, beside NumPy's random permutation of 1 M numbers, the least
that
any shuffle costs; and 1,000 look-ups of a batch of 100 streamlines, beside slices of an array. One thread."""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np

from benchmarks.pairs import Ratio, compare
from tractkit.core.rng import fold, uniform
from tractkit.data.sampler import BatchIDSampler

TOTAL = 1_000_000
MODES = {
    "all subjects": {},
    "runs of 256": {"nb_streamlines_per_chunk": 256},
    "bucketed": {"bucket": True},
    "two subjects a batch": {"nb_subjects_per_batch": 2},
    "two for 8 batches, bucketed": {"nb_subjects_per_batch": 2, "cycles": 8, "bucket": True},
    "subjects in balance": {"balance": "subject"},
    "20 bundles in balance": {"balance": "bundle"},
    "length_mm": {"batch_size_training": 7000, "batch_size_units": "length_mm"},
    "length_mm, two subjects a batch": {
        "batch_size_training": 7000,
        "batch_size_units": "length_mm",
        "nb_subjects_per_batch": 2,
    },
}


def stand_in(n_subjects: int) -> SimpleNamespace:
    """What a sampler looks at of a dataset."""
    subjects = []
    for k in range(n_subjects):
        length = 20 + 100 * uniform(fold("length", k), np.arange(TOTAL // n_subjects), dtype=np.float64)
        bundle = (uniform(fold("bundle", k), np.arange(len(length)), dtype=np.float64) ** 2 * 20).astype(np.float32)[
            :, None
        ] // 1
        sft = SimpleNamespace(
            lengths_mm=length, nb_points=(2 * length).astype(np.int64), dps={"bundle": bundle}, groups={}
        )
        subjects.append(SimpleNamespace(name=f"sub-{k}", streamlines={"x": sft}))
    return SimpleNamespace(training_set=subjects, validation_set=[], testing_set=[])


def rows() -> Iterator[Ratio]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n_subjects in (1, 100):
            yield from _rows(n_subjects)


def _rows(n_subjects: int) -> Iterator[Ratio]:
    data, rng, epoch = stand_in(n_subjects), np.random.default_rng(0), iter(range(10**6))
    note = f"{n_subjects} subject{'s' * (n_subjects > 1)}"
    for name, settings in MODES.items():
        if n_subjects == 1 and "nb_subjects_per_batch" in settings:
            continue
        sampler = BatchIDSampler(data, "x", **settings)
        yield compare(
            f"plan, {name}",
            lambda sampler=sampler: sampler.plan(next(epoch)),
            "permutation of 1 M",
            lambda: rng.permutation(TOTAL),
            note=note,
        )
    plan = BatchIDSampler(data, "x").plan(0)
    shard = plan.shard(1, 4)
    where = (uniform(fold("where"), np.arange(1000)) * len(plan)).astype(int).tolist()
    slices = [plan.order[100 * i:100 * i + 100] for i in where]
    for name, batches in (("plan", plan), ("shard 1 of 4", shard)):
        yield compare(
            f"1,000 look-ups in a {name}",
            lambda batches=batches: [batches[i] for i in where],
            "copies of 1,000 slices",
            lambda: [s.copy() for s in slices],
            note=note,
        )
