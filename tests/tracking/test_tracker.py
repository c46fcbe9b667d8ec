"""Tracking against a plain reference that grows one half at a time, and what must hold for any model."""

import copy
import inspect
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tractkit.core.files import DataError
from tractkit.core.rng import fold, normal, uniform
from tractkit.models.transformers import TransformerSrcOnlyModel
from tractkit.spatial.volume import Volume
from tractkit.tracking.tracker import Tracker, check_seeds, dilate_mask, seeds_from_mask


class Follow:
    """Follows the volume's vector, onward from where it came."""

    nb_features, step_size = 3, 1.0

    def init_state(self, n, device):
        return torch.zeros(n, dtype=torch.int64)

    def select_state(self, state, ids):
        return state[ids]

    def step(self, inputs, previous, state):
        return torch.where((inputs * previous).sum(1, keepdim=True) < 0, -inputs, inputs), state + 1


class Recurrent(torch.nn.Module):
    """An LSTM with random weights around the volume's vector: matrix products, a state and a mode."""

    nb_features, step_size = 3, 1.0

    def __init__(self):
        super().__init__()
        self.cell, self.out, self.drop = torch.nn.LSTMCell(6, 8), torch.nn.Linear(8, 3), torch.nn.Dropout(0.5)
        for k, p in enumerate(self.parameters()):
            p.data = torch.from_numpy(normal(fold("weights", k), np.arange(p.numel()).reshape(p.shape))) * 0.4

    def init_state(self, n, device):
        return torch.zeros(n, 8, device=device), torch.zeros(n, 8, device=device)

    def select_state(self, state, ids):
        return state[0][ids], state[1][ids]

    def step(self, inputs, previous, state):
        state = self.cell(torch.cat([inputs, previous], 1), state)
        onward = torch.where((inputs * previous).sum(1, keepdim=True) < 0, -inputs, inputs)
        return onward + 0.3 * self.drop(torch.tanh(self.out(state[0]))), state


def smooth_field(seed, shape=(16, 14, 12)):
    """Random vectors, never zero, that change slowly."""
    from scipy.ndimage import gaussian_filter

    noise = normal(fold("field", seed), np.arange(3 * np.prod(shape)).reshape(*shape, 3))
    data = np.stack([gaussian_filter(noise[..., c], 2) for c in range(3)], -1)
    return (data / np.linalg.norm(data, axis=-1, keepdims=True)).astype(np.float32)


def box(shape=(16, 14, 12), affine=None):
    return Volume(np.ones(shape, bool), np.eye(4) if affine is None else affine)


def along_x(shape, affine=None):
    return Volume(np.broadcast_to(np.float32([1, 0, 0]), (*shape, 3)), np.eye(4) if affine is None else affine)


def reference(field, mask, seed, sizes, step, theta, max_length):
    """One streamline in float64, one point at a time, halves in turn; its points and why each half ended."""
    volume, inside = Volume(field, np.eye(4)), mask.data

    def direction(p, previous):
        v = volume.sample(p[None].astype(np.float32))[0].astype(float)
        v = -v if v @ previous < 0 else v
        n = np.linalg.norm(v)
        return v / n if n > 1e-12 else v * 0

    first = direction(np.array(seed, float), np.zeros(3))
    if not first.any():
        return None
    halves, ends = [[np.array(seed, float)], [np.array(seed, float)]], [None, None]
    came, most, kink = [first, -first], int(np.floor(max_length / step + 1e-6)), None
    while None in ends:
        for h in (0, 1):
            if ends[h]:
                continue
            v = direction(halves[h][-1], came[h])
            turned = v @ came[h] < np.cos(np.radians(theta))
            if len(halves[h]) == 1 and h == 0:
                kink = v
            if h == 1 and len(halves[1]) == 1 and len(halves[0]) > 1 and -kink @ v < np.cos(np.radians(theta)):
                turned = True
            p = halves[h][-1] + v * step / sizes
            voxel = np.floor(p + 0.5).astype(int)
            out = (voxel < 0).any() or (voxel >= inside.shape).any() or not inside[tuple(voxel)]
            if not v.any() or turned or out:
                ends[h] = "stopped" if not v.any() else "theta" if turned else "mask"
            elif len(halves[0]) + len(halves[1]) - 2 == most:
                ends[h] = "length"
            else:
                halves[h].append(p)
                came[h] = v
        if len(halves[0]) + len(halves[1]) - 2 == most:
            ends = [e or "length" for e in ends]
    return np.array(halves[1][:0:-1] + halves[0]), ends


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 1, 1), (2, 2, 2), (1, 1.5, 2.5)]),
    st.sampled_from([20.0, 60.0, 90.0]),
    st.floats(3, 30),
)
def test_equals_a_plain_reference(seed, sizes, theta, max_length):
    field, sizes = smooth_field(seed), np.array(sizes, float)
    mask = Volume(uniform(fold("mask", seed), np.arange(16 * 14 * 12).reshape(16, 14, 12)) < 0.97, np.diag([*sizes, 1]))
    seeds = seeds_from_mask(mask, seed=seed)[::211]
    tracker = Tracker(
        Follow(), Volume(field, mask.affine), mask, theta=theta, min_length=0, max_length=max_length, batch_size=5
    )
    t = tracker.track(seeds, save_seeds=True, progress=False)
    found = {tuple(s): line for s, line in zip(t.dps["seeds"], t.streamlines, strict=True)}
    ends = []
    for s in seeds:
        points, why = reference(field, mask, s, sizes, 1.0, theta, max_length)
        ends += why
        if len(points) < 2:
            assert tuple(s) not in found
        else:
            np.testing.assert_allclose(found[tuple(s)], points, atol=2e-3)
    names = {"mask": "left the mask", "theta": "turned more than theta", "length": "reached max_length",
             "stopped": "stopped by the model", "full": "reached max_len of the model"}
    assert tracker.report.ends == {long: ends.count(short) for short, long in names.items()}
    assert tracker.report.kept + tracker.report.too_short == len(seeds)


@pytest.mark.parametrize(
    "step, limit, expected", [(1, 20, 20), (1, 21, 21), (0.5, 20.2, 20), (0.3, 20, 19.8), (7, 20, 14)]
)
@pytest.mark.parametrize("x", [5, 60, 117])
def test_max_length_holds_for_both_halves_together(step, limit, expected, x):
    shape = (120, 3, 3)
    t = Tracker(Follow(), along_x(shape), box(shape), step_size=step, min_length=0, max_length=limit).track(
        [[x, 1, 1]], progress=False
    )
    np.testing.assert_allclose(t.lengths_mm, [expected], rtol=1e-4)


@pytest.mark.parametrize("limit, points", [(200, 15), (9, 10)])
def test_a_half_has_at_most_as_many_points_as_the_model_can_take(limit, points):
    model = TransformerSrcOnlyModel(3, max_len=8, nheads=1, n_layers_e=1, input_embedded_size=4, nb_previous_dirs=1,
                                    prev_dirs_embedding_key="nn_embedding", prev_dirs_embedded_size=4)
    shape = (60, 60, 60)
    tracker = Tracker(model, along_x(shape), box(shape), theta=180, min_length=0, max_length=limit)
    t = tracker.track([[30, 30, 30], [31, 30, 29]], progress=False)
    assert np.diff(t.streamlines.offsets).tolist() == [points] * 2
    assert tracker.report.ends["reached max_len of the model"] == (4 if limit == 200 else 0)
    assert ("reached max_len of the model 4" in str(tracker.report)) == (limit == 200)


def test_so_many_seeds_grow_together_as_the_memory_of_the_model_allows():
    shape = (9, 9, 9)
    given = (along_x(shape), box(shape))
    assert Tracker(Follow(), *given, step_size=1, min_length=0).batch_size == 1000
    small, large = (TransformerSrcOnlyModel(3, n_layers_e=n, input_embedded_size=128) for n in (1, 6))
    assert Tracker(small, *given, min_length=0, max_length=100).batch_size == 1000
    assert Tracker(large, *given, min_length=0, max_length=200).batch_size == 2**30 // (2 * 6 * 2 * 128 * 4 * 200)
    assert Tracker(large, *given, min_length=0, max_length=200, batch_size=900).batch_size == 900


def test_lengths_and_steps_are_mm_on_any_voxels():
    turn = np.linalg.qr(normal(fold("turn"), np.arange(9).reshape(3, 3)).astype(float))[0]
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([3, 1, 2])
    affine[:3, 3] = [-20, 7, 3]
    shape = (20, 16, 12)
    t = Tracker(
        Follow(),
        Volume(smooth_field(3, shape), affine),
        box(shape, affine),
        step_size=0.7,
        min_length=5,
        max_length=12,
    ).track(seeds_from_mask(box(shape, affine))[::97], progress=False)
    world = t.rasmm()
    steps = np.concatenate([np.linalg.norm(np.diff(line, axis=0), axis=1) for line in world])
    np.testing.assert_allclose(steps, 0.7, rtol=2e-4)
    assert len(t) > 20 and t.lengths_mm.max() <= 12 and t.lengths_mm.min() >= 5 - 1e-3
    np.testing.assert_array_equal(t.affine, affine)


@pytest.mark.parametrize("voxels, kept", [(10, 0), (11, 1)])
def test_min_length_is_a_length_not_a_number_of_points(voxels, kept):
    shape = (voxels, 3, 3)
    tracker = Tracker(Follow(), along_x(shape), box(shape), min_length=10, max_length=50)
    assert len(tracker.track([[5, 1, 1]], progress=False)) == kept  # 9 mm have ten points and are too short
    assert tracker.report.too_short == 1 - kept


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("theta", [15, 40])
def test_no_two_segments_turn_more_than_theta(seed, theta):
    t = Tracker(Follow(), Volume(smooth_field(seed), np.eye(4)), box(), theta=theta, min_length=2).track(progress=False)
    for line in t.streamlines:
        d = np.diff(line.astype(float), axis=0)
        d /= np.linalg.norm(d, axis=1, keepdims=True)
        assert np.degrees(np.arccos(np.clip((d[1:] * d[:-1]).sum(1), -1, 1))).max(initial=0) <= theta + 0.05


def test_the_two_halves_do_not_form_a_kink_at_the_seed():
    class Kink(Follow):
        """Turns by 50 degrees at the first step of each half, to the same side of the world."""

        def step(self, inputs, previous, state):
            c, s = np.cos(np.radians(50)), np.sin(np.radians(50))
            first = torch.tensor([1.0, 0, 0]).expand_as(inputs)
            bent = torch.stack([previous[:, 0] * c, torch.full_like(previous[:, 0], s), previous[:, 2]], 1)
            out = torch.where(
                state[:, None] == 0, torch.where((previous == 0).all(1, keepdim=True), first, bent), previous
            )
            return out, state + 1

    shape = (60, 60, 3)
    tracker = Tracker(Kink(), along_x(shape), box(shape), theta=60, min_length=0)
    t = tracker.track([[30, 5, 1]], progress=False)
    assert tracker.report.ends["turned more than theta"] == 1 and tracker.report.ends["left the mask"] == 1
    np.testing.assert_allclose(t.streamlines[0][0], [30, 5, 1])  # only the forward half


def test_every_point_is_in_the_mask():
    mask = Volume(uniform(fold("holes"), np.arange(16 * 14 * 12).reshape(16, 14, 12)) < 0.9, np.eye(4))
    t = Tracker(Follow(), Volume(smooth_field(1), np.eye(4)), mask, min_length=0).track(progress=False)
    voxels = np.floor(t.streamlines.points + 0.5).astype(int)
    assert len(t) > 100 and mask.data[tuple(voxels.T)].all()


def lines_of(model, batch_size, seeds, **limits):
    tracker = Tracker(
        model, Volume(smooth_field(7), np.eye(4)), box(), batch_size=batch_size, min_length=3, max_length=40, **limits
    )
    return tracker.track(seeds, progress=False)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_changes_nothing(batch_size):
    seeds = seeds_from_mask(box())[::41]
    want, got = lines_of(Follow(), 1000, seeds), lines_of(Follow(), batch_size, seeds)
    np.testing.assert_array_equal(want.streamlines.points, got.streamlines.points)
    np.testing.assert_array_equal(want.streamlines.offsets, got.streamlines.offsets)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_changes_rounding_only_where_there_are_matrix_products(batch_size):
    seeds = seeds_from_mask(box())[::83]
    want, got = lines_of(Recurrent(), 1000, seeds), lines_of(Recurrent(), batch_size, seeds)
    np.testing.assert_array_equal(want.streamlines.offsets, got.streamlines.offsets)
    np.testing.assert_allclose(want.streamlines.points, got.streamlines.points, atol=1e-3)


def test_order_of_seeds_is_the_order_of_streamlines_and_nothing_else():
    seeds = seeds_from_mask(box())[::41]
    want, got = lines_of(Follow(), 16, seeds), lines_of(Follow(), 16, seeds[::-1])
    for a, b in zip(want.streamlines, list(got.streamlines)[::-1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_live_model_is_neither_switched_nor_read_later_and_no_generator_is_touched():
    model, seeds = Recurrent().train(), seeds_from_mask(box())[::83]
    before = copy.deepcopy(model.state_dict())
    tracker = Tracker(model, Volume(smooth_field(7), np.eye(4)), box(), min_length=3)
    torch.manual_seed(1)
    here = torch.get_rng_state()
    want = tracker.track(seeds, progress=False)
    assert torch.equal(here, torch.get_rng_state())
    assert model.training and model.drop.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    torch.manual_seed(2)
    np.testing.assert_array_equal(want.streamlines.points, tracker.track(seeds, progress=False).streamlines.points)


def test_other_devices_read_the_volume_as_a_tensor():
    tracker = Tracker(Follow(), Volume(smooth_field(7), np.eye(4)), box(), min_length=3)
    seeds = seeds_from_mask(box())[::83]
    want = tracker.track(seeds, progress=False)
    tracker._ground.data = torch.from_numpy(tracker.volume.data)
    got = tracker.track(seeds, progress=False)
    np.testing.assert_array_equal(want.streamlines.offsets, got.streamlines.offsets)
    np.testing.assert_allclose(want.streamlines.points, got.streamlines.points, atol=1e-3)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_to_tolerance():
    seeds = seeds_from_mask(box())[::83]
    want, got = lines_of(Recurrent(), 100, seeds), lines_of(Recurrent(), 100, seeds, device="cuda")
    np.testing.assert_array_equal(want.streamlines.offsets, got.streamlines.offsets)
    np.testing.assert_allclose(want.streamlines.points, got.streamlines.points, atol=1e-2)


@pytest.mark.parametrize("when", [3, 9, 25])
def test_an_interrupt_returns_what_is_finished(when):
    class Interrupted(Follow):
        calls = 0

        def step(self, inputs, previous, state):
            self.calls += 1
            if self.calls == when:
                raise KeyboardInterrupt
            return super().step(inputs, previous, state)

    seeds = seeds_from_mask(box())[::83]
    whole = lines_of(Follow(), 8, seeds, theta=20)
    known = {line.tobytes() for line in whole.streamlines}
    tracker = Tracker(
        Interrupted(), Volume(smooth_field(7), np.eye(4)), box(), batch_size=8, min_length=3, max_length=40, theta=20
    )
    with pytest.warns(UserWarning, match="interrupted"):
        some = tracker.track(seeds, progress=False)
    r = tracker.report
    assert all(line.tobytes() in known for line in some.streamlines) and len(some) < len(whole)
    assert (
        r.kept == len(some)
        and r.interrupted > 0
        and r.kept + r.too_short + r.no_direction + r.interrupted == len(seeds)
    )
    if when == 25:
        assert len(some)


def test_an_interrupt_in_a_first_direction_is_not_lost():
    class AtOnce(Follow):
        def step(self, inputs, previous, state):
            raise KeyboardInterrupt

    tracker = Tracker(AtOnce(), along_x((9, 9, 9)), box((9, 9, 9)))
    with pytest.warns(UserWarning, match="interrupted"):
        assert len(tracker.track(progress=False)) == 0
    assert tracker.report.interrupted == 9**3


def test_a_zero_direction_ends_and_nan_is_an_error():
    field = np.zeros((20, 3, 3, 3), np.float32)
    field[4:, ..., 0] = 1
    tracker = Tracker(Follow(), Volume(field, np.eye(4)), box((20, 3, 3)), min_length=0)
    t = tracker.track([[10, 1, 1], [1, 1, 1]], progress=False)
    assert len(t) == 1 and tracker.report.no_direction == 1 and tracker.report.ends["stopped by the model"] == 1
    field[:] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        Tracker(Follow(), Volume(field, np.eye(4)), box((20, 3, 3))).track([[10, 1, 1]], progress=False)


def test_seeds_are_kept_beside_their_streamlines():
    seeds = seeds_from_mask(box())[::83]
    t = Tracker(Follow(), Volume(smooth_field(7), np.eye(4)), box(), min_length=6, batch_size=10).track(
        seeds, save_seeds=True, progress=False
    )
    for line, seed in zip(t.streamlines, t.dps["seeds"], strict=True):
        assert np.abs(line - seed).sum(1).min() == 0
    assert "seeds" not in Tracker(Follow(), Volume(smooth_field(7), np.eye(4)), box()).track(seeds, progress=False).dps


@pytest.mark.parametrize("change, message", [
    (dict(theta=0), "degrees"), (dict(theta=200), "degrees"), (dict(step_size=-1), "mm"), (dict(step_size=300), "mm"),
    (dict(min_length=-1), "mm"), (dict(min_length=300), "mm"), (dict(batch_size=0), "batch_size"),
])
def test_wrong_limits(change, message):
    with pytest.raises(ValueError, match=message):
        Tracker(Follow(), along_x((9, 9, 9)), box((9, 9, 9)), **change)


def test_wrong_grids_and_features():
    with pytest.raises(ValueError, match="reads 3 features, the volume has 2"):
        Tracker(Follow(), Volume(np.ones((9, 9, 9, 2)), np.eye(4)), box((9, 9, 9)))
    with pytest.raises(DataError, match="shape"):
        Tracker(Follow(), along_x((9, 9, 9)), box((9, 9, 8)))
    with pytest.raises(DataError, match="affine"):
        Tracker(Follow(), along_x((9, 9, 9)), box((9, 9, 9), np.diag([1, 1, 2, 1])))
    with pytest.raises(DataError, match="empty"):
        Tracker(Follow(), along_x((9, 9, 9)), Volume(np.zeros((9, 9, 9), bool), np.eye(4)))
    no_step = Follow()
    no_step.step_size = None
    with pytest.raises(ValueError, match="step_size in mm"):
        Tracker(no_step, along_x((9, 9, 9)), box((9, 9, 9)))


class Held:
    """A volume of a subject holds its volume."""

    volume = along_x((9, 9, 9))


@pytest.mark.parametrize("given, message", [
    ("m.nii.gz", r"not a str: tk.Volume.load\(path\)"), (Path("m.nii.gz"), r"not a PosixPath: tk.Volume.load\(path\)"),
    (np.ones((9, 9, 9)), r"not an ndarray: tk.Volume\(data, affine\)"),
    (torch.ones(9, 9, 9), r"not a Tensor: tk.Volume\("),
    (nib.Nifti1Image(np.ones((9, 9, 9)), np.eye(4)), r"not a Nifti1Image: tk.Volume\(image"),
    (Held(), "not a Held: give .volume of it"), (None, "not None$"),
])
def test_what_is_no_volume_is_told_in_one_sentence(given, message):
    with pytest.raises(TypeError, match=f"^the mask must be a tractkit Volume, .*{message}"):
        Tracker(Follow(), along_x((9, 9, 9)), given)
    with pytest.raises(TypeError, match=f"^the volume must be a tractkit Volume, .*{message}"):
        Tracker(Follow(), given, box((9, 9, 9)))


def test_a_model_that_cannot_track_is_told():
    said = r"^Linear cannot track: it has no step\(inputs, previous, state\), no init_state"
    with pytest.raises(TypeError, match=said):
        Tracker(torch.nn.Linear(3, 3), along_x((9, 9, 9)), box((9, 9, 9)))


def test_help_explains_each_keyword():
    keywords = [p.name for p in inspect.signature(Tracker).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert len(keywords) > 9 and not [k for k in keywords if not re.search(rf"\b{k}[:,]", Tracker.__doc__)]


@pytest.mark.parametrize("seeds, message", [
    (np.zeros((0, 3)), "at least one"), (np.zeros((2, 2)), "shape"), ([[np.nan, 0, 0]], "NaN"),
    ([[4, 4, 4], [-0.6, 0, 0]], "1 of 2 seeds are outside the mask"), ([[8.5, 0, 0]], "outside"),
])
def test_wrong_seeds(seeds, message):
    with pytest.raises(ValueError, match=message):
        check_seeds(np.array(seeds), box((9, 9, 9)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 4), st.integers(1, 30))
def test_seeds_lie_in_their_voxels(seed, npv, keep):
    data = uniform(fold("seeds", seed), np.arange(5 * 900 * 4).reshape(5, 900, 4)) < keep / 100
    data[0, 899, 0] = True
    mask = Volume(data, np.eye(4))
    seeds = seeds_from_mask(mask, npv, seed)
    assert seeds.dtype == np.float32 and seeds.shape == (data.sum() * npv, 3)
    np.testing.assert_array_equal(np.floor(seeds + np.float32(0.5)), np.repeat(np.argwhere(data), npv, 0))
    check_seeds(seeds, mask)
    more = seeds_from_mask(box((5, 900, 4)), npv + 1, seed).reshape(5, 900, 4, npv + 1, 3)[data]
    np.testing.assert_array_equal(more[:, :npv].reshape(-1, 3), seeds)


def test_seeds_are_uniform_and_depend_on_the_seed():
    a, b = (seeds_from_mask(box((6, 6, 6)), 100, k) for k in (0, 1))
    assert (a != b).mean() > 0.99
    within = a - np.floor(a + 0.5)
    np.testing.assert_allclose(within.mean(0), 0, atol=0.01)
    np.testing.assert_allclose(within.var(0), 1 / 12, atol=0.002)
    with pytest.raises(ValueError, match="npv"):
        seeds_from_mask(box(), 0)


def test_dilation_is_one_step_from_face_to_face():
    data = np.zeros((7, 7, 7), bool)
    data[3, 3, 3] = True
    grown = dilate_mask(Volume(data, np.eye(4))).data
    assert grown.sum() == 7 and dilate_mask(Volume(data, np.eye(4)), 2).data.sum() == 25
    assert dilate_mask(Volume(data, np.eye(4)), 0).data.sum() == 1
