"""The page of a view, read back as its script reads it: what is where, in which colors, and that it is whole."""

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers_scene import AFFINES, LIT, SHAPE, voxel_and_line, wavy
from test_viewer import lit_mask, one_fodf

from tractkit.core.files import DataError
from tractkit.spatial.regions import Sphere
from tractkit.spatial.space import apply_affine
from tractkit.spatial.volume import Volume
from tractkit.viz.colors import slice_colors
from tractkit.viz.composition import Composition
from tractkit.viz.drawables import Glyphs, Labels, Peaks, Slices, peak_sticks
from tractkit.viz.fury_scene import LineStyle, Stage
from tractkit.viz.page import save_page, state_of
from tractkit.viz.theme import palette


class Page:
    """What a page holds."""

    def __init__(self, path: Path):
        self.text = path.read_text(encoding="utf-8")
        self.told = json.loads(self._script("scene"))
        self.data = zlib.decompress(base64.b64decode(self._script("data")))

    def _script(self, name: str) -> str:
        found = re.search(rf'<script type="[^"]+" id="{name}">(.*?)</script>', self.text, re.S)
        assert found
        return found[1]

    def array(self, where) -> np.ndarray:
        kind, at, count = where
        return np.frombuffer(self.data, f"<{kind}", count, at)

    def points(self, layer) -> np.ndarray:
        low, high = self.array(layer["positions"]).reshape(3, 2, -1).transpose(1, 0, 2).astype(int)
        return layer["origin"] + layer["step"] * (np.cumsum(low + 256 * high, axis=1) & 0xFFFF).T


@pytest.fixture
def page(tmp_path):
    def write(*things, **options) -> Page:
        save_page(Composition(things, **options), tmp_path / "page.html")
        return Page(tmp_path / "page.html")

    return write


@pytest.mark.parametrize("name", AFFINES)
def test_everything_is_where_the_affine_says(name, page):
    affine = AFFINES[name]
    lit, line, there, _ = voxel_and_line(affine)
    vectors = np.zeros((*SHAPE, 3), np.float32)
    vectors[tuple(LIT)] = 0.6, 0.8, 0
    vectors[1, 1, 1] = 0.05, 0, 0  # noise, which is not drawn
    peaks = Peaks(Volume(vectors, affine), "peaks")
    read = page(
        {"line": line, "mask": lit_mask(affine), "lit": Slices(lit)}, peaks, Glyphs(one_fodf(affine), "glyph"),
        colors="red", position=there,
    )
    told = read.told
    np.testing.assert_allclose(read.points(told["lines"][0]), line.rasmm().points, atol=0.006)
    assert told["lines"][0]["paint"] == "one" and told["lines"][0]["rgb"] == [1, 0, 0]
    surface = read.points(told["surfaces"][0])
    np.testing.assert_allclose((surface.min(0) + surface.max(0)) / 2, there, atol=0.02)
    for volume in (told["volumes"][0], told["surfaces"][0]["mask"]):
        x, y, z = volume["shape"]
        values = read.array(volume["data"]).reshape(z, y, x).transpose(2, 1, 0)
        place = np.reshape(volume["toTexture"], (4, 4)).T @ [*there, 1]
        middle = (np.argwhere(values == values.max()).mean(0) + 0.5) / values.shape
        np.testing.assert_allclose(place[:3], middle, atol=1e-4)
    stick = told["peaks"][0]
    vectors = read.array(stick["vectors"]).reshape(SHAPE[2], SHAPE[1], SHAPE[0], 3)
    vector = vectors[LIT[2], LIT[1], LIT[0]]
    assert vectors.any(axis=-1).sum() == 1
    ends, _ = peak_sticks(peaks, 2, there[2])
    np.testing.assert_allclose(there + stick["half"] * vector / 127, ends[1], atol=0.02)
    for plane in told["glyphs"][0]["planes"].values():
        np.testing.assert_allclose(read.array(plane["middles"]), there, atol=1e-3)
        assert read.array(plane["radii"]).max() == 255


def test_colors_and_parts_are_those_of_the_picture(page):
    t = wavy(40)
    t.groups.update(left=np.arange(10), right=np.arange(10, 40))
    first, second = page({"t": t}, colors="groups").told["lines"]
    assert (first["name"], second["name"]) == ("t: left", "t: right")
    assert [first["paint"], second["paint"]] == ["one", "one"]
    np.testing.assert_allclose([first["rgb"], second["rgb"]], palette(2), atol=1 / 255)
    t.groups.clear()
    by_line = page(t, colors=np.linspace(0, 1, 40))
    assert by_line.told["lines"][0]["paint"] == "line" and "data:image/png" in by_line.text
    assert len(by_line.array(by_line.told["lines"][0]["rgb"])) == 3 * 40
    by_point = page(t, colors=np.linspace(0, 1, len(t.streamlines.points)))
    assert by_point.told["lines"][0]["paint"] == "point"
    assert page(t).told["lines"][0]["paint"] == "direction"


def test_names_are_text_and_nothing_comes_from_elsewhere(page):
    t = wavy(3)
    name = "</script><script>alert(1)</script>"
    read = page({name: t}, colors="red")
    assert read.told["lines"][0]["name"] == name and name not in read.text
    assert not re.search(r"https?://|@import|src=(?!\"data:)|href=", read.text)
    assert "default-src 'none'" in read.text


def test_a_page_that_would_be_too_large_has_fewer_streamlines_and_says_so(tmp_path):
    many = wavy(4000)
    rng = np.random.default_rng(0)
    many.streamlines.points[:] += rng.random(many.streamlines.points.shape).astype(np.float32)
    composition, path = Composition(many), tmp_path / "page.html"
    assert save_page(composition, path) == []
    whole = path.stat().st_size
    note, = save_page(composition, path, most_megabytes=whole * 0.8 / 1e6)
    read = Page(path)
    nb = len(read.array(read.told["lines"][0]["lengths"]))
    assert path.stat().st_size <= whole * 0.8 and 400 < nb < 3600
    assert note.startswith(f"{nb:,} of 4,000 streamlines are in the page") and read.told["notes"] == [note]
    note, = save_page(Composition(many, max_streamlines=500), path)
    assert note == "500 of 4,000 streamlines are in the page, spread evenly."
    noise = rng.random((60, 60, 60)).astype(np.float32)
    before = path.read_bytes()
    with pytest.raises(DataError, match="also without streamlines; the bound is 0.1 MB. Resample or leave out volumes"):
        save_page(Composition([Volume(noise, np.eye(4)), wavy(4)]), path, most_megabytes=0.1)
    for wrong in ("page.pdf", "page", "page.png"):
        with pytest.raises(DataError):
            save_page(composition, tmp_path / wrong)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.vulkan
@pytest.mark.parametrize("view", ["3d", "coronal"])
def test_a_live_view_is_saved_as_it_stands(view):
    stage = Stage(Composition({"t": wavy(20), "mask": lit_mask(AFFINES["LAS anisotropic"])}, view=view))
    stage.look(view, 1.5)
    stage.move([1.0, 2.0, 3.0])
    stage.show(["mask"], "mask", False)
    stage.set_count(7)
    stage.camera.zoom = 1.7
    stage.camera.world.position = np.asarray(stage.camera.world.position) + [3, 1, 2]
    stage.camera.set_view_size(600, 400)
    state = state_of(stage)
    assert (state.view, state.hidden, state.limit, list(state.position)) == (view, ("mask",), 7, [1, 2, 3])
    c = state.camera
    assert c is not None
    points = np.random.default_rng(0).uniform(-30, 30, (50, 3))
    seen = apply_homogeneous(stage.camera.camera_matrix, points)
    right, up, forward, target = (np.array(c[k]) for k in ("right", "up", "forward", "target"))
    distance = c["factor"] * c["height"] * (1 + c["aspect"]) / 2   # as the script has it
    depth = (points - target) @ forward + distance
    scale = np.where(distance > 0, distance / depth, 1.0) if distance else np.ones(len(points))
    x = (points - target) @ right * scale / (c["height"] * c["aspect"] / 2)
    y = (points - target) @ up * scale / (c["height"] / 2)
    np.testing.assert_allclose(np.stack([x, y], 1), seen, atol=1e-3)


def apply_homogeneous(matrix, points) -> np.ndarray:
    at = np.c_[points, np.ones(len(points))] @ np.asarray(matrix).T
    return at[:, :2] / at[:, 3:]


def test_the_origin_of_a_volume_is_kept_when_its_rim_is_cut_off(page):
    data = np.zeros((20, 20, 20), np.float32)
    data[4:8, 10:15, 3] = 5
    affine = np.diag([-2.0, 1, 3, 1])
    volume = page(Volume(data, affine)).told["volumes"][0]
    assert volume["shape"] == [6, 7, 3]
    first = apply_affine(affine, np.array([[3.0, 9, 2]]))[0]  # the first voxel that is kept
    np.testing.assert_allclose(np.reshape(volume["toTexture"], (4, 4)).T @ [*first, 1], [0.5 / 6, 0.5 / 7, 0.5 / 3, 1])


def test_colormap_labels_style_planes_and_selection_are_in_the_page(tmp_path):
    affine = AFFINES["LAS anisotropic"]
    regions = np.zeros(SHAPE, np.int16)
    regions[tuple(slice(k - 3, k + 4) for k in LIT)] = 1007
    regions[:3] = 12
    t, back = wavy(30), Volume(np.random.default_rng(0).random(SHAPE).astype(np.float32), affine)
    stage = Stage(Composition([t, back, Labels(Volume(regions, affine), "atlas")]))
    stage.set_colormap("magma")
    stage.set_style(LineStyle(thickness=3, opacity=0.5, slab=4.0), tubes=0.4, rebuild=True)
    stage.show_planes(["axial"])
    nb = stage.select([Sphere(t.rasmm()[5][10], 2.0)], [])
    notes = save_page(stage, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    grey, atlas = page.told["volumes"]
    near = page.array(grey["colors"]).reshape(256, 4) / 255
    np.testing.assert_allclose(near, slice_colors("magma", stage.composition.brightness), atol=0.003)
    own = page.array(atlas["colors"]).reshape(256, 4)
    assert sorted(set(page.array(atlas["data"]))) == [0, 1, 2] and own[0, 3] == 0
    np.testing.assert_allclose(own[1:3, :3] / 255, palette(2), atol=0.003)
    (lines,) = page.told["lines"]
    assert lines["lengths"][2] == nb < 30 and lines["radius"] == 0.4
    assert [page.told[k] for k in ("thickness", "slab", "opacity", "axes")] == [3, 4, 0.5, [2]]
    assert not any("opaque" in note for note in notes)
