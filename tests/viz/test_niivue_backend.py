"""What NiiVue is given in the browser, read back from the widget's traits and the bytes of its files."""

import io
import zipfile
from unittest.mock import patch

import nibabel as nib
import numpy as np
import pytest
from helpers_scene import AFFINES, LIT, SHAPE, wavy
from test_viewer import grouped, lit_mask, one_fodf

from tractkit.spatial.regions import Sphere, pass_through
from tractkit.spatial.space import apply_affine
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume
from tractkit.viz.drawables import Glyphs, Labels, Slices
from tractkit.viz.niivue_backend import by_color
from tractkit.viz.stills import Still
from tractkit.viz.theme import direction_colors, palette
from tractkit.viz.viewer import NiivueView, View, link_views, view


@pytest.fixture
def niivue_view():
    """A view that believes to be in a notebook; its still, which is not asked here, is a grey one."""
    grey = Still(np.full((40, 60, 4), 128, np.uint8))
    with patch("tractkit.viz.viewer._in_notebook", return_value=True), patch("tractkit.viz.viewer.display"), \
            patch("tractkit.viz.viewer.draw_still", return_value=(grey, None)):
        yield lambda *things, **options: view(*things, backend="niivue", size=(400, 300), **options)


def points_of(mesh) -> tuple[np.ndarray, np.ndarray]:
    """Points and offsets of a TRX; points and faces of an MZ3, as their formats say."""
    if mesh.name.endswith(".trx"):
        z = zipfile.ZipFile(io.BytesIO(mesh.data))
        return (
            np.frombuffer(z.read("positions.3.float32"), "<f4").reshape(-1, 3),
            np.frombuffer(z.read("offsets.uint32"), "<u4"),
        )
    magic, attributes = np.frombuffer(mesh.data, "<u2", 2)
    faces, corners, skip = np.frombuffer(mesh.data, "<u4", 3, 4)
    assert magic == 0x5A4D and skip == 0 and attributes in (3, 7)
    assert len(mesh.data) == 16 + 12 * faces + (16 if attributes == 7 else 12) * corners
    return (np.frombuffer(mesh.data, "<f4", 3 * corners, 16 + 12 * faces).reshape(-1, 3),
            np.frombuffer(mesh.data, "<i4", 3 * faces, 16).reshape(-1, 3))


@pytest.mark.parametrize("name", AFFINES)
def test_a_streamline_a_mask_and_a_voxel_meet_where_the_affine_says(name, niivue_view):
    affine = AFFINES[name]
    there = apply_affine(affine, LIT[None].astype(float))[0]
    line = Tractogram(Streamlines.from_list([np.stack([LIT, LIT + [0, 9, -6]])]), affine, SHAPE)
    v = niivue_view({"line": line, "mask": lit_mask(affine), "lit": Slices(lit_mask(affine, 0))}, colors="red")
    assert list(v.scene.meshes) == ["line", "mask"] and [s.name for s in v.scene.volumes] == ["lit.nii"]
    points, offsets = points_of(v.scene.meshes["line"][0])
    np.testing.assert_allclose(points, line.rasmm().points, atol=1e-4)
    assert offsets.tolist() == [0]
    surface, _ = points_of(v.scene.meshes["mask"][0])
    np.testing.assert_allclose((surface.min(0) + surface.max(0)) / 2, there, atol=1e-3)
    image = nib.Nifti1Image.from_bytes(v.scene.volumes[0].data)
    bright = np.argwhere(image.get_fdata() > 0.5)
    np.testing.assert_allclose(apply_affine(image.affine, bright.astype(float)), there[None], atol=1e-3)


def test_colors_switches_and_grey_values_are_those_of_the_other_backend(niivue_view):
    t = grouped()
    background = Volume(np.random.default_rng(0).random(SHAPE).astype(np.float32), t.affine)
    v = niivue_view({"t": t, "back": background}, colors="groups", tubes=0.4, window=(0.1, 0.7))
    assert (
        not v.scene.widget.opts.is_radiological_convention
        and "left of the head is on the left" in v.controls["message"].value
    )
    assert isinstance(v, NiivueView) and v.shown == v.total == 40
    for name, color in zip(("t: left", "t: right"), palette(2), strict=True):
        mesh, = v.scene.meshes[name]
        assert mesh.rgba255 == [*np.rint(color * 255).astype(int), 255] and mesh.fiber_radius == pytest.approx(0.4)
        assert (mesh.fiber_color, mesh.fiber_dither) == ("Fixed", 0)
    left = v.composition.parts[0]
    np.testing.assert_allclose(points_of(v.scene.meshes["t: left"][0])[0], left.drawn(None)[0].points, atol=1e-4)
    v.controls["show t: left"].value = False
    assert (
        not v.scene.meshes["t: left"][0].visible
        and v.scene.meshes["t: left"][0].fiber_length > 1e6
        and v.shown == 40 - len(left.ids)
    )
    assert (v.scene.volumes[0].cal_min, v.scene.volumes[0].cal_max) == (0.1, 0.7)
    v.controls["window"].value = (0.2, 0.6)
    assert v.scene.volumes[0].cal_max == pytest.approx(0.6, abs=0.01)
    v.controls["look"].value = "coronal"
    assert v.scene.widget.opts.slice_type.name == "CORONAL"
    with pytest.raises(ValueError, match="nothing is named 'nobody'"):
        v.toggle("nobody")


def test_directions_are_niivues_own_colors_and_others_keep_theirs(niivue_view):
    t = grouped()
    mesh, = niivue_view(t).scene.meshes["left"]
    points, offsets = points_of(mesh)
    s = niivue_view(t).composition.parts[0].drawn(None)[0]
    assert mesh.fiber_color == "Local" and len(points) == len(s.points) + len(s)
    starts = offsets[:-1].astype(int)
    np.testing.assert_array_equal(points[starts], points[starts + 1])  # the wrong color is on a segment of no length
    last = niivue_view(Glyphs(one_fodf(t.affine, (1.0, 0, 0)))).scene.meshes["fODF"][0]
    corners, faces = points_of(last)
    rgb = np.frombuffer(last.data, "u1")[-4 * len(corners):].reshape(-1, 4)[:, :3] / 255
    middle = apply_affine(t.affine, LIT[None].astype(float))
    far = np.linalg.norm(corners - middle, axis=1) > 0.2
    np.testing.assert_allclose(rgb[far], direction_colors(corners - middle)[far], atol=0.02)
    many = np.random.default_rng(0).random((len(s.points), 3))
    pieces = list(by_color(s, many))
    assert len(pieces) <= 32 and sum(len(p.points) - len(p) for _, p in pieces) == len(s.points) - len(s)


def test_the_slices_stand_and_move_where_the_sliders_say(niivue_view):
    """NiiVue counts in fractions of the grid that nibabel calls closest canonical, from face to face."""
    for affine in AFFINES.values():
        grid = Volume(np.random.default_rng(0).random(SHAPE).astype(np.float32), affine)
        there = apply_affine(affine, LIT[None].astype(float))[0]
        v = niivue_view(grid, position=tuple(there))

        def place(v=v, affine=affine):
            turned = nib.as_closest_canonical(nib.Nifti1Image.from_bytes(v.scene.volumes[0].data))
            return apply_affine(turned.affine, np.array(v.scene.widget.scene.crosshair_pos)[None] * turned.shape - 0.5)[
                0
            ]

        np.testing.assert_allclose(place(), there, atol=1e-3)
        low, high = v.controls["x"].min, v.controls["x"].max
        v.controls["x"].value = low + 0.4 * (high - low)
        np.testing.assert_allclose(place(), [v.controls["x"].value, there[1], there[2]], atol=1e-3)
        v.move(z=there[2] + 1)
        np.testing.assert_allclose(place(), [v.controls["x"].value, there[1], there[2] + 1], atol=1e-3)
        before, to = place(), (v.controls[n].min * 0.7 + v.controls[n].max * 0.3 for n in "xyz")
        v.scene.widget._handle_custom_msg(
            {"event": "location_change", "data": {"mm": [*to, 1.0]}}, []
        )  # a click in the browser
        assert all(
            c.value == pytest.approx(0.7 * c.min + 0.3 * c.max, abs=c.step) for c in (v.controls[n] for n in "xyz")
        )
        np.testing.assert_array_equal(place(), before)  # which has moved the planes itself
    np.testing.assert_allclose(
        niivue_view(grid).scene.widget.scene.crosshair_pos, 0.5, atol=0.1
    )  # not at the far sides, as FURY's three
    lines = niivue_view(grouped())
    assert "x" not in lines.controls
    with pytest.raises(ValueError, match="no slices to move"):
        lines.move(z=3)


def test_labels_have_their_colors_and_a_switch(niivue_view):
    affine = AFFINES["LAS anisotropic"]
    regions = np.zeros(SHAPE, np.int32)
    regions[tuple(LIT)], regions[1, 1, 1] = 1007, -3
    v = niivue_view(Labels(Volume(regions, affine), "atlas"))
    atlas, = v.scene.atlases["atlas"]
    image = nib.Nifti1Image.from_bytes(atlas.data)
    places = np.asarray(image.dataobj)
    assert image.get_data_dtype() == np.int16 and places[1, 1, 1] == 1 and places[tuple(LIT)] == 2
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    table = np.reshape(atlas.colormap_label.lut, (-1, 4))
    assert table[0, 3] == 0 and (atlas.colormap_label.min, atlas.colormap_label.max) == (0, 2)
    np.testing.assert_array_equal(table[1:, :3], np.rint(255 * palette(2)))
    v.move(z=float(v.composition.frame[0, 2]))  # without slices, too
    v.controls["show atlas"].value = False
    assert atlas.opacity == 0
    v.toggle("atlas")
    assert atlas.opacity > 0.5


def test_streamlines_are_selected_and_stay_hidden(niivue_view):
    t = grouped()
    v = niivue_view({"t": t}, Volume(np.ones(SHAPE, np.float32), t.affine), colors="groups")
    here = t.rasmm()[5][2]
    v.move(*(float(mm) for mm in here))
    v.controls["show t: right"].value = v.controls["show t: others"].value = False
    v.controls["radius"].value = 2.0
    v.controls["through"].click()
    near = pass_through(t, Sphere(here, 2.0))
    assert v.controls["selected"].value == f"{near.sum()} of 40 streamlines pass" and 0 < near.sum() < 40
    left, = v.scene.meshes["t: left"]
    assert len(points_of(left)[1]) == near[t.groups["left"]].sum() == v.shown
    assert not v.scene.meshes["t: right"][0].visible and v.scene.meshes["t: others"] == []
    v.controls["show t: others"].value = True
    v.controls["show t: others"].value = False
    v.controls["all"].click()
    assert not v.scene.meshes["t: others"][0].visible
    assert len(points_of(v.scene.meshes["t: left"][0])[1]) == len(t.groups["left"]) == v.shown


def test_reset_draws_all_again_and_a_closed_view_leaves_no_widget(niivue_view):
    from ipywidgets.widgets.widget import _instances

    before = set(_instances)
    v = niivue_view({"a": wavy(20), "b": wavy(9)}, Volume(np.ones(SHAPE, np.float32), AFFINES["RAS"]))
    v.toggle("b", False)
    v.controls["show a"].value = False
    v.reset()
    assert v.shown == 29 and not v.scene.hidden and v.controls["show a"].value
    v.close()
    assert [type(_instances[key]).__name__ for key in set(_instances) - before] == []
    with pytest.raises(RuntimeError, match="this view was closed"):
        v.reset()


def test_views_of_niivue_follow_each_other_and_only_each_other(niivue_view):
    grid = Volume(np.ones(SHAPE, np.float32), AFFINES["RAS"])
    a, b, lines = niivue_view(grid), niivue_view(grid, grouped()), niivue_view(grouped())
    linked = link_views(a, b)
    assert linked.box.children[0].children == (a.canvas, b.canvas)  # above the controls that they share
    one, other = a.scene.widget, b.scene.widget
    for volume in (one.volumes[0], other.volumes[0]):  # what the browser tells when it has loaded
        volume.set_trait("frac2mm", np.eye(4))
        volume.set_trait("frac2mm_ortho", np.eye(4))
    other._canvas_attached = True
    with patch.object(other, "mm2frac", side_effect=lambda mm: mm[:3]):
        one.set_state(
            {"scene": {"renderAzimuth": 77.0, "renderElevation": -5.0, "crosshairPos": [0.2, 0.3, 0.4]}}
        )  # turned by a person
    assert b.camera == a.camera == dict(render_azimuth=77.0, render_elevation=-5.0, vol_scale_multiplier=1.0)
    assert other.scene.crosshair_pos == [0.2, 0.3, 0.4]
    b.camera = {**a.camera, "render_azimuth": 10.0}
    assert other.scene.render_azimuth == 10.0 and one.scene.render_azimuth == 77.0
    link_views(a, lines)
    assert one.sync_opts == {"3d": True, "2d": False}  # no planes to share
    with pytest.raises(ValueError, match="cannot be a camera of FURY"):
        a.camera = {"position": (1, 2, 3)}
    with pytest.raises(ValueError, match="FURY and of NiiVue cannot be linked"):
        link_views(a, other_backend(a))
    a.close()
    with pytest.raises(ValueError, match="only live views"):
        link_views(a, b)


def other_backend(like: View) -> View:
    """A view that is live, and not NiiVue's."""
    v = View(like.still, like.composition, (40, 30), None)
    v.canvas = like.canvas
    return v


def test_without_the_package_one_sentence_says_what_to_do():
    with (
        patch("importlib.util.find_spec", return_value=None),
        pytest.raises(ImportError, match=r"pip install ipyniivue, or tractkit\[niivue\]"),
    ):
        view(grouped(), backend="niivue")
    with pytest.raises(ValueError, match="backend 'vtk' is neither"):
        view(grouped(), backend="vtk")
