"""What can be looked at, in which colors, and the live view's controls."""

import json
import os
from unittest.mock import patch

import numpy as np
import pytest
from fury import window
from helpers_scene import AFFINES, LIT, PLANES, SHAPE, SIDE, cube_around, in_world, wavy

from tractkit.core.files import DataError
from tractkit.dwi.sh import ShInfo, save_sh
from tractkit.spatial.regions import Box, Sphere, pass_through
from tractkit.spatial.space import apply_affine
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume
from tractkit.viz.colors import Legend, color_streamlines, paste_legends
from tractkit.viz.composition import Composition, representative_order
from tractkit.viz.drawables import (
    Contour,
    Glyphs,
    Labels,
    Lines,
    Peaks,
    Slices,
    glyph_radii,
    mask_outline,
    peak_sticks,
    things_to_draw,
    voxels_on_plane,
)
from tractkit.viz.fury_actors import LineActor, LineBlocks, _surface, contour_actor, glyphs_actor
from tractkit.viz.page import save_page
from tractkit.viz.planes import to_world_axes, world_box
from tractkit.viz.stills import snapshot
from tractkit.viz.theme import palette
from tractkit.viz.viewer import _clicked, describe_place, view


def lit_mask(affine: np.ndarray, reach: int = 1) -> Volume:
    """Zeros, and ones in a cube around the voxel LIT."""
    data = np.zeros(SHAPE, np.float32)
    data[tuple(slice(k - reach, k + reach + 1) for k in LIT)] = 1
    return Volume(data, affine)


def lobe(along: np.ndarray, order: int = 8) -> np.ndarray:
    """Coefficients of a lobe along a direction in voxel axes."""
    from dipy.core.sphere import unit_octahedron
    from dipy.reconst.shm import sf_to_sh

    sphere = unit_octahedron.subdivide(n=3)
    return sf_to_sh((sphere.vertices @ along) ** 8, sphere, sh_order_max=order, basis_type="descoteaux07", legacy=True)


def one_fodf(affine: np.ndarray, along=(0.6, 0.8, 0.0)) -> Volume:
    """An fODF in the voxel LIT only."""
    data = np.zeros((*SHAPE, 45), np.float32)
    data[tuple(LIT)] = lobe(np.array(along))
    return Volume(data, affine)


# --- what a thing is


def test_volumes_are_what_their_numbers_say(tmp_path):
    affine = AFFINES["RAS"]
    unit = np.zeros((*SHAPE, 6), np.float32)
    unit[3, 4, 5, :3] = [0, 0.6, 0.8]
    fodf, info = one_fodf(affine), ShInfo("fodf", 8)
    save_sh(fodf, tmp_path / "fodf.nii.gz", info)
    save_sh(fodf, tmp_path / "sh.nii.gz", ShInfo("signal", 8))
    asked = [
        lit_mask(affine),
        Volume(np.ones(SHAPE, np.float32), affine),
        Volume(np.zeros(SHAPE, np.float32), affine),
        Volume(unit, affine),
        Volume(unit * 2, affine),
        fodf,
        (fodf, info),
        Volume.load(tmp_path / "fodf.nii.gz"),
        Volume.load(tmp_path / "sh.nii.gz"),
        Volume(lit_mask(affine).data[..., None].astype(np.uint8), affine),
        Slices(lit_mask(affine)),
    ]
    kinds = [type(d) for d in things_to_draw(asked)]
    assert kinds == [Contour, Slices, Slices, Peaks, Slices, Slices, Glyphs, Glyphs, Slices, Contour, Slices]
    with pytest.raises(ValueError, match="descoteaux07 basis, not 'tournier07'"):
        things_to_draw((fodf, ShInfo("fodf", 8, basis="tournier07")))
    with pytest.raises(ValueError, match="7 coefficients are no glyph"):
        snapshot(Glyphs(Volume(np.ones((*SHAPE, 7), np.float32), affine)))


def test_a_subject_and_a_batch_say_what_there_is_to_see(tmp_path):
    from helpers_data import make_file

    from tractkit.data.dataset import MultiSubjectDataset
    from tractkit.data.loader import StreamlinesBatchLoader

    path, sources = make_file(tmp_path, n_subjects=2)
    dataset = MultiSubjectDataset(path, lazy=True)
    dataset.load_data()
    subject = dataset.training_set[0]
    drawn = things_to_draw(subject)
    assert sorted((type(d).__name__, d.name) for d in drawn) == [("Lines", "streamlines"), ("Slices", "input")]
    lines, = (d for d in drawn if isinstance(d, Lines))
    np.testing.assert_allclose(lines.tractogram.rasmm().points, sources["sub-0"].rasmm().points, atol=1e-3)
    assert len(things_to_draw([subject.volumes["input"], subject.streamlines["streamlines"]])) == 2
    assert len([d for d in things_to_draw(two_volumes()) if isinstance(d, Slices)]) == 1
    loader = StreamlinesBatchLoader(dataset, None, "streamlines")
    names = [s.name for s in dataset.training_set]
    batch = loader.load_batch_streamlines(
        [(name, np.arange(4) + k) for k, name in enumerate(names)], epoch=0, training=False
    )
    parts = things_to_draw(batch)
    assert [p.name for p in parts] == names
    for k, p in enumerate(parts):
        np.testing.assert_allclose(
            p.tractogram.rasmm().points, sources[names[k]][np.arange(4) + k].rasmm().points, atol=1e-3
        )


def two_volumes():
    class Shows:
        def __view__(self):
            return {"a": Volume(np.full(SHAPE, 3.0), np.eye(4)), "b": Volume(np.full(SHAPE, 4.0), np.eye(4))}

    return Shows()


# --- where it is


@pytest.mark.parametrize("name", AFFINES)
def test_contours_and_glyphs_are_where_the_affine_says(name):
    affine = AFFINES[name]
    there = apply_affine(affine, LIT[None].astype(float))[0]
    mask, fodf = lit_mask(affine), one_fodf(affine)
    surface = contour_actor(Contour(mask), "red").geometry
    points, faces = surface.positions.data, surface.indices.data
    np.testing.assert_allclose((points.min(0) + points.max(0)) / 2, there, atol=1e-3)
    a, b, c = (points[faces] - there).transpose(1, 0, 2)
    assert np.sum(np.cross(a, b) * c) > 0  # it looks outwards, flipped or not
    for axis in range(3):
        lines = mask_outline(Contour(mask), axis, there[axis])
        assert len(lines) == 1 and np.allclose(lines[0][:, axis], there[axis])
        np.testing.assert_allclose((lines[0].min(0) + lines[0].max(0)) / 2, there, atol=0.4)
        assert not mask_outline(Contour(mask), axis, there[axis] + 30)
        corners = glyphs_actor(Glyphs(fodf), axis, there[axis]).geometry.positions.data - there
        longest = corners[np.linalg.norm(corners, axis=1).argmax()]
        along = to_world_axes(np.array([0.6, 0.8, 0.0]), affine)
        assert abs(longest @ along) / np.linalg.norm(longest) > 0.98
        assert np.linalg.norm(longest) == pytest.approx(mask.voxel_sizes.min() / 2, rel=0.05)
        assert (voxels_on_plane(mask, axis, there[axis]) == LIT).all(1).any()


@pytest.mark.vulkan
@pytest.mark.parametrize("driver", ["FURY", "matplotlib"])
@pytest.mark.parametrize("kind", ["contour", "glyphs", "peaks"])
def test_what_lies_on_a_plane_is_seen_where_the_affine_says(kind, driver):
    for name in ("rotated 25 about z, LPS", "LAS anisotropic"):
        affine = AFFINES[name]
        peaks = np.zeros((*SHAPE, 3), np.float32)
        peaks[tuple(LIT)] = [0.6, 0.48, 0.64]
        thing = {
            "contour": Contour(lit_mask(affine)),
            "glyphs": Glyphs(one_fodf(affine)),
            "peaks": Peaks(Volume(peaks, affine)),
        }[kind]
        there = apply_affine(affine, LIT[None].astype(float))[0]
        box = cube_around(world_box(thing.volume))
        for plane, (across, up, normal) in PLANES.items():
            with patch("tractkit.viz.stills.vulkan_available", return_value=driver == "FURY"):
                rgb = (
                    snapshot(thing, view=plane, position=there[normal], frame=box, letters=False, size=(SIDE, SIDE))
                    .array[..., :3]
                    .astype(int)
                )
            bright = rgb.max(-1) > 70
            if driver == "matplotlib":  # it has letters, and a margin of its own
                bright[:30], bright[-70:], bright[:, :30], bright[:, -70:] = False, False, False, False
            seen = in_world(bright, box, plane)
            assert len(seen), (name, plane)
            middle = (seen.min(0) + seen.max(0)) / 2
            assert np.abs(middle - there[[across, up]]).max() < 1.5, (name, plane)


def test_the_surface_of_any_mask_is_closed():
    rng = np.random.default_rng(5)
    for _ in range(5):
        values = (rng.random((9, 8, 7)) > 0.6).astype(np.float32)
        points, faces = _surface(values, 0.5, rounds=0)
        edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
        assert (np.unique(edges, axis=0, return_counts=True)[1] % 2 == 0).all()
        a, b, c = points[faces].transpose(1, 0, 2)
        assert 0.3 < np.sum(np.cross(a, b) * c) / 6 / values.sum() < 1.2
    assert len(_surface(np.zeros((4, 4, 4), np.float32), 0.5)[1]) == 0
    assert len(_surface(np.ones((4, 4, 4), np.float32), 0.5)[1]) > 0


# --- streamlines: which, how, in which colors


def test_each_first_part_of_the_order_is_spread_over_all():
    for n in (0, 1, 2, 7, 1000):
        order = representative_order(n)
        assert sorted(order) == list(range(n))
    first = np.sort(representative_order(1000)[:64])
    assert first[0] < 32 and first[-1] > 968 and np.diff(first).max() <= 32


def test_the_first_streamlines_are_shown_by_moving_one_number():
    parts = [
        np.array([[0.0, 0, 0], [1, 0, 0]]),
        np.empty((0, 3)),
        np.array([[5.0, 5, 0]]),
        np.array([[0.0, 1, 0], [1, 1, 0], [2, 1, 0]]),
    ]
    s = Streamlines.from_list(parts)
    for tubes, per in ((None, 2), (0.3, 12)):
        actor = LineActor(s, np.ones((len(s.points), 3), np.float32), tubes)
        ranges = []
        for count in (4, 3, 1, 0):
            actor.show_first(count)
            buffer = actor.shape.geometry.indices if tubes else actor.shape.geometry.positions
            ranges.append((actor.shape.visible, buffer.draw_range[1]))
        assert ranges == [(True, 3 * per), (True, per), (True, per), (False, 1)]
    lone = LineActor(s[[1, 2]], np.ones((1, 3), np.float32), None)
    lone.show_first(2)
    assert lone.shape is None


def test_many_streamlines_are_several_objects():
    s = Streamlines.from_list([np.array([[0.0, k, 0], [1, k, 0], [2, k, 0]]) for k in range(10)])
    lines = LineBlocks(s, np.ones((30, 3), np.float32), None, most=9)
    assert [len(o.geometry.positions.data) for o in lines.objects] == [12, 12, 12, 4]
    lines.show_first(4)
    assert [(o.visible, o.geometry.positions.draw_range[1]) for o in lines.objects][:3] == [
        (True, 12),
        (True, 4),
        (False, 1),
    ]
    assert LineBlocks(s[[]], np.ones((0, 3), np.float32), None).objects == []
    assert len(LineBlocks(s, np.ones((30, 3), np.float32), None, most=1).objects) == 10  # a long one is alone


def test_tubes_are_round_and_not_wrung():
    t = np.linspace(0, 2 * np.pi, 60)
    s = Streamlines.from_list([np.stack([20 * np.cos(t), 20 * np.sin(t), 0 * t], 1), np.stack([t, 0 * t, 0 * t], 1)])
    points = LineActor(s, np.ones((len(s.points), 3), np.float32), 0.5).shape.geometry.positions.data.reshape(-1, 6, 3)
    np.testing.assert_allclose(np.linalg.norm(points - s.points[:, None], axis=2), 0.5, atol=1e-4)
    steps = np.linalg.norm(np.diff(points[:60], axis=0), axis=2)
    assert steps.max() < 1.1 * np.linalg.norm(np.diff(s.points[:60], axis=0), axis=1).max()


def grouped(n: int = 40) -> Tractogram:
    t = wavy(n)
    return Tractogram(
        t.streamlines,
        t.affine,
        t.dimensions,
        dps={"bundle": np.arange(n)[:, None] % 2, "score": np.linspace(0, 1, n)[:, None]},
        dpp={"height": np.arange(len(t.streamlines.points), dtype=float)[:, None]},
        groups={"left": np.arange(n // 2), "right": np.arange(n // 2 - 3, n - 4)},
    )


def test_colors_by_what_is_stored_or_given():
    t = grouped()
    ids, points = np.array([3, 30, 0]), len(t.streamlines.points)
    rasmm = t[ids].rasmm()

    def rgb(colors, **options):
        return color_streamlines(t, colors, **options).rgb(t, ids, rasmm)

    first = rasmm.offsets[:-1]
    np.testing.assert_allclose(rgb("groups")[first], palette(2)[[0, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(rgb("bundle")[first], palette(2)[[1, 0, 0]], atol=1e-6)
    own = np.random.default_rng(0).random((points, 3)).astype(np.float32)
    np.testing.assert_allclose(
        rgb(own), np.concatenate([own[t.streamlines.offsets[i] : t.streamlines.offsets[i + 1]] for i in ids])
    )
    by_height, by_array = rgb("height"), rgb(np.arange(points))
    np.testing.assert_allclose(by_height, by_array)
    loss = np.linspace(0, 1, len(t))
    loss[3] = np.nan
    with_nan = rgb(loss, limits=(0, 1))
    assert np.ptp(with_nan[first[0]]) < 0.1 and np.ptp(with_nan[first[1]]) > 0.2  # none: grey
    assert color_streamlines(t, "score", label="how good").legend.title == "how good"
    assert color_streamlines(t, "score", limits=(0, 2)).legend.limits == (0, 2)
    for wrong, message in (
        ("los", "neither a color nor one of direction, groups, bundle, score, height"),
        (np.zeros(7), "one color a streamline"),
    ):
        with pytest.raises(ValueError, match=message):
            color_streamlines(t, wrong)
    with pytest.raises(ValueError, match="no groups"):
        color_streamlines(wavy(3), "groups")


def test_parts_keep_their_share_and_legends_say_what_colors_mean():
    t = grouped()
    c = Composition(t, max_streamlines=20)
    assert [p.name for p in c.parts] == ["left", "right", "others"] and c.shown == 20 and c.total == 40
    assert sorted(np.concatenate([p.ids for p in c.parts])) == list(range(40))
    assert c.legends == []
    named = Composition({"a": t, "b": t, "m": lit_mask(AFFINES["RAS"])}, colors={"a": "red", "b": "score"})
    assert [(x.title, [n for n, _ in x.names]) for x in named.legends] == [("score", []), ("", ["a", "m"])]


@pytest.mark.vulkan
@pytest.mark.parametrize("driver", ["FURY", "matplotlib"])
def test_every_kind_together_makes_a_picture(driver):
    affine = AFFINES["LAS anisotropic"]
    background = Volume(np.random.default_rng(0).random(SHAPE).astype(np.float32), affine)
    things = {"lines": grouped(), "back": background, "mask": lit_mask(affine), "f": Glyphs(one_fodf(affine))}
    with patch("tractkit.viz.stills.vulkan_available", return_value=driver == "FURY"):
        for options in (
            dict(view="3d", colors="groups", tubes=0.4),
            dict(view="coronal", colors="score"),
            dict(view="axial", colors="height"),
        ):
            picture = snapshot(things, size=(240, 200), **options).array
            assert picture.shape == (200, 240, 4)
            assert (snapshot(things, size=(240, 200), letters=False, **options).array != picture).any()


def test_legends_leave_the_letter_of_the_left_side_free():
    names = tuple((f"bundle {k}", (1.0, 0.5, 0.0)) for k in range(9))
    for height in (160, 240, 480):
        pixels = np.zeros((height, 240, 3), np.uint8)
        paste_legends(pixels, [Legend("bundle", names), Legend(names=(("mask", (1.0, 1.0, 1.0)),))])
        rows = np.flatnonzero(pixels.any(axis=(1, 2)))
        assert 6 <= rows[0] and height / 4 < rows[-1] < height / 2 - 6, height


def test_coefficients_in_memory_are_glyphs_when_it_is_said(capsys):
    fodf, background = one_fodf(AFFINES["RAS"]), Volume(np.ones(SHAPE, np.float32), AFFINES["RAS"])
    told = Composition([fodf, background], odf=True)
    assert [g.volume for g in told.glyphs] == [fodf] and [s.volume for s in told.slices] == [background]
    with pytest.raises(ValueError, match="odf=True, but no volume has 6, 15, 28"):
        Composition(background, odf=True)
    with patch("tractkit.viz.viewer.draw_still", return_value=(None, None)):
        view(background)
        assert capsys.readouterr().out == ""
        view(fodf)
        assert "odf=True draws it as the glyphs of an fODF" in capsys.readouterr().out


@pytest.mark.vulkan
@pytest.mark.parametrize("kind", ["3d", "axial"])
def test_what_fills_or_spans_nothing_is_a_picture_and_a_path_one_sentence(kind):
    affine = np.diag([-2.0, 2, 2, 1])
    point = Tractogram(Streamlines.from_list([np.full((5, 3), 4.0)] * 3), affine, (9, 9, 9))
    for thing in (Volume(np.ones((9, 9, 9), bool), affine), Volume(np.ones((9, 9, 9), np.float32), affine), point):
        assert snapshot(thing, size=(120, 90), view=kind).array[..., :3].std() > 5
    with pytest.raises(TypeError, match=r"cannot draw a str.*read the file first: Volume.load\('t1.nii.gz'\)"):
        snapshot("t1.nii.gz", view=kind)


@pytest.mark.vulkan
def test_faint_peaks_and_glyphs_are_left_out():
    sticks = np.zeros((4, 4, 3, 3), np.float32)
    sticks[1, 1, 1], sticks[2, 2, 1] = (0.6, 0, 0), (0, 0.05, 0)
    ends, _ = peak_sticks(Peaks(Volume(sticks, np.eye(4))), 2, 1.0)
    assert len(ends) == 2 and ends[0, 1] == ends[1, 1] == 1


def test_peaks_and_glyphs_are_drawn_within_a_mask_only():
    shape, affine = (5, 4, 3), np.diag([2.0, 2, 2, 1])
    ones = np.zeros((*shape, 6), np.float32)
    ones[..., 0], ones[..., 4] = 1, 1  # two of length 1 in each voxel: none is weak
    inside = np.zeros(shape, np.uint8)
    inside[1:3, 2, 1] = 1
    mask = Volume(inside, affine)
    every, chosen = (peak_sticks(Peaks(Volume(ones, affine), mask=m), 2, 2.0)[0] for m in (None, mask))
    assert len(every) == 2 * 2 * 20 and len(chosen) == 2 * 2 * 2
    middles = chosen.reshape(-1, 2, 3).mean(1)
    assert {tuple(m) for m in middles.tolist()} == {(2.0, 4.0, 2.0), (4.0, 4.0, 2.0)}
    balls = Volume(np.concatenate([np.ones((*shape, 1)), np.zeros((*shape, 5))], -1).astype(np.float32), affine)
    voxels, up = np.argwhere(np.ones(shape)), np.array([[0.0, 0, 1]])
    radii = glyph_radii(Glyphs(balls, mask=mask), voxels, up)[:, 0]
    assert (radii > 0).tolist() == (inside.reshape(-1) > 0).tolist()
    with pytest.raises(DataError, match="shape"):
        Peaks(Volume(ones, affine), mask=Volume(np.ones((5, 4, 4), np.uint8), affine))


def test_peaks_glyphs_and_masks_leave_out_what_is_not_a_number(tmp_path):
    """MRtrix writes NaN where there is no peak: in a whole voxel, or in the second and third of one."""
    affine, rng = np.diag([2.0, 2, 2, 1]), np.random.default_rng(0)
    unit = rng.normal(size=(6, 6, 6, 6)).astype(np.float32).reshape(-1, 3)
    unit = (unit / np.linalg.norm(unit, axis=1, keepdims=True)).reshape(6, 6, 6, 6)
    coefficients = rng.normal(size=(6, 6, 6, 15)).astype(np.float32)
    coefficients[..., 0] += 3
    mask = (rng.random((6, 6, 6)) > 0.4).astype(np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        holed, empty = unit.copy(), unit.copy()
        holed[1, 2, 3], holed[4, 4, 4, 4] = bad, bad
        empty[1, 2, 3], empty[4, 4, 4, 3:] = 0, 0
        for data in (holed, empty):
            (drawn,) = things_to_draw(Volume(data, affine)) if np.isnan(bad) else [Peaks(Volume(data, affine))]
            assert isinstance(drawn, Peaks)
            np.testing.assert_array_equal(drawn.volume.data, empty)
        holed, empty = coefficients.copy(), coefficients.copy()
        holed[1, 2, 3, 0], holed[4, 4, 4, 7] = bad, bad
        empty[1, 2, 3], empty[4, 4, 4] = 0, 0
        voxels, up = np.argwhere(mask >= 0), np.array([[0.0, 0, 1]])
        radii = [glyph_radii(Glyphs(Volume(data, affine)), voxels, up) for data in (holed, empty)]
        np.testing.assert_array_equal(*radii)
        holed, empty = mask.copy(), mask.copy()
        holed[1:3, 2], empty[1:3, 2] = bad, float(bad == np.inf)
        (got, _), (expected, _) = (_surface(Contour(Volume(d, affine)).volume.data, 0.5, 0) for d in (holed, empty))
        assert len(got) == len(expected) and np.isfinite(got).all()
        save_page(Composition([Volume(unit, affine), Contour(Volume(holed, affine))]), tmp_path / "a.html")
        text = (tmp_path / "a.html").read_text()
        json.loads(text.split('id="scene">')[1].split("</script>")[0], parse_constant=pytest.fail)
        with pytest.raises(ValueError, match="is not finite; give mm"):
            Composition(Volume(mask, affine), position=bad)
        with pytest.raises(ValueError, match="is not finite; give mm"):
            Composition(Volume(mask, affine), position=(1.0, None, bad))
    with pytest.raises(ValueError, match="this volume has 4 in a voxel"):
        Peaks(Volume(np.ones((3, 3, 3, 4), np.float32), affine))


# --- the live view


@pytest.fixture
def live_view():
    """A view whose window is offscreen, as in a notebook."""
    import ipywidgets

    made = window.ShowManager.__init__

    def offscreen(self, *args, window_type="default", **options):
        made(self, *args, window_type="offscreen", **options)
        if window_type == "jupyter":
            self.window._output_context = ipywidgets.Output()
            self.window.set_title = lambda title: None
            self.window.handle_event = lambda event: self.window.set_pixel_ratio(event["pixel_ratio"])
            self.window.set_update_mode = lambda *args, **options: None

    views = []

    def make(*things, **options):
        with (
            patch.object(window.ShowManager, "__init__", offscreen),
            patch("tractkit.viz.viewer._in_notebook", return_value=True),
            patch("tractkit.viz.viewer.display"),
            patch(
                "tractkit.viz.viewer.put_together",
                lambda *rows: ipywidgets.VBox([w for w in rows if isinstance(w, ipywidgets.Widget)]),
            ),
        ):
            views.append(view(*things, **options))
        return views[-1]

    yield make
    for v in views:
        v.close()


@pytest.mark.vulkan
def test_controls_do_what_the_methods_do(live_view, tmp_path, monkeypatch):
    affine = AFFINES["LAS anisotropic"]
    background = Volume(np.random.default_rng(0).random(SHAPE).astype(np.float32), affine)
    v = live_view(
        {"lines": grouped(), "back": background, "mask": lit_mask(affine)},
        colors="groups",
        max_streamlines=30,
        size=(200, 160),
    )
    c, stage = v.controls, v._stage
    assert c["counted"].value == "30 of 40 streamlines" == f"{v.shown} of {v.total} streamlines"
    before = v.screenshot().array
    c["show lines: left"].value = False
    assert v.shown == 30 - stage.composition.parts[0].count(30) and c["counted"].value.startswith(f"{v.shown} of")
    assert (v.screenshot().array != before).mean() > 0.004
    c["show lines: left"].value = True
    np.testing.assert_array_equal(v.screenshot().array, before)
    c["count"].value = 40
    assert v.shown == 40
    c["count"].value = 30
    np.testing.assert_array_equal(v.screenshot().array, before)
    c["z"].value = 12.0
    assert stage.position[2] == pytest.approx(c["z"].value)
    moved = v.screenshot().array
    assert (moved != before).mean() > 0.01
    c["window"].value = (0.0, 0.3)
    assert (v.screenshot().array.astype(int) - moved).mean() > 0.2  # brighter
    c["look"].value = "axial"
    assert stage.camera.fov == 0 and (v.screenshot().array != moved).mean() > 0.05
    c["show mask"].value = False
    monkeypatch.chdir(tmp_path)
    c["screenshot"].click()
    c["screenshot"].click()
    assert sorted(os.listdir(tmp_path)) == ["view-1.png", "view-2.png"] and c["message"].value == "written: view-2.png"
    with pytest.raises(ValueError, match="nothing is named 'nobody'; there are lines: left, "):
        v.toggle("nobody")
    with pytest.raises(ValueError, match="none of axial"):
        v.look("oblique")


@pytest.mark.vulkan
def test_a_closed_view_gives_its_memory_back(live_view):
    import gc
    import weakref

    import psutil

    process, ends = psutil.Process(), np.random.default_rng(0).random((6_000, 60, 3), np.float32) * 40
    many = Tractogram(Streamlines(ends.reshape(-1, 3), np.arange(6_001) * 60), np.eye(4), (40, 40, 40))
    used = []
    for _ in range(6):
        v = live_view(many, size=(120, 90))
        v._drawn.window.draw()
        geometry = v._stage._lines[0][1].objects[0].geometry
        kept = [weakref.ref(each) for each in (v._stage, v._drawn.manager.renderer, geometry, geometry.positions)]
        del geometry
        v.close()
        assert [each() for each in kept] == [None] * 4
        gc.collect()
        used.append(process.memory_info().rss / 1e6)
    assert used[-1] - used[1] < 60, used  # MB of four views, each with 30 of buffers and as much of compiled shaders


@pytest.mark.vulkan
def test_a_closed_view_leaves_no_widget(live_view):
    from ipywidgets.widgets.widget import _instances

    from tractkit.viz.controls import control_rows, put_together

    back = Volume(np.random.default_rng(0).random(SHAPE).astype(np.float32), AFFINES["RAS"])
    before = set(_instances)
    v = live_view({"lines": grouped(), "back": back}, colors="score", size=(120, 90))
    v.canvas = put_together(v.canvas, *control_rows(v.controls))  # what the fixture leaves out
    assert len(set(_instances) - before) > 80
    v.close()
    assert [type(_instances[key]).__name__ for key in set(_instances) - before] == []


@pytest.mark.vulkan
def test_colormap_labels_and_planes(live_view):
    affine, there = AFFINES["LAS anisotropic"], apply_affine(AFFINES["LAS anisotropic"], LIT[None].astype(float))[0]
    back = Volume(np.random.default_rng(0).uniform(0.5, 1, SHAPE).astype(np.float32), affine)
    regions = np.zeros(SHAPE, np.int16)
    regions[tuple(slice(k - 6, k + 7) for k in LIT)] = 1007
    regions[:3] = 12
    labels = Labels(Volume(regions, affine), "atlas", {1007: "fusiform"})
    v = live_view(back, labels, size=(200, 160), letters=False, position=there)
    c = v.controls

    def seen():
        return v.screenshot().array[..., :3].astype(int)

    def nb_colored(pixels):
        return int((np.ptp(pixels, axis=-1) > 60).sum())

    three = seen()
    c["plane axial"].value = c["plane coronal"].value = False
    assert v._stage.planes == ["sagittal"] and (seen().max(-1) > 60).sum() < 0.8 * (three.max(-1) > 60).sum()
    v.reset()
    np.testing.assert_array_equal(seen(), three)
    v.look("axial")
    grey = seen()
    orange = np.asarray(palette(2)[1]) * 255  # of 1007, the larger number
    assert np.abs(grey[most_colored(grey)] - orange).max() < 80 and nb_colored(grey) > 300
    said = describe_place(v.composition, there)[-1]
    assert said == "atlas ({}, {}, {}): label 1007 (fusiform)".format(*LIT)
    c["show atlas"].value = False
    assert nb_colored(seen()) == 0
    c["colormap"].value = "viridis"
    assert nb_colored(seen()) > 2 * nb_colored(grey)
    v.reset()
    assert c["colormap"].value == "gray" == v._stage.colormap
    with pytest.raises(ValueError, match="none of gray, viridis"):
        v.set_colormap("jet")
    assert [type(d) for d in Composition([back, labels.volume], labels=True).labels[0]] == [Labels, np.ndarray]
    assert Composition([back, labels.volume]).labels == []
    with pytest.raises(ValueError, match="labels=True, but no volume"):
        Composition(back, labels=True)
    with patch("tractkit.viz.stills.vulkan_available", return_value=False):
        assert nb_colored(snapshot(back, labels, view="axial", size=(200, 160)).array[..., :3].astype(int)) > 300
        hot = snapshot(back, colormap="hot", view="axial", size=(200, 160)).array[..., :3]
        assert nb_colored(hot.astype(int)) > 300


def most_colored(pixels):
    """Where the most saturated pixel is."""
    return np.unravel_index(np.ptp(pixels, axis=-1).argmax(), pixels.shape[:2])


def test_streamlines_through_regions_are_those_of_dipy():
    from dipy.tracking.utils import target

    t = wavy(60)
    few = [line[::9] for line in t.streamlines]  # far apart: between their points, too
    t = Tractogram(Streamlines.from_list(few), t.affine, SHAPE)
    rasmm = t.rasmm()
    middle, rng = rasmm.points.mean(0), np.random.default_rng(3)
    for _ in range(5):
        center = middle + rng.uniform(-8, 8, 3)
        sphere, box = Sphere(center, 3.0), Box(center, (4.0, 6.0, 5.0))
        steps = [np.concatenate([a + (b - a) * s for a, b in zip(line[:-1], line[1:], strict=True)
                                 for s in [np.linspace(0, 1, 60)[:, None]]]) for line in rasmm]
        near = [np.linalg.norm(p - center, axis=1).min() < 3 for p in steps]
        within = [(np.abs(p - center) < np.array([2, 3, 2.5])).all(1).any() for p in steps]
        assert np.mean(pass_through(t, sphere) == near) > 0.98 and np.mean(pass_through(t, box) == within) > 0.98
    voxel = np.rint(apply_affine(np.linalg.inv(t.affine), center[None])[0]).astype(int)
    mask = Volume((np.abs(np.indices(SHAPE).T - voxel).max(-1) < 3).T, t.affine)
    found = [len(list(target([p], t.affine, mask.data.astype(bool)))) == 1 for p in steps]
    assert 0 < sum(found) < 60 and np.mean(pass_through(t, mask) == found) > 0.98


@pytest.mark.vulkan
def test_streamlines_are_chosen_by_regions(live_view):
    low, high = wavy(20), wavy(20, 6)
    t = Tractogram(Streamlines.from_list([*low.streamlines, *high.streamlines]), low.affine, SHAPE)
    mask = Volume(np.ones(SHAPE, np.float32), t.affine)
    v = live_view(t, Contour(mask), size=(200, 160), max_streamlines=10)
    assert v.shown == 10
    before, here = v.screenshot().array, t.rasmm()[5][10]
    every = pass_through(t, Sphere(here, 2.0))
    assert 0 < every.sum() < 40
    assert v.select(include=Sphere(here, 2.0)) == (every.sum(), 40) and v.shown == min(every.sum(), 10)
    assert v.select(exclude=[Sphere(here, 2.0)]) == (40 - every.sum(), 40)
    v.move(*(float(mm) for mm in here))
    v.controls["all"].click()
    v.controls["radius"].value = 3.5
    v.controls["through"].click()
    near = int(pass_through(t, Sphere(here, 3.5)).sum())
    assert v.controls["selected"].value == f"{near} of 40 streamlines pass" and v.included[0].radius == 3.5
    v.set_style(tubes=0.3)
    assert v.shown == min(near, 10) and all(part.tubes == 0.3 for part, _ in v._stage._lines)
    v.set_style()
    v.controls["past"].click()
    assert v.shown == 0
    v.controls["all"].click()
    v.reset()
    np.testing.assert_array_equal(v.screenshot().array, before)
    with pytest.raises(TypeError, match="give a Sphere, a Box, or a mask"):
        v.select(include=["left"])


@pytest.mark.vulkan
def test_the_count_below_a_view_follows_every_way_of_choosing(live_view):
    low, high = wavy(20), wavy(20, 6)
    t = Tractogram(Streamlines.from_list([np.zeros((0, 3)), np.ones((1, 3)), *low.streamlines, *high.streamlines]),
                   low.affine, SHAPE)
    v = live_view({"lines": t, "mask": Volume(np.ones(SHAPE, np.float32), t.affine)}, size=(120, 90))
    c, rasmm, here = v.controls, t.rasmm(), t.rasmm()[7][10]
    passing = int(pass_through(t, Sphere(here, 2.0)).sum())
    assert 0 < passing < 42

    def near(slab, shown=42):
        heights = [line[:, 2] for line in rasmm if len(line) > 1]
        hit = sum(h.min() <= here[2] + slab and h.max() >= here[2] - slab for h in heights)
        return f"{shown} of 42 streamlines, {hit} of them near the plane"

    def choose(act, *expected):
        act()
        assert (c["counted"].value, c["selected"].value) == expected

    choose(lambda: v.select(Sphere(here, 2.0)), f"{passing} of 42 streamlines", f"{passing} of 42 streamlines pass")
    choose(lambda: v.select(Sphere((900, 0, 0), 1.0)), "0 of 42 streamlines", "0 of 42 streamlines pass")
    choose(lambda: v.set_style(slab=1.0), "0 of 42 streamlines", "0 of 42 streamlines pass")
    choose(v.set_style, "0 of 42 streamlines", "0 of 42 streamlines pass")
    choose(v.select, "42 of 42 streamlines", "")
    choose(lambda: v.set_count(12), "12 of 42 streamlines", "")
    choose(lambda: v.set_count(42), "42 of 42 streamlines", "")
    choose(lambda: v.toggle("lines", False), "0 of 42 streamlines", "")
    choose(lambda: v.toggle("lines"), "42 of 42 streamlines", "")
    v.move(z=float(here[2]))
    choose(lambda: v.set_style(slab=0.5), near(0.5), "")
    choose(lambda: v.move(z=500.0), "42 of 42 streamlines, none of them near the plane", "")
    c["slab"].value = 2.0
    choose(lambda: v.move(z=float(here[2])), near(2.0), "")
    v.look("sagittal")
    assert c["counted"].value == "42 of 42 streamlines, 40 of them near the plane" != near(2.0)


@pytest.mark.vulkan
def test_reset_puts_all_back_that_a_person_or_a_method_has_changed(live_view):
    t, affine = grouped(), AFFINES["RAS"]
    back = Volume(np.random.default_rng(0).random(SHAPE).astype(np.float32), affine)
    v = live_view({"lines": Lines(t, tubes=0.3), "back": back, "thin": wavy(9)}, max_streamlines=30, size=(120, 90))
    first, said, here = v.screenshot().array, {k: c.value for k, c in v.controls.items() if hasattr(c, "value")}, \
        t.rasmm()[5][10]

    def by_methods():
        v.select(Sphere((900, 0, 0), 1.0))
        v.set_style(slab=2.0, opacity=0.3, thickness=3.0)
        v.set_count(3)
        v.toggle("thin", False)
        v.set_colormap("hot")
        v.look("axial")
        v.move(*map(float, here))

    def by_controls():
        for name, value in {"slab": 3.0, "opacity": 0.4, "style": "lines", "count": 4, "radius": 9.0, "z": 15.0,
                            "show thin": False, "plane axial": False, "window": (0.2, 0.4), "look": "coronal"}.items():
            assert v.controls[name].value != value
            v.controls[name].value = value
        _clicked(v, 60, 45)
        v.controls["past"].click()

    for change in (by_methods, by_controls):
        change()
        assert (v.screenshot().array != first).mean() > 0.02
        v.controls["reset"].click()
        assert said == {k: c.value for k, c in v.controls.items() if hasattr(c, "value")}
        assert v.included == v.excluded == [] and v.near is None and not v._stage.hidden
        np.testing.assert_array_equal(v.screenshot().array, first)


@pytest.mark.vulkan
def test_numbers_that_mean_nothing_and_calls_after_the_end_are_one_sentence(live_view):
    back = Volume(np.random.default_rng(0).random(SHAPE).astype(np.float32), AFFINES["RAS"])
    v, nan = live_view(grouped(), back, size=(120, 90)), float("nan")
    before = v.screenshot().array
    for name in ("tubes", "thickness", "opacity", "slab"):
        for wrong in (-1, nan, np.float32("inf"), "wide"):
            with pytest.raises(ValueError, match=f"{name} must be a number .*not "):
                v.set_style(**{name: wrong})
    calls = [(v.set_count, (-1,)), (v.set_count, (1.5,)), (v.move, (nan,)), (v.move, (1, "2")),
             (v.set_window, (0, nan)),
             (lambda n: view(grouped(), tubes=n), (nan,)), (lambda n: view(Lines(grouped(), tubes=n)), (-1,)),
             (lambda n: view(grouped(), max_streamlines=n), (-3,))]
    calls += [(lambda size: view(grouped(), size=size), (size,))
              for size in ((0, 0), "big", (100_000,) * 2, (-5, 9), (nan, 9), 7)]
    for act, given in calls:
        with pytest.raises(ValueError, match="must be"):
            act(*given)
    np.testing.assert_array_equal(v.screenshot().array, before)
    v.set_style(tubes=np.float32(0.3), slab=np.int64(2))
    v.move(np.float64(3))
    v.close()
    for act in (v.reset, v.select, v.set_style, v.move, lambda: v.look("axial"), lambda: v.camera,
                lambda: v.set_count(3)):
        with pytest.raises(RuntimeError, match="this view was closed"):
            act()


@pytest.mark.vulkan
def test_linked_views_have_one_set_of_controls(live_view):
    from tractkit.viz.viewer import link_views

    t, back = wavy(30), Volume(np.random.default_rng(0).random(SHAPE).astype(np.float32), AFFINES["RAS"])
    a, b, c = live_view(t, size=(120, 90)), live_view(t, back, size=(120, 90)), live_view(t, back, size=(120, 90))
    linked = link_views(a, b, c)
    shared = linked.controls
    for v in (a, b, c):
        own = [child for row in v.canvas.children for child in getattr(row, "children", ())]
        assert v.controls["count"] in own and not {id(w) for w in own} & {id(w) for w in shared.values()}
        assert "look" not in [name for name, w in v.controls.items() if w in own]
    shared["look"].value = "coronal"
    assert {v._stage.view for v in (a, b, c)} == {"coronal"}
    shared["z"].value = 12.0
    shared["window"].value = (0.2, 0.7)
    shared["opacity"].value = 0.5
    assert b._stage.position[2] == c._stage.position[2] == shared["z"].value and b._stage.window == c._stage.window
    assert {v._stage.style.opacity for v in (a, b, c)} == {0.5}
    c.controls["x"].value = 5.0  # as a click into the last does
    assert b._stage.position[0] == c._stage.position[0]
    shared["reset"].click()
    assert {v._stage.view for v in (a, b, c)} == {"3d"}


@pytest.mark.vulkan
def test_what_views_are_not_made_for_is_said_in_one_sentence(live_view, tmp_path):
    from tractkit.viz.viewer import link_views

    t = wavy(5)
    a, b = live_view(t, size=(60, 50)), live_view(t, size=(60, 50))
    for act, kind, words in [
        (lambda: view(t, camera=None), TypeError, r"view\(\) has no option 'camera': look\(\), or"),
        (lambda: view(t, collors="red"), TypeError, "view.. has no option 'collors': did you mean colors"),
        (lambda: setattr(a, "camera", None), TypeError, "a camera is what .camera of another view .* not None"),
        (lambda: setattr(a, "camera", {"azimuth": 3}), TypeError, "a camera is what .* not a dict"),
        (lambda: link_views(5), TypeError, r"link_views is given live views, as in link_views\(a, b\), not a int"),
        (lambda: link_views([a, b]), TypeError, "not a list"), (link_views, ValueError, "needs views to link"),
        *((lambda path=path: a.save(path), DataError, f"^{path}: cannot be written")
          for path in ("/proc/x.png", "/proc/x.html", "/dev/null/x.png")),
        (lambda: a.save("/proc/x"), DataError, "not as 'no ending'"),
        (lambda: a.screenshot("/proc/x.png"), DataError, "cannot be written"),
    ]:
        with pytest.raises(kind, match=words):
            act()
    a.camera = b.camera
    linked = link_views(a, b)
    still = linked.still.array
    linked.close()
    assert a.canvas is b.canvas is None and np.array_equal(linked.still.array, still)
    assert linked.box.comm is None and all(c.comm is None for c in linked.controls.values())
    linked.close()


@pytest.mark.vulkan
def test_lines_and_tubes_thickness_opacity_and_slab(live_view):
    low, high = wavy(20), wavy(20, 6)
    t = Tractogram(Streamlines.from_list([*low.streamlines, *high.streamlines]), low.affine, SHAPE)
    v = live_view(t, size=(200, 160), colors="white", letters=False)
    c, seen = v.controls, {}

    def light():
        return int((v.screenshot().array[..., :3].astype(int) - 24).clip(0).sum())  # above the background

    thin = v.screenshot().array
    for name, value in (("opacity", 0.2), ("slab", 0.5), ("thickness", 4.0), ("style", "tubes")):
        before = c[name].value
        c[name].value = value
        seen[name] = light()
        c[name].value = before
        np.testing.assert_array_equal(v.screenshot().array, thin)
    base = light()
    assert seen["opacity"] < 0.9 * base and seen["slab"] < 0.9 * base and seen["thickness"] > 1.2 * base
    assert abs(seen["style"] - base) > 0.05 * base


@pytest.mark.vulkan
def test_of_many_streamlines_the_first_picture_is_coarse_and_the_next_has_all(live_view):
    import asyncio

    def drawn(v):
        lines = [sum(o.geometry.positions.draw_range[1] for o in actor.objects if o.visible)
                 for actor in ([actor for _, actor in v._stage._lines][0], v._stage._coarse[0])]
        return v._drawn.manager.renderer.pixel_scale, v._drawn.window.quality, *(n > 0 for n in lines)

    async def opened(v):
        v._drawn.manager._draw_function()
        await asyncio.sleep(0.2)
        return drawn(v)

    with patch("tractkit.viz.live_canvas._MANY", 50):
        v, few = live_view(wavy(60), size=(120, 90)), live_view(wavy(40), size=(120, 90))
    assert v.shown == 60 and "60" in str(v)  # asking does not draw them
    assert drawn(v) == (1, 80, False, True) and not few._drawn._opening
    assert asyncio.run(opened(v)) == (2, 100, True, False)


def test_fewer_streamlines_while_the_camera_moves_and_linked_views_follow(live_view):
    import asyncio

    from tractkit.viz.viewer import link_views

    t = wavy(60)
    a, b = live_view(t, size=(120, 90)), live_view(t, size=(120, 90))
    for one, other in ((a, b), (b, a)):
        one._drawn.link([other._drawn])

    async def drag():
        a._drawn._on_pointer({"event_type": "pointer_move", "buttons": ()})
        assert not a._drawn.moving  # no button: nothing moves
        a._drawn.stage.camera.local.position = (1, 2, 3)
        a._drawn._on_pointer({"event_type": "pointer_move", "buttons": (1,)})
        a._drawn.manager._draw_function()
        seen = [drawn(each._stage) for each in (a, b)]
        a._drawn._on_pointer({"event_type": "pointer_up", "buttons": ()})
        await asyncio.sleep(0.2)
        return seen, [drawn(each._stage) for each in (a, b)]

    def drawn(stage):
        """Points that are drawn of the full and of the coarse streamlines."""
        return [sum(o.geometry.positions.draw_range[1] for actor in actors for o in actor.objects if o.visible)
                for actors in ([actor for _, actor in stage._lines], stage._coarse)]

    with patch("tractkit.viz.live_canvas._COARSE", 7):
        coarse, full = asyncio.run(drag())
    for (none, few), (all_of_them, no_more) in zip(coarse, full, strict=True):
        assert none == no_more == 0 and 0 < few < all_of_them / 4
    np.testing.assert_allclose(b.camera["position"], (1, 2, 3))
    linked = link_views(a, b)
    assert linked.box.children[0].children == (a.canvas, b.canvas) and linked.still.array.shape == (90, 240, 4)
    with pytest.raises(ValueError, match="only live views"):
        link_views(view(t, live=False, size=(60, 50)))
