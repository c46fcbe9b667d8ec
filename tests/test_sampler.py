"""sampler: every streamline once, exact lengths, a pure function of (seed, epoch)."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tractkit.files import DataError
from tractkit.sampler import BatchIds, BatchIDSampler, cut_batches


def toy(counts, seed=0, longest=120):
    """What a sampler looks at of a dataset."""
    rng = np.random.default_rng(seed)

    def group(n):
        length = rng.uniform(5, longest, n)
        return SimpleNamespace(lengths_mm=length, nb_points=np.ceil(length * 2).astype(np.int64))

    subjects = [SimpleNamespace(name=f"s{i}", streamlines={"x": group(n)}) for i, n in enumerate(counts)]
    return SimpleNamespace(training_set=subjects, validation_set=subjects[:1], testing_set=subjects[1:2])


def weights(data, units):
    return {s.name: np.ones(len(g.nb_points)) if units == "nb_streamlines" else getattr(g, {"length_mm": "lengths_mm"}.get(units, units))
            for s in data.training_set for g in [s.streamlines["x"]]}


def check_plan(plan, data, units, limit):
    """Exactly once, contiguous subjects, sizes within the limit; the size of each batch."""
    sizes, seen = weights(data, units), {s.name: [] for s in data.training_set}
    batches = list(plan)
    assert len(plan) == len(batches)
    totals = []
    for batch in batches:
        names = [name for name, _ in batch]
        assert len(set(names)) == len(names) and batch.nb_streamlines > 0
        for name, ids in batch:
            assert ids.dtype == np.int64
            seen[name].append(ids)
        totals.append(sum(sizes[name][ids].sum() for name, ids in batch))
        assert totals[-1] <= limit + 1e-6 or batch.nb_streamlines == 1
    for s in data.training_set:
        n = len(s.streamlines["x"].nb_points)
        assert np.array_equal(np.sort(np.concatenate([*seen[s.name], np.zeros(0, int)])), np.arange(n))
    return np.array(totals)


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=6), limit=st.integers(1, 400), epoch=st.integers(0, 3),
       units=st.sampled_from(["nb_streamlines", "length_mm", "nb_points"]),
       how=st.sampled_from([{}, {"bucket": True}, {"nb_streamlines_per_chunk": 7}, {"nb_subjects_per_batch": 1},
                            {"nb_subjects_per_batch": 2}, {"nb_subjects_per_batch": 3, "cycles": 4}]))
def test_every_streamline_once(counts, limit, epoch, units, how):
    data = toy(counts)
    plan = BatchIDSampler(data, "x", limit, batch_size_units=units, **how).plan(epoch)
    check_plan(plan, data, units, limit)
    if "nb_subjects_per_batch" in how:
        assert all(len(batch) <= how["nb_subjects_per_batch"] for batch in plan)


@pytest.mark.parametrize("how", [{}, {"bucket": True}, {"nb_subjects_per_batch": 2, "cycles": 3}, {"nb_streamlines_per_chunk": 20}])
def test_pure_function_of_seed_and_epoch(how):
    def plan(epoch, seed=5, subset="training", before=()):
        sampler = BatchIDSampler(toy([80, 50, 60]), "x", 16, 16, rng=seed, **how)
        for e in before:
            sampler.plan(e)
        return sampler.plan(epoch, subset).fingerprint

    assert plan(3) == plan(3, before=(0, 1, 2, 9))
    assert len({plan(3), plan(4), plan(3, seed=6)}) == 3
    assert plan(3, subset="validation") == plan(8, subset="validation") != plan(3)


def test_full_batches_and_random_order():
    data = toy([500, 300, 200])
    plan = BatchIDSampler(data, "x", 64).plan(0)
    assert check_plan(plan, data, "nb_streamlines", 64).tolist() == [64] * 15 + [40]
    share = np.mean([len(ids) / 64 for batch in list(plan)[:-1] for name, ids in batch if name == "s0"])
    assert 0.45 < share < 0.55  # in proportion to what each subject has
    whole = BatchIDSampler(data, "x", 1000).plan(0)
    assert len(whole) == 1
    first = np.concatenate([ids for name, ids in plan[0] if name == "s0"])
    assert not np.array_equal(first, np.arange(len(first)))


def test_length_mm_fills_batches():
    """Units are mm, not points: the number of batches is what the lengths say (dwi_ml divides points by mm)."""
    data = toy([400, 300])
    totals = check_plan(BatchIDSampler(data, "x", 3000, batch_size_units="length_mm").plan(0), data, "length_mm", 3000)
    total = sum(w.sum() for w in weights(data, "length_mm").values())
    assert totals[:-1].min() > 3000 - 120 and total / 3000 <= len(totals) <= total / (3000 - 120) + 1


@pytest.mark.parametrize("how", [{}, {"nb_subjects_per_batch": 2}, {"bucket": True}])
def test_a_streamline_longer_than_a_batch_gets_its_own(how):
    data = toy([20, 20])
    data.training_set[0].streamlines["x"].lengths_mm[3] = 900.0
    plan = BatchIDSampler(data, "x", 300, batch_size_units="length_mm", **how).plan(0)
    check_plan(plan, data, "length_mm", 300)
    alone = [batch for batch in plan for name, ids in batch if name == "s0" and 3 in ids]
    assert len(alone) == 1 and alone[0].nb_streamlines == 1 and plan.nb_oversized == 1


def test_batch_smaller_than_number_of_subjects():
    data = toy([5, 5, 5])
    check_plan(BatchIDSampler(data, "x", 1, nb_subjects_per_batch=3).plan(0), data, "nb_streamlines", 1)


def test_cycles_change_subjects():
    data = toy([200, 200, 200, 200])
    plan = BatchIDSampler(data, "x", 20, nb_subjects_per_batch=2, cycles=3).plan(1)
    pairs = [tuple(name for name, _ in batch) for batch in plan]
    assert all(len(set(pairs[i:i + 3])) == 1 for i in range(0, 15, 3))  # stay for three batches
    by_default = BatchIDSampler(data, "x", 20, nb_subjects_per_batch=1).plan(1)
    first = [batch[0][0] for batch in by_default][:20]
    assert len(set(first)) == 4  # and not one subject until it is used up
    many = BatchIDSampler(toy([3000] * 6), "x", 20, nb_subjects_per_batch=2).plan(0)
    assert len({tuple(name for name, _ in many[i]) for i in range(40)}) > 8  # of 15 pairs
    equal = [len(ids) for batch in list(plan)[:20] for _, ids in batch]
    assert set(equal) == {10}


def test_what_one_subject_cannot_fill_the_others_do():
    data = toy([200, 13])
    totals = check_plan(BatchIDSampler(data, "x", 20, nb_subjects_per_batch=2).plan(0), data, "nb_streamlines", 20)
    assert totals.tolist() == [20] * 10 + [13]


def test_bucket_cuts_padding():
    data = toy([500, 300])
    points = weights(data, "nb_points")

    def padded(bucket):
        counts = [np.concatenate([points[name][ids] for name, ids in b]) for b in BatchIDSampler(data, "x", 16, bucket=bucket).plan(0)]
        return sum(c.max() * len(c) for c in counts) / sum(c.sum() for c in counts)

    assert padded(True) < 1.1 < 1.4 < padded(False)


def test_batch_sampler_protocol():
    sampler = BatchIDSampler(toy([30, 30]), "x", 8, 15)
    assert len(sampler) == 8 and len(list(sampler)) == 8
    sampler.set_epoch(2)
    batch = next(iter(sampler))
    assert (batch.epoch, batch.position, batch.subset) == (2, 0, "training")
    back = pickle.loads(pickle.dumps(batch))
    assert isinstance(back, BatchIds) and back.epoch == 2 and np.array_equal(back[0][1], batch[0][1])
    sampler.set_subset("validation")
    assert len(sampler) == 2 and next(iter(sampler)).subset == "validation"
    assert sampler.plan(0)[-1].position == 7
    with pytest.raises(IndexError):
        sampler.plan(0)[8]


def test_a_changed_setting_is_seen():
    sampler = BatchIDSampler(toy([30, 30]), "x", 8)
    assert len(sampler.plan(0)) == 8
    sampler.batch_size_training = 30
    assert len(sampler.plan(0)) == 2


def test_bad_settings():
    data = toy([5])
    for options, error in [({"batch_size_units": "mm"}, ValueError), ({"batch_size_training": 0}, ValueError), ({"cycles": 2}, ValueError),
                           ({"rng": None}, TypeError), ({"nb_subjects_per_batch": 2, "bucket": True}, ValueError),
                           ({"nb_streamlines_per_chunk": 0}, ValueError)]:
        with pytest.raises(error):
            BatchIDSampler(data, "x", **options)
    with pytest.raises(DataError, match="no such streamlines group; it has x"):
        BatchIDSampler(data, "y").plan(0)
    with pytest.raises(ValueError, match="subset"):
        BatchIDSampler(data, "x").plan(0, "train")


def test_empty_subset():
    data = toy([5])
    assert len(BatchIDSampler(data, "x").plan(0, "testing")) == 0
    assert len(BatchIDSampler(data, "x", nb_subjects_per_batch=2).plan(0, "testing")) == 0


def test_cut_batches_by_hand():
    assert cut_batches(np.array([5, 5, 5, 1]), 10).tolist() == [0, 2, 4]
    assert cut_batches(np.array([11, 11]), 10).tolist() == [0, 1, 2]
