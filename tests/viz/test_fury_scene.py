"""Scenes drawn offscreen by FURY are asked for the truth by their pixels."""

import io
import os
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import pytest
from fury import window
from helpers_scene import AFFINES, PLANES, SHAPE, SIDE, cube_around, in_world, voxel_and_line, wavy
from PIL import Image

from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume
from tractkit.viz.drawables import Slices
from tractkit.viz.fury_scene import open_stage
from tractkit.viz.planes import world_box
from tractkit.viz.stills import Still, snapshot
from tractkit.viz.viewer import view
from tractkit.viz.vulkan import NO_VULKAN, _read_fewer_names, vulkan_available


@pytest.mark.vulkan
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("name", AFFINES)
def test_a_lit_voxel_and_the_streamline_that_starts_in_it_meet_where_the_affine_says(name, plane):
    lit, line, there, end = voxel_and_line(AFFINES[name])
    across, up, normal = PLANES[plane]
    box = cube_around(world_box(lit))
    options = dict(view=plane, position=there[normal], frame=box, letters=False, size=(SIDE, SIDE))
    pixel = np.ptp(box, axis=0)[0] / SIDE
    rgb = snapshot(line, Slices(lit), colors="red", **options).array[..., :3].astype(int)
    red = in_world(rgb[..., 0] - rgb[..., 1] > 60, box, plane)
    grey = snapshot(Slices(lit), **options).array[..., :3].astype(int)
    blob = in_world(grey.min(-1) > 60, box, plane)
    assert np.abs(blob.mean(0) - there[[across, up]]).max() < 2.5 * pixel
    for tip in (there, end):
        assert np.linalg.norm(red - tip[[across, up]], axis=1).min() < 2.5 * pixel


@pytest.mark.vulkan
def test_an_opaque_slice_hides_no_streamline_in_a_flat_view():
    affine = AFFINES["LAS anisotropic"]
    solid = Volume(np.ones(SHAPE, np.float32), affine)
    for depth in (2, 17):  # below and above the slice, which stands in the middle
        line = Tractogram(Streamlines.from_list([np.array([[5, 5, depth], [25, 20, depth]])]), affine, SHAPE)
        rgb = (
            snapshot(line, solid, view="axial", colors="red", letters=False, size=(SIDE, SIDE))
            .array[..., :3]
            .astype(int)
        )
        assert (rgb[..., 0] - rgb[..., 1] > 60).sum() > 100


@pytest.mark.vulkan
def test_the_frame_does_not_depend_on_the_streamlines():
    background = Volume(np.ones(SHAPE, np.float32), AFFINES["LAS anisotropic"])
    a, b = (
        snapshot(t, background, view=v, colors=None, size=(200, 160)).array
        for t, v in ((wavy(1), "3d"), (wavy(30), "3d"))
    )
    assert np.array_equal(a[:30], b[:30]) and (a != b).any()


@pytest.mark.vulkan
def test_everything_in_the_outline_is_in_the_picture():
    """Corners of a box, as short lines: all eight are visible in every view, at every aspect."""
    box = np.array([[-30.0, -50, 10], [10, 60, 40]])
    corners = np.stack(np.meshgrid(*box.T, indexing="ij"), -1).reshape(-1, 3)
    middle = box.mean(0)
    lines = Streamlines.from_list([np.stack([c + (middle - c) * 0.02, c + (middle - c) * 0.1]) for c in corners])
    t = Tractogram(lines, np.eye(4), (1, 1, 1))
    for which in ("3d", "axial", "coronal", "sagittal"):
        for size in ((300, 150), (150, 300)):
            for k in range(8):
                rgb = (
                    snapshot(t[[k]], view=which, frame=box, colors="red", letters=False, size=size)
                    .array[..., :3]
                    .astype(int)
                )
                assert (rgb[..., 0] - rgb[..., 1] > 40).any(), (which, size, k)


@pytest.mark.vulkan
def test_colors_are_those_asked_for():
    rows = [np.array([[0, y, 0], [40, y, 0]]) for y in np.arange(0, 20, 0.02)]
    t = Tractogram(Streamlines.from_list(rows), np.eye(4), (40, 20, 1))
    one = snapshot(t, view="axial", colors=(0.7, 0.5, 0.2), letters=False, size=(160, 120)).array[60, 80, :3]
    np.testing.assert_allclose(one, np.array([0.7, 0.5, 0.2]) * 255, atol=6)
    each = snapshot(
        t, view="axial", colors=np.tile([[0.1, 0.6, 0.9]], (len(t), 1)), letters=False, size=(160, 120)
    ).array[60, 80, :3]
    np.testing.assert_allclose(each, np.array([0.1, 0.6, 0.9]) * 255, atol=6)
    by_direction = snapshot(t, view="axial", letters=False, size=(160, 120)).array[60, 80, :3]
    np.testing.assert_allclose(by_direction, [255, 0, 0], atol=6)
    with pytest.raises(ValueError, match="one color a streamline"):
        snapshot(t, colors=np.zeros((3, 3)))


@pytest.mark.vulkan
def test_ragged_empty_and_lone_streamlines_are_drawn_without_joining():
    parts = [
        np.array([[0, 0, 0], [10, 0, 0]]),
        np.empty((0, 3)),
        np.array([[5.0, 5, 0]]),
        np.array([[0, 10, 0], [5, 10, 0], [10, 10, 0]]),
    ]
    t = Tractogram(Streamlines.from_list(parts), np.eye(4), (11, 11, 1))
    rgb = snapshot(t, view="axial", colors="red", letters=False, size=(200, 200)).array[..., :3].astype(int)
    red = rgb[..., 0] - rgb[..., 1] > 40
    assert red[:30].any() and red[-30:].any() and not red[40:160].any()  # nothing between the two rows
    dots = Tractogram(Streamlines.from_list(parts[1:3]), np.eye(4), (11, 11, 1))
    snapshot(dots, Volume(np.ones((11, 11, 1), np.float32), np.eye(4)))


@pytest.mark.vulkan
def test_a_snapshot_is_written_whole(tmp_path):
    still = snapshot(wavy(3), path=tmp_path / "a.png", size=(120, 90))
    assert Image.open(tmp_path / "a.png").size == (120, 90) == Image.open(io.BytesIO(still.png)).size
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.vulkan
def test_many_snapshots_do_not_pile_up():
    import psutil

    t = wavy(200)
    for _ in range(3):
        snapshot(t, size=(200, 150))
    before = psutil.Process().memory_info().rss
    for _ in range(12):
        snapshot(t, size=(200, 150))
    assert psutil.Process().memory_info().rss - before < 60e6


def test_wgpus_types_are_the_same_when_fewer_names_are_read():
    from cffi import FFI, cparser
    from wgpu.backends.wgpu_native._ffi import ffi

    vulkan_available()
    assert "_parse" in vars(ffi._parser), "cffi or wgpu has changed, and the first view of a process takes 1.5 s longer"
    asked = [kind for kind in ffi._parsed_types if "WGPU" in kind][::9] + [
        "WGPUColor[3]",
        "struct WGPUExtent3D const *",
        "uint8_t[]",
    ]
    assert len(asked) > 6
    quick = [ffi._parser.parse_type(kind) for kind in asked]
    with patch.object(ffi._parser, "_parse", type(ffi._parser)._parse.__get__(ffi._parser)):
        assert quick == [ffi._parser.parse_type(kind) for kind in asked]
    with pytest.raises(Exception, match="WGPUNobody"):
        ffi.typeof("WGPUNobody *")
    other = FFI()
    assert _read_fewer_names(other._parser) and not _read_fewer_names(other._parser) and not _read_fewer_names(object())
    other.cdef("typedef struct { int a, b; } Pair; typedef Pair *Pairs; typedef int Far;")
    c = cparser._get_parser()
    with patch("cffi.cparser._get_parser", return_value=c), patch.object(c, "parse", wraps=c.parse) as read:
        assert other.sizeof("Pairs[2]") == 2 * other.sizeof("void *") and other.new("Pair *", dict(a=3)).a == 3
    assert [("Pair;" in call.args[0], "Far;" in call.args[0]) for call in read.call_args_list] == [
        (False, False),
        (False, False),
        (True, False),
    ]


@pytest.mark.vulkan
def test_a_view_draws_its_still_once():
    with patch("tractkit.viz.stills.open_stage", wraps=open_stage) as opened:
        still = view(wavy(3), size=(60, 50)).still
    assert [call.args[1:3] for call in opened.call_args_list] == [((60, 50), "offscreen")] and still.array.std() > 0


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(TypeError, match="cannot draw a str"):
        snapshot("bundles.trk")
    with pytest.raises(TypeError, match=r"its affine: Volume\(array, affine\)"):
        snapshot([{"a": np.zeros((2, 2, 2))}])
    with pytest.raises(ValueError, match="none of axial"):
        view(wavy(1), view="oblique")
    with pytest.raises(ValueError, match="nothing to frame"):
        snapshot()
    with pytest.raises(ValueError, match="neither one number"):
        snapshot(wavy(1), position=(1, 2))


def test_lists_are_flattened_and_parts_counted():
    shown = view([wavy(30), [wavy(50)]], live=False, max_streamlines=40, size=(80, 60))
    assert (shown.shown, shown.total, shown.canvas) == (70, 80, None)
    assert repr(shown) == "View(70 of 80 streamlines, still)"


@pytest.mark.vulkan
def test_in_a_notebook_a_view_is_a_widget_and_a_still_and_shows_itself_once_a_cell():
    """In a kernel, without a browser: what a saved notebook holds."""
    import nbclient
    import nbformat

    cells = ["""import numpy as np
from tractkit.viz.viewer import view
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
t = Tractogram(Streamlines.from_list([np.array([[0, 0, 0], [9, 9, 3]])]), np.eye(4), (10, 10, 10))""",
             "v = view(t, size=(120, 90))\nv", "v", "view(t, live=False, size=(120, 90));"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    _, made, again, still = (c.outputs for c in notebook.cells)
    for outputs in (made, again):
        assert [set(o["data"]) - {"text/plain"} for o in outputs] == [
            {"application/vnd.jupyter.widget-view+json"},
            {"image/png"},
            {"text/html"},  # hides the widget where there is none any more
        ]
        assert outputs[0]["data"]["text/plain"] == "View(1 of 1 streamlines, live)"
    assert [set(o["data"]) for o in still] == [{"image/png", "text/plain"}]
    assert " at 0x" not in str(notebook)


# --- without a driver

ERRORS = (
    "Request adapter failed (3): Validation Error\n\nCaused by: no suitable adapter",
    "Request device failed (3): Validation Error  Caused by: Unsupported features were requested: FLOAT32_FILTERABLE",
)


@pytest.fixture
def fresh_answer():
    vulkan_available.cache_clear()
    yield
    vulkan_available.cache_clear()


@pytest.mark.parametrize("message", ERRORS)
def test_without_a_driver_one_sentence_and_a_still(message, capsys, fresh_answer):
    background = Volume(np.ones(SHAPE, np.float32), AFFINES["LAS anisotropic"])
    with patch.object(window.ShowManager, "__init__", side_effect=RuntimeError(message)) as tried:
        shown = view(wavy(3), background, wavy(2), size=(200, 150))
        assert capsys.readouterr().out == NO_VULKAN + "\n"
        assert shown.canvas is None and shown.still.array.shape == (150, 200, 4)
        assert view(background, view="coronal").still.array.std() > 0
        assert isinstance(snapshot(wavy(3), view="sagittal"), Still)
    assert tried.call_count == 1  # a second window would fail in another way
    assert all(
        word in NO_VULKAN
        for word in (
            "apt install mesa-vulkan-drivers",
            "dnf install mesa-vulkan-drivers",
            "macOS",
            "VK_DRIVER_FILES",
            "VK_ICD_FILENAMES",
        )
    )
    assert NO_VULKAN.count(". ") == 0  # one sentence


def test_other_errors_are_not_hidden(fresh_answer):
    with (
        patch.object(window.ShowManager, "__init__", side_effect=RuntimeError("disk on fire")),
        pytest.raises(RuntimeError, match="fire"),
    ):
        snapshot(wavy(1))


def test_a_process_without_a_driver(tmp_path):
    """The real thing: a child that the loader shows no driver to."""
    code = f"""
import sys
import numpy as np
from fury import window
try: window.ShowManager(size=(8, 8), window_type="offscreen")  # somebody has tried before: the second error is another
except RuntimeError: pass
from tractkit.viz.stills import snapshot
from tractkit.viz.vulkan import vulkan_available
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
assert not vulkan_available()
assert not {{"dipy", "torch"}} & set(sys.modules)  # a picture of streamlines need not wait for them
t = Tractogram(Streamlines.from_list([np.array([[0, 0, 0], [9, 9, 3]])]), np.eye(4), (10, 10, 10))
snapshot(t, path={str(tmp_path / "a.png")!r}, size=(200, 150))
snapshot(t, size=(50, 50))
"""
    nothing = dict(
        VK_DRIVER_FILES="/nonexistent", VK_ICD_FILENAMES="/nonexistent", __EGL_VENDOR_LIBRARY_FILENAMES="/nonexistent"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **nothing}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(NO_VULKAN) == 1  # once a process
    assert Image.open(tmp_path / "a.png").size == (200, 150)
