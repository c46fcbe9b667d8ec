"""What NiiVue is given in the browser, read back from the widget's traits and the bytes of its files."""

import io
import zipfile
from unittest.mock import patch

import nibabel as nib
import numpy as np
import pytest
from test_plots import AFFINES, LIT, SHAPE
from test_viewer import grouped, lit_mask, one_fodf

from tractkit.coloring import palette
from tractkit.niivue import by_color
from tractkit.plots import direction_colors
from tractkit.scene import Still
from tractkit.space import apply_affine
from tractkit.streamlines import Streamlines
from tractkit.things import Glyphs, Slices
from tractkit.tractogram import Tractogram
from tractkit.viewer import NiivueView, view
from tractkit.volume import Volume


@pytest.fixture
def niivue_view():
    """A view that believes to be in a notebook; its still, which is not asked here, is a grey one."""
    grey = Still(np.full((40, 60, 4), 128, np.uint8))
    with patch("tractkit.viewer._in_notebook", return_value=True), patch("tractkit.viewer.display"), \
            patch("tractkit.viewer.draw_still", return_value=(grey, None)):
        yield lambda *things, **options: view(*things, backend="niivue", size=(400, 300), **options)


def points_of(mesh) -> tuple[np.ndarray, np.ndarray]:
    """Points and offsets of a TRX; points and faces of an MZ3, as their formats say."""
    if mesh.name.endswith(".trx"):
        z = zipfile.ZipFile(io.BytesIO(mesh.data))
        return (np.frombuffer(z.read("positions.3.float32"), "<f4").reshape(-1, 3), np.frombuffer(z.read("offsets.uint32"), "<u4"))
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
    assert isinstance(v, NiivueView) and v.shown == v.total == 40
    for name, color in zip(("t: left", "t: right"), palette(2), strict=True):
        mesh, = v.scene.meshes[name]
        assert mesh.rgba255 == [*np.rint(color * 255).astype(int), 255] and mesh.fiber_radius == pytest.approx(0.4)
        assert (mesh.fiber_color, mesh.fiber_dither) == ("Fixed", 0)
    left = v._composition.parts[0]
    np.testing.assert_allclose(points_of(v.scene.meshes["t: left"][0])[0], left.drawn(None)[0].points, atol=1e-4)
    v.controls["show t: left"].value = False
    assert not v.scene.meshes["t: left"][0].visible and v.scene.meshes["t: left"][0].fiber_length > 1e6 and v.shown == 40 - len(left.ids)
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
    s = niivue_view(t)._composition.parts[0].drawn(None)[0]
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


def test_without_the_package_one_sentence_says_what_to_do():
    with patch("importlib.util.find_spec", return_value=None), pytest.raises(ImportError, match=r"pip install ipyniivue, or tractkit\[niivue\]"):
        view(grouped(), backend="niivue")
    with pytest.raises(ValueError, match="backend 'vtk' is neither"):
        view(grouped(), backend="vtk")
