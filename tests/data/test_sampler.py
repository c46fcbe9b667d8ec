"""sampler: every streamline once, exact lengths, a pure function of (seed, epoch)."""

import itertools
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tractkit.core.files import DataError
from tractkit.data.plan import BatchIds, Plan, cut_batches
from tractkit.data.sampler import BatchIDSampler


def toy(counts, seed=0, longest=120):
    """What a sampler looks at of a dataset."""
    rng = np.random.default_rng(seed)

    def group(n):
        length = rng.uniform(5, longest, n)
        bundle = (np.arange(n) % 4)[:, None].astype(np.float32)
        return SimpleNamespace(
            lengths_mm=length, nb_points=np.ceil(length * 2).astype(np.int64), dps={"bundle": bundle}, groups={}
        )

    subjects = [SimpleNamespace(name=f"s{i}", streamlines={"x": group(n)}) for i, n in enumerate(counts)]
    return SimpleNamespace(training_set=subjects, validation_set=subjects[:1], testing_set=subjects[1:2])


def weights(data, units):
    return {
        s.name: np.ones(len(g.nb_points))
        if units == "nb_streamlines"
        else getattr(g, {"length_mm": "lengths_mm"}.get(units, units))
        for s in data.training_set
        for g in [s.streamlines["x"]]
    }


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


@pytest.mark.filterwarnings("ignore:training")
@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=6), limit=st.integers(1, 400), epoch=st.integers(0, 3),
       units=st.sampled_from(["nb_streamlines", "length_mm", "nb_points"]),
       how=st.sampled_from([{}, {"bucket": True}, {"nb_streamlines_per_chunk": 7}, {"nb_subjects_per_batch": 1},
                            {"nb_subjects_per_batch": 2}, {"nb_subjects_per_batch": 3, "cycles": 4},
                            {"nb_subjects_per_batch": 2, "cycles": 3, "bucket": True}]))
def test_every_streamline_once(counts, limit, epoch, units, how):
    data = toy(counts)
    plan = BatchIDSampler(data, "x", limit, batch_size_units=units, **how).plan(epoch)
    check_plan(plan, data, units, limit)
    if "nb_subjects_per_batch" in how:
        assert all(len(batch) <= how["nb_subjects_per_batch"] for batch in plan)


@pytest.mark.filterwarnings("ignore:training")
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"bucket": True},
        {"nb_subjects_per_batch": 2, "cycles": 3},
        {"nb_streamlines_per_chunk": 20},
        {"nb_subjects_per_batch": 2, "cycles": 3, "bucket": True},
        {"balance": "bundle"},
        {"balance": "subject", "bucket": True},
    ],
)
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


@pytest.mark.filterwarnings("ignore:training")
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
        counts = [
            np.concatenate([points[name][ids] for name, ids in b])
            for b in BatchIDSampler(data, "x", 16, bucket=bucket).plan(0)
        ]
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
    for options, error in [
        ({"batch_size_units": "mm"}, ValueError),
        ({"batch_size_training": 0}, ValueError),
        ({"batch_size_training": "100"}, ValueError),
        ({"cycles": 2}, ValueError),
        ({"rng": None}, TypeError),
        ({"nb_subjects_per_batch": 2, "bucket": True}, ValueError),
        ({"nb_streamlines_per_chunk": 0}, ValueError),
    ]:
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


# ---- plans ---------------------------------------------------------------------------------------------------


FEW = {"nb_subjects_per_batch": 2, "cycles": 5}
MODES = [{}, {"bucket": True}, {"nb_streamlines_per_chunk": 20}, FEW, {**FEW, "bucket": True}, {"balance": "subject"},
         {"balance": "bundle", "bucket": True}]


@pytest.mark.filterwarnings("ignore:training")
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 40])
def test_shards_are_the_batch_cut_in_order(how, world_size):
    data = toy([80, 50, 60])
    plan = BatchIDSampler(data, "x", 700, batch_size_units="nb_points", **how).plan(2)
    shards = [plan.shard(rank, world_size) for rank in range(world_size)]
    points = weights(data, "nb_points")
    for i in range(len(plan)):
        parts = [shard[i] for shard in shards]
        flat = [(name, int(k)) for part in parts for name, ids in part for k in ids]
        assert flat == [(name, int(k)) for name, ids in plan[i] for k in ids]
        assert all(part.position == i and part.epoch == 2 and part.subset == "training" for part in parts)
        if plan[i].nb_streamlines >= world_size:
            assert all(part.nb_streamlines for part in parts)
        loads = np.array([sum(points[name][ids].sum() for name, ids in part) for part in parts])
        biggest = max(points[name][ids].max() for name, ids in plan[i])
        assert loads.max() <= loads.sum() / world_size + 2 * biggest
    assert {shard.fingerprint for shard in shards} == {plan.fingerprint}
    assert [b.nb_streamlines for b in shards[0]] == [shards[0][i].nb_streamlines for i in range(len(plan))]


def test_shards_of_equal_streamlines_are_equal():
    plan = BatchIDSampler(toy([100, 60]), "x", 32).plan(0)
    assert [[plan.shard(r, 4)[i].nb_streamlines for r in range(4)] for i in range(5)] == [[8] * 4] * 5
    three = [plan.shard(r, 3)[0].nb_streamlines for r in range(3)]
    assert sum(three) == 32 and max(three) - min(three) <= 1
    small = BatchIDSampler(toy([2]), "x", 32).plan(0)  # fewer streamlines than processes: some get nothing
    assert sorted(small.shard(r, 5)[0].nb_streamlines for r in range(5)) == [0, 0, 0, 1, 1]
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank"):
            plan.shard(rank, world)


@pytest.mark.filterwarnings("ignore:training")
@pytest.mark.parametrize("how", MODES)
def test_len_and_lookups_are_exact(how):
    plan = BatchIDSampler(toy([80, 5 if "subject" in how.values() else 0, 50, 60]), "x", 16, **how).plan(1)
    batches = list(plan)
    assert len(batches) == len(plan) and sum(b.nb_streamlines for b in batches) == len(plan.order)
    for i in (0, len(plan) - 1, -1):
        assert all(a == c and np.array_equal(b, d) for (a, b), (c, d) in zip(plan[i], batches[i], strict=True))
    with pytest.raises((ValueError, TypeError)):  # a batch is a view of the plan: nobody writes in it
        batches[0][0][1][0] = 3


def test_plan_by_hand():
    plan = Plan(["a", "b", "c"], np.array([0, 3, 3, 7]), np.array([6, 0, 2, 1, 5, 3, 4]), np.array([0, 3, 4, 7]))
    assert [[(name, ids.tolist()) for name, ids in batch] for batch in plan] == [
        [("a", [0, 2]), ("c", [3])], [("a", [1])], [("c", [0, 1, 2])]]
    assert len(Plan([], np.array([0]), np.zeros(0, int), np.array([0]))) == 0


# ---- balance -------------------------------------------------------------------------------------------------


def counted(plan, label_of):
    """How many of each label in each batch."""
    labels = [[label_of(name, int(k)) for name, ids in batch for k in ids] for batch in plan]
    every = sorted({x for row in labels for x in row}, key=str)
    return every, np.array([[row.count(x) for x in every] for row in labels])


def grouped(counts):
    """Data with bundles of unequal size: value 0 for six in ten, 1 for three, 2 for one; as dps and as groups."""
    data = toy(counts)
    for s in data.training_set:
        sft = s.streamlines["x"]
        n = len(sft.nb_points)
        value = np.select([np.arange(n) % 10 < 6, np.arange(n) % 10 < 9], [0, 1], 2)
        sft.dps = {"bundle": value[:, None].astype(np.float32), "size": np.arange(n, dtype=np.float32)}
        sft.groups = {name: np.flatnonzero(value == k) for k, name in enumerate(("big", "mid"))}
    return data


@pytest.mark.filterwarnings("ignore:training")
@pytest.mark.parametrize("balance, weights_, shares", [
    ("bundle", None, [1, 1, 1]), ("bundle", {0: 1, 1: 2, 2: 1}, [1, 2, 1]), ("bundle", {0: 0, 1: 1, 2: 1}, [0, 1, 1]),
    ("groups", None, [1, 1, 1]), ("groups", {"big": 3, "mid": 3, "(no group)": 1}, [3, 3, 1])])
def test_classes_come_in_the_proportions_asked_for(balance, weights_, shares):
    data = grouped([400, 300])
    plan = BatchIDSampler(data, "x", 70, balance=balance, balance_weights=weights_).plan(0)
    value = {s.name: s.streamlines["x"].dps["bundle"][:, 0] for s in data.training_set}
    every, found = counted(plan, lambda name, k: int(value[name][k]))
    p = np.array(shares)[np.array(every)] / sum(shares)
    assert (
        np.abs(np.cumsum(found, 0) - np.cumsum(found.sum(1))[:, None] * p).max() <= 3
    )  # in every stretch from the start
    assert np.abs(found[:-1] - 70 * p).max() <= 3  # and in every batch
    have = np.array([420, 210, 70])
    used = np.array(shares) > 0
    length = (have[used] / np.array(shares)[used]).min()
    kept = np.floor(length * np.array(shares)).astype(int)
    assert found.sum(0).tolist() == kept[kept > 0].tolist()
    assert (
        sum(plan.left_out.values()) == 700 - kept.sum() and len(plan.order) == len(np.unique(plan.order)) == kept.sum()
    )
    assert "left out of this epoch to keep the balance" in repr(plan)


@pytest.mark.filterwarnings("ignore:training")
def test_subjects_in_balance_and_other_epochs_draw_others():
    data = toy([300, 60, 100])
    sampler = BatchIDSampler(data, "x", 30, balance="subject")
    every, found = counted(sampler.plan(0), lambda name, k: name)
    assert every == ["s0", "s1", "s2"] and found.sum(0).tolist() == [60, 60, 60] and np.abs(found - 10).max() <= 2
    assert sampler.plan(0).left_out == {"s0": 240, "s2": 40}
    used = [{k for b in sampler.plan(e) for name, ids in b if name == "s0" for k in ids.tolist()} for e in range(12)]
    assert all(len(u) == 60 for u in used) and len(set.union(*used)) > 250  # 1 - .8**12 of 300 is 279
    all_of = {k for b in sampler.plan(0) for name, ids in b if name == "s1" for k in ids.tolist()}
    assert len(all_of) == 60


def test_a_balanced_subset_leaves_nothing_out_and_validation_holds_everything():
    data = grouped([40, 40])
    plan = BatchIDSampler(data, "x", 10, balance="subject").plan(0)
    check_plan(plan, data, "nb_streamlines", 10)
    assert plan.left_out == {} and plan.notes == []
    valid = BatchIDSampler(data, "x", 10, 10, balance="bundle").plan(3, "validation")
    assert len(valid.order) == 40 and valid.left_out == {}


def test_what_is_unusual_is_said_once():
    data = grouped([50, 20])
    data.training_set[0].streamlines["x"].lengths_mm[3] = 900.0
    sampler = BatchIDSampler(data, "x", 300, batch_size_units="length_mm")
    with pytest.warns(
        UserWarning, match="training: 1 streamline is larger than a batch should be, and makes one alone"
    ):
        plan = sampler.plan(0)
    assert "larger than a batch" in repr(plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.plan(1), sampler.plan(0)
    with pytest.warns(UserWarning, match=r"30 streamlines are left out of this epoch to keep the balance: 30 of s0"):
        BatchIDSampler(data, "x", balance="subject").plan(0)


def test_bad_balance():
    data = grouped([20, 20])
    for options, message in [
        ({"balance": "subject", "nb_subjects_per_batch": 2}, "goes with neither"),
        ({"balance": "subject", "nb_streamlines_per_chunk": 2}, "goes with neither"),
        ({"balance_weights": {0: 1}}, "needs balance"),
        ({"nb_subjects_per_batch": 2, "nb_streamlines_per_chunk": 3}, "one run already"),
        ({"nb_subjects_per_batch": 2, "bucket": True}, "give cycles"),
    ]:
        with pytest.raises(ValueError, match=message):
            BatchIDSampler(data, "x", **options)
    for balance, asked, message in [
        ("bundle", {0: 1}, "the classes are"),
        ("bundle", {0: 1, 1: 1, 2: 1, 3: 0}, "the classes are|has no"),
        ("bundle", {0: -1, 1: 1, 2: 1}, "at least 0"),
        ("bundle", {0: 0, 1: 0, 2: 0}, "above it"),
        ("subject", {"s0": 1}, "the classes are"),
    ]:
        with pytest.raises(ValueError, match=message):
            BatchIDSampler(data, "x", balance=balance, balance_weights=asked).plan(0)
    with pytest.raises(DataError, match="no data per streamline 'bundles' to balance by; there are bundle, size"):
        BatchIDSampler(data, "x", balance="bundles").plan(0)
    data.training_set[1].streamlines["x"].groups["mid"] = np.arange(3)
    with pytest.raises(DataError, match="streamline 0 is in the groups 'big' and 'mid'"):
        BatchIDSampler(data, "x", balance="groups").plan(0)
    with pytest.raises(DataError, match="has no streamlines and cannot be balanced"):
        BatchIDSampler(toy([5, 0]), "x", balance="subject").plan(0)


# ---- what goes wrong in dwi_ml -------------------------------------------------------------------------------


def test_dwi_ml_7_length_mm_announces_the_batches_there_are():
    """There, points are divided by mm: 54 batches announced, 40 exist; and the last one is never trained on."""
    data = toy([400, 300])
    for units in ("length_mm", "nb_points", "nb_streamlines"):
        sampler = BatchIDSampler(data, "x", 450, batch_size_units=units)
        seen = list(sampler)
        assert len(sampler) == len(seen) and sum(b.nb_streamlines for b in seen) == 700
        totals = check_plan(sampler.plan(0), data, units, 450)
        longest = max(w.max() for w in weights(data, units).values())
        assert totals[:-1].min() > 450 - longest, units  # full, in the unit asked for


def test_dwi_ml_8_subjects_change_without_cycles():
    """There, with cycles unset, the same subjects stay until they are used up."""
    plan = BatchIDSampler(toy([400] * 4), "x", 20, nb_subjects_per_batch=1).plan(0)
    first = [batch[0][0] for batch in plan][:20]
    assert len(set(first)) == 4 and max(len(list(run)) for _, run in itertools.groupby(first)) < 8


def test_dwi_ml_13_no_batch_is_an_error():
    """There, an error when the next streamline does not fit, with fewer streamlines than subjects in a batch, and with
    one streamline longer than its share."""
    data = toy([30, 30, 30])
    data.training_set[1].streamlines["x"].lengths_mm[5] = 1e4
    with pytest.warns(UserWarning, match="larger than a batch"):
        check_plan(
            BatchIDSampler(data, "x", 150, batch_size_units="length_mm", nb_streamlines_per_chunk=256).plan(0),
            data,
            "length_mm",
            150,
        )
    with pytest.warns(UserWarning, match="larger than a batch"):
        check_plan(
            BatchIDSampler(data, "x", 150, batch_size_units="length_mm", nb_subjects_per_batch=3).plan(0),
            data,
            "length_mm",
            150,
        )
    check_plan(BatchIDSampler(data, "x", 2, nb_subjects_per_batch=3).plan(0), data, "nb_streamlines", 2)


def test_few_subjects_and_buckets():
    data = toy([500, 300, 400])
    points = weights(data, "nb_points")

    def padded(**how):
        plan = BatchIDSampler(data, "x", 16, nb_subjects_per_batch=2, cycles=10, **how).plan(0)
        check_plan(plan, data, "nb_streamlines", 16)
        names = [frozenset(name for name, _ in b) for b in plan]
        assert all(len(n) <= 2 for n in names)
        assert all(len(frozenset.union(*names[k:k + 10])) <= 2 for k in range(0, 40, 10))  # and they stay
        counts = [np.concatenate([points[name][ids] for name, ids in b]) for b in plan]
        return sum(c.max() * len(c) for c in counts) / sum(c.sum() for c in counts)

    assert padded(bucket=True) < 1.2 < 1.4 < padded()
