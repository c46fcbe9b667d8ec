"""Pictures are asked for the truth by their pixels and artists."""

import io
import subprocess
import sys

import numpy as np
import pytest
from helpers_scene import AFFINES, PLANES, SHAPE, turned, voxel_and_line, wavy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tractkit.spatial.space import apply_affine
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume
from tractkit.viz.figure import Picture, encode_png, save_figure
from tractkit.viz.losses import _spread, plot_losses
from tractkit.viz.planes import content_box, value_window, world_box
from tractkit.viz.plots import plot_comparison, plot_slice, plot_streamlines
from tractkit.viz.theme import color_ball, direction_colors
from tractkit.viz.voxel_plot import plot_signal_and_fodf


def to_plane(picture, mask: np.ndarray) -> np.ndarray:
    """The mm coordinates, in the first axes, of the marked pixels."""
    rows, columns = np.nonzero(mask)
    display = np.column_stack([columns + 0.5, mask.shape[0] - rows - 0.5])
    return picture.axes[0].transData.inverted().transform(display)


def without_marks(mask: np.ndarray) -> np.ndarray:
    """Blank the rim, where letters, the bar, the count and the ball stand."""
    out = np.zeros_like(mask)
    out[30:-64, 30:-30] = mask[30:-64, 30:-30]
    return out


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("name", AFFINES)
def test_a_lit_voxel_and_the_streamline_that_starts_in_it_meet_where_the_affine_says(name, plane):
    lit, line, there, end = voxel_and_line(AFFINES[name])
    across, up, normal = PLANES[plane]
    box = world_box(lit) + [[-20] * 3, [20] * 3]
    picture = plot_streamlines(line, lit, plane, there[normal], colors="red", frame=box, width=500)
    rgb = picture.array()[..., :3].astype(int)
    red = to_plane(picture, without_marks(rgb[..., 0] - rgb[..., 1] > 90))
    blob = to_plane(picture, without_marks(rgb.min(-1) > 60))
    pixel = np.ptp(picture.axes[0].get_xlim()) / picture.axes[0].bbox.width
    assert np.abs(blob.mean(0) - there[[across, up]]).max() < max(1.2, 2 * pixel)
    for tip in (there, end):
        assert np.linalg.norm(red - tip[[across, up]], axis=1).min() < 2.5 * pixel


@pytest.mark.parametrize("name", AFFINES)
def test_left_is_left_and_anterior_is_up(name):
    affine = AFFINES[name]
    world = apply_affine(affine, np.indices(SHAPE).reshape(3, -1).T.astype(float)).reshape(*SHAPE, 3)
    middle = world_box(Volume(np.ones(SHAPE, np.float32), affine)).mean(0)
    for axis in range(3):
        low_half = (world[..., axis] < middle[axis]).astype(np.float32)  # the left, posterior, inferior half is bright
        for plane, axes in PLANES.items():
            if axis in axes[:2]:
                box = world_box(Volume(low_half, affine)) + [[-20] * 3, [20] * 3]
                picture = plot_slice(Volume(low_half, affine), plane, frame=box, width=400)
                bright = without_marks(picture.array()[..., 0] > 128)
                rows, columns = np.nonzero(bright)
                height, width = bright.shape
                across = axis == axes[0]
                place = columns.mean() / width if across else 1 - rows.mean() / height  # from the left, from below
                assert 0.15 < place < 0.45, (plane, "LPI"[axis])


@pytest.mark.parametrize("name", AFFINES)
def test_direction_colors_are_those_of_the_world(name):
    affine = AFFINES[name]
    steps = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]], float)
    t = Tractogram(Streamlines.from_list([steps, np.empty((0, 3)), steps[:1], steps[::-1]]), affine, SHAPE)
    world = apply_affine(affine, steps)
    expected = np.abs(np.array([world[1] - world[0], world[2] - world[0], world[3] - world[1], world[3] - world[2]]))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    colors = direction_colors(t)
    assert colors.dtype == np.float32
    np.testing.assert_allclose(colors, np.concatenate([expected, [[0.5] * 3], expected[::-1]]), atol=1e-5)


def ramp() -> Volume:
    return Volume((np.indices(SHAPE).sum(0) + 5.0).astype(np.float32), AFFINES["LAS anisotropic"])


def test_compared_panels_have_equal_frames_crops_and_slices():
    few = wavy(3)
    empty = few[[]]
    picture = plot_comparison({"reference": wavy(50), "ours": few, "none": empty}, ramp(), width=799)
    panels = picture.axes
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in panels}) == 1
    sizes = {(round(ax.bbox.width, 3), round(ax.bbox.height, 3)) for ax in panels}
    assert len(sizes) == 1
    (width, height), = sizes
    mm = np.ptp(panels[0].get_xlim()) / width
    assert mm == pytest.approx(np.ptp(panels[0].get_ylim()) / height, rel=1e-6)  # a mm is as long up as across
    images = [np.asarray(ax.images[0].get_array()) for ax in panels]
    assert all(np.array_equal(images[0], image) for image in images[1:])


def test_the_frame_does_not_depend_on_the_streamlines():
    a, b = plot_streamlines(wavy(3), ramp()), plot_streamlines(wavy(40, 4), ramp())
    assert a.axes[0].get_xlim() == b.axes[0].get_xlim()


@pytest.mark.parametrize("width", [300, 800])
def test_the_bar_is_20_mm(width):
    ax = plot_streamlines(wavy(3), ramp(), width=width).axes[0]
    bar, = [line for line in ax.lines if line.get_linewidth() == 2.5]
    ends = (bar.get_transform() + ax.transData.inverted()).transform(bar.get_xydata())
    assert np.ptp(ends[:, 0]) == pytest.approx(20, rel=1e-6)
    assert any(t.get_text() == "20 mm" for t in ax.texts)


def texts(picture) -> list[str]:
    return [t.get_text() for ax in picture.axes for t in ax.texts]


def test_a_part_says_that_it_is_one():
    assert "40 of 3,000 streamlines" in texts(plot_streamlines(wavy(3000), max_streamlines=40))
    assert "1 streamline" in texts(plot_streamlines(wavy(1)))
    assert "3,000 streamlines" in texts(plot_streamlines(wavy(3000), max_streamlines=None))


def test_letters_name_the_plane():
    for plane, letters in {"axial": "LRAP", "coronal": "LRSI", "sagittal": "PASI"}.items():
        assert set(letters) <= set(texts(plot_slice(ramp(), plane)))


def test_slab_keeps_what_is_near():
    t = wavy(9)
    z = t.rasmm().points[0, 2]
    count = {slab: len(plot_streamlines(t, ramp(), position=z + 5, slab=slab).axes[0].collections[0].get_segments())
             for slab in (9.0, 11.0)}
    assert count == {9.0: 0, 11.0: 9 * 29}


@pytest.mark.parametrize("plane, near", [("axial", [10, 10, 19]), ("coronal", [10, 1, 10]), ("sagittal", [29, 10, 10])])
def test_the_nearest_is_drawn_last(plane, near):
    near = np.array(near)
    far = np.where(near == 10, 10, 20 - near)
    for first, second in ((near, far), (far, near)):
        lines = Streamlines.from_list([np.stack([first, first + 0.1]), np.stack([second, second + 0.1])])
        picture = plot_streamlines(Tractogram(lines, np.eye(4), SHAPE), plane=plane, colors=np.eye(3)[:2])
        on_top = picture.axes[0].collections[0].get_colors()[-1][:3]
        np.testing.assert_array_equal(on_top, np.eye(3)[0 if first is near else 1])


def test_odd_tractograms_are_drawn():
    lone = Streamlines.from_list([np.empty((0, 3)), np.ones((1, 3)), np.ones((4, 3))])
    plot_streamlines(Tractogram(lone, np.eye(4), SHAPE), ramp()).array()
    plot_streamlines(wavy(2)[[]], ramp()).array()
    with pytest.raises(ValueError, match="nothing to frame"):
        plot_streamlines(wavy(2)[[]])
    with pytest.raises(ValueError, match="no tractogram"):
        plot_comparison({})
    with pytest.raises(ValueError, match="none of axial, coronal, sagittal"):
        plot_slice(ramp(), "oblique")
    with pytest.raises(ValueError, match=r"one color a streamline is \(3, 3\)"):
        plot_streamlines(wavy(3), colors=np.zeros((2, 3)))


def test_nan_and_constant_volumes_are_drawn():
    for value in (np.nan, 0.0, 7.0):
        plot_slice(Volume(np.full(SHAPE, value, np.float32), np.eye(4))).array()
    assert value_window(Volume(np.full(SHAPE, np.nan, np.float32), np.eye(4))) == (0.0, 1.0)


def test_a_mask_is_drawn_in_two_values():
    mask = (np.indices(SHAPE).sum(0) % 3 == 0).astype(np.uint8)
    image = np.asarray(plot_slice(Volume(mask, AFFINES["rotated 35 about x"])).axes[0].images[0].get_array())
    inside = image[image[..., 3] > 0][:, 0]
    assert len(np.unique(inside)) == 2


def test_content_box_holds_the_content_and_little_more():
    data = np.zeros((40, 30, 20), np.float32)
    data[10:14, 20:22, 3:9] = 5
    for affine in (turned(0, 2, (-2, 2, 3)), turned(90, 0, (-2, 2, 3))):
        corners = apply_affine(affine, np.array([[9.5, 19.5, 2.5], [13.5, 21.5, 8.5]]))
        np.testing.assert_allclose(content_box(Volume(data, affine)), np.sort(corners, axis=0), atol=1e-9)


# --- losses


def test_losses_from_dicts_pairs_and_records():
    y = [0.5, 0.3, 0.2, 0.25]
    records = [{"epoch": k, "train_loss": v + 0.1, "valid_loss": v} for k, v in enumerate(y)]
    records.append({"epoch": 4, "train_loss": 0.2, "valid_loss": None})
    for history in ({"valid": y}, {"valid": (np.arange(4), y)}, records):
        ax = plot_losses(history).axes[0]
        ring, = [line for line in ax.lines if line.get_marker() == "o"]
        assert ring.get_ydata() == 0.2
        assert ax.get_yscale() == "log"
    assert len([line for line in ax.lines if line.get_marker() != "o"]) == 2


@pytest.mark.parametrize("history", [{}, [], {"train": []}, {"valid": [np.nan, np.nan]}, {"valid": [0.1]},
                                     {"valid": [0.0, -1.0, np.nan, 0.3]}])
def test_odd_losses_are_drawn(history):
    plot_losses(history, {"a baseline with a very long name": 0.2} if history else None).array()


def test_zero_makes_the_axis_linear():
    assert plot_losses({"valid": [1.0, 0.0]}).axes[0].get_yscale() == "linear"


def test_no_word_of_the_losses_is_cut_at_the_left():
    picture = plot_losses({"valid": np.geomspace(.0004, 1, 30)}, xlabel="batch")
    picture.array()
    assert picture.axes[0].yaxis.get_tightbbox().x0 >= 0


@pytest.mark.parametrize("lowest", [0.0004, 0.15, 0.0])
def test_the_number_of_the_best_lies_on_no_curve(lowest):
    x = np.arange(1, 41)
    noisy = lowest + 0.3 * np.exp(-x / 9) * (1.3 + np.sin(x))
    figure = plot_losses({"training": noisy + 0.02, "validation": noisy}, xlabel="batch")
    figure.array()
    ax = figure.axes[0]
    box = ax.texts[0].get_window_extent()
    assert ax.texts[0].get_text().startswith("best") and box.y0 > ax.bbox.y0 and box.x1 < ax.bbox.x1 + 60
    for line in ax.lines[:2]:
        assert not line.get_path().transformed(line.get_transform()).intersects_bbox(box, filled=False)


def test_baselines_are_lines_with_their_names():
    ax = plot_losses({"valid": [0.4, 0.3]}, {"repeat": 0.35, "zero": 0.351}).axes[0]
    assert {0.35, 0.351} <= {line.get_ydata()[0] for line in ax.lines}
    heights = {t.get_text(): t.get_position()[1] for t in ax.texts}
    assert heights["zero"] - heights["repeat"] > 0.05  # moved apart


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 0.2)), max_size=12))
def test_spread_keeps_order_and_distance(labels):
    values, heights = (np.array([label[k] for label in labels]) for k in range(2))
    placed = _spread(values, heights)
    order = np.argsort(values)
    gaps = (heights[order][1:] + heights[order][:-1]) / 2
    assert np.all(np.diff(placed[order]) >= gaps - 1e-9)
    if np.all(np.diff(values[order]) >= gaps):
        np.testing.assert_allclose(placed, values, atol=1e-9)


# --- signal and fODF


def test_lobes_point_along_the_fibre_in_the_world():
    from dipy.data import get_sphere
    from dipy.reconst.shm import sf_to_sh

    from tractkit.dwi.gradients import DWI

    sphere = get_sphere(name="repulsion724")
    fibre, bvecs = np.array([0.8, 0.6, 0.0]), np.concatenate([np.zeros((2, 3)), sphere.vertices[:60]])
    coefficients = sf_to_sh(
        np.abs(sphere.vertices @ fibre) ** 20, sphere, sh_order_max=8, basis_type="descoteaux07", legacy=True
    )
    series = np.tile(1000 - 900 * (bvecs @ fibre) ** 2, (2, 2, 2, 1)).astype(np.float32)
    for affine in (np.eye(4), np.diag([-2, 2, 3, 1.0]), turned(40, 2, (2, 3, 1))):
        dwi = DWI(Volume(series, affine), np.repeat([0, 2000.0], [2, 60]), bvecs, np.ones((2, 2, 2)))
        fodf = Volume(np.tile(coefficients, (2, 2, 2, 1)).astype(np.float32), affine)
        picture = plot_signal_and_fodf(dwi, fodf, (1, 0, 1), plane="axial", directions=fibre[None])
        expected = (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0) @ fibre)[:2]
        radii = []
        for ax in picture.axes[:2]:
            middles = np.array([p.vertices[:3].mean(0) for p in ax.collections[0].get_paths()])
            along = np.abs(middles @ expected) > 0.97 * np.linalg.norm(middles, axis=1)
            radii.append(np.linalg.norm(middles[along], axis=1).max() / np.linalg.norm(middles, axis=1).max())
            across, up = next(line.get_xydata()[1] for line in ax.lines if line.get_linestyle() == "--")
            np.testing.assert_allclose([across, up], 1.08 * expected, atol=1e-6)
        assert radii[0] < 0.5 and radii[1] == 1  # the signal is small along the fibre, the fODF large
    for odd, voxel in (
        (fodf, (2, 0, 0)),
        (Volume(fodf.data[..., :14], affine), (0, 0, 0)),
        (Volume(fodf.data[:1], affine), (0, 0, 0)),
    ):
        with pytest.raises(ValueError, match="not on both grids|are no fODF"):
            plot_signal_and_fodf(dwi, odd, voxel)


# --- files


def test_a_picture_shows_itself_and_is_saved_whole(tmp_path):
    picture = plot_losses({"valid": [0.4, 0.3]})
    shown = Image.open(io.BytesIO(picture._repr_png_()))
    assert shown.size == (800, 460)
    save_figure(picture, tmp_path / "losses.png")
    assert Image.open(tmp_path / "losses.png").size == (800, 460)
    with pytest.raises(ValueError):
        save_figure(picture, tmp_path / "losses.nonsense")
    assert [p.name for p in tmp_path.iterdir()] == ["losses.png"]


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_a_small_png_keeps_few_colors_exactly_and_many_nearly():
    few = np.random.default_rng(0).integers(0, 4, (40, 50, 3), dtype=np.uint8) * 85
    np.testing.assert_array_equal(decoded(encode_png(few)), few)
    many = plot_streamlines(wavy(40), ramp()).array()
    np.testing.assert_array_equal(decoded(encode_png(many, small=False)), many[..., :3])
    small = decoded(encode_png(many)).astype(int)
    assert np.abs(small - many[..., :3]).mean() < 4
    assert (small == [12, 16, 20]).all(-1).mean() > 0.1  # the background is exact
    blurred = [np.asarray(Image.fromarray(a.astype(np.uint8)).reduce(5)).astype(int) for a in (small, many[..., :3])]
    assert np.percentile(np.abs(blurred[0] - blurred[1]), 99.5) < 12  # seen from afar
    assert len(encode_png(many)) < 0.6 * len(encode_png(many, small=False))


def test_color_ball_has_the_colors_of_its_plane():
    for plane, (across, up, normal) in PLANES.items():
        ball = color_ball(plane, 101)
        assert (
            ball[50, 50, :3].argmax() == normal
            and ball[50, 96, :3].argmax() == across
            and ball[96, 50, :3].argmax() == up
        )
        assert ball[0, 0, 3] == 0 and ball[50, 50, 3] == 1


def test_pyplot_is_never_imported():
    code = ("import sys; from tractkit.viz.losses import plot_losses; plot_losses({'valid': [1, .5]})._repr_png_(); "
            "sys.exit('matplotlib.pyplot' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_it_is_a_figure():
    from matplotlib.figure import Figure
    assert issubclass(Picture, Figure)
