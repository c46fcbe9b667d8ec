"""Every mistake that `check_space` looks for, made on good data: is it named with the right fix, left undecided, or
named wrongly? Axes of gradients, peaks and coefficients are exchanged and reversed in all 24 ways (the first changes
nothing), coefficients are said to be in each of the four bases while they are in another, and streamlines are put where
each of 102 mistakes puts them (47 mirrors and exchanges in voxels and as many in the scanner's axes, 8 of units), and
half a voxel up and down. "Moved" puts them one to three whole voxels away (9 ways), turns them by 5 to 20 degrees about
each axis (12) and scales them by 0.8 to 1.2 (5), about the middle of the grid; those that move the points by less
than a voxel on average are left out. Right is then the exact shift, or for turns and scales that transforms are to be
compared. Undecided are also mistakes that change nothing there: reversed third axes of fibres that lie
in a plane, left and right of a map of white matter that is symmetric. "Alarms" counts the good data that were called
wrong. Seconds are those of the processor, of one check without reading files; the last rows are a whole brain at 2 mm,
the real series resampled, with 64 directions. Real data from TRACTKIT_DATA, where it is set."""

import os
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import dipy
import numpy as np
from scipy.ndimage import zoom
from scipy.spatial.transform import Rotation

from tractkit.dwi.basis_check import BASES_TO_TRY
from tractkit.dwi.fibre_coherence import axis_maps
from tractkit.dwi.fodf import compute_fodf, fodf_peaks
from tractkit.dwi.gradients import DWI, load_dwi
from tractkit.dwi.phantom import make_phantom
from tractkit.dwi.placement import placements, sample_steps
from tractkit.dwi.sh import compute_sh
from tractkit.dwi.sh_basis import ShBasis, sh_turn
from tractkit.dwi.space_check import (
    FibreField,
    SpaceFinding,
    check_streamlines,
    field_of_dwi,
    field_of_peaks,
    field_of_sh,
    turn_of,
)
from tractkit.spatial.mif import mif_gradients
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume


@dataclass
class Row:
    """What came of the mistakes of one kind on one data set."""

    data: str
    kind: str
    counts: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def timed(self, check: Callable):
        began = time.process_time()
        result = check()
        self.seconds.append(time.process_time() - began)
        return result

    def cells(self) -> list[str]:
        c = self.counts
        return [self.data, self.kind, str(c["right"] + c["undecided"] + c["wrong"]), str(c["right"]),
                str(c["undecided"]), str(c["wrong"]), str(c["alarm"]), f"{max(self.seconds):.1f}"]


def same_line(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two maps are the same to lines without a sign."""
    return np.allclose(a, b, atol=1e-6) or np.allclose(a, -b, atol=1e-6)


def judge_axes(row: Row, mistake: np.ndarray, found: FibreField) -> None:
    """Count one check of turned axes."""
    if same_line(mistake, np.eye(3)):
        row.counts["alarm"] += found.finding.status == "wrong"
        return
    fits = [same_line(m @ mistake, np.eye(3)) for m in found.maps]
    decided = "right" if len(fits) == 1 else "undecided"
    row.counts["undecided" if found.finding.status == "open" else decided if any(fits) else "wrong"] += 1


def axes_row(data: str, kind: str, check: Callable[[np.ndarray], FibreField]) -> Row:
    """All maps of axes; `check` turns the data by one, and looks."""
    row = Row(data, kind)
    for mistake in axis_maps():
        judge_axes(row, mistake, row.timed(lambda m=mistake: check(m)))
    return row


def dwi_row(data: str, dwi: DWI) -> Row:
    return axes_row(data, "gradients", lambda m: field_of_dwi(replace(dwi, bvecs=dwi.bvecs @ m.T)))


def peaks_row(data: str, peaks: Volume, axes: str = "voxel", white: Volume | None = None) -> Row:
    vectors = peaks.data.reshape(*peaks.shape3d, -1, 3)

    def check(m: np.ndarray) -> FibreField:
        turn = turn_of(axes, peaks.affine)  # the mistake is made in voxel axes
        turned = vectors @ (turn.T @ m @ turn).T
        return field_of_peaks(replace(peaks, data=turned.reshape(peaks.data.shape)), axes, white)

    return axes_row(data, "peaks, with FA" if white else "peaks", check)


def sh_rows(data: str, sh: Volume, basis: str, kind: str, axes: str = "voxel") -> Iterator[Row]:
    """Turned axes, and wrong bases."""
    named = ShBasis.parse(basis)
    turn = turn_of(axes, sh.affine)

    def check(m: np.ndarray) -> FibreField:
        turned = sh.data @ sh_turn(named, sh.nb_features, turn.T @ m @ turn).T.astype(np.float32)
        return field_of_sh(replace(sh, data=turned), basis, kind, axes)

    yield axes_row(data, f"SH of the {kind}, axes", check)
    row = Row(data, f"SH of the {kind}, basis")
    for true in BASES_TO_TRY:
        values = replace(sh, data=sh.data @ _between(named, ShBasis.parse(true), sh.nb_features))
        for said in BASES_TO_TRY:
            finding = row.timed(lambda v=values, s=said: field_of_sh(v, s, None, axes)).finding
            if said == true:
                row.counts["alarm"] += finding.status == "wrong"
            else:
                right = finding.status == "wrong" and f"basis={true!r}" in finding.fix
                maybe = finding.status == "open" or true in finding.left or true in finding.fix.split("one of ")[-1]
                row.counts["right" if right else "undecided" if maybe else "wrong"] += 1
    yield row


def _between(a: ShBasis, b: ShBasis, n: int) -> np.ndarray:
    """What makes coefficients in one basis those in another."""
    from dipy.data import get_sphere
    from dipy.reconst.shm import sh_to_sf_matrix

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        to, of = (sh_to_sf_matrix(get_sphere(name="repulsion724"), sh_order_max=x.order_of(n), basis_type=x.basis,
                                  legacy=x.legacy, return_inv=False) for x in (a, b))
    return (to @ np.linalg.pinv(of)).astype(np.float32)


def streamlines_row(
    data: str, tractogram: Tractogram, fibres: FibreField | None, numbers: Volume | None = None, kind: str = "",
) -> Row:
    """All misplacements, and half a voxel up and down."""
    row = Row(data, kind or "streamlines")
    affine, shape = (fibres.affine, fibres.directions.shape[:3]) if fibres else (numbers.affine, numbers.shape3d)
    good = tractogram.rasmm().transform(np.linalg.inv(affine))
    half = [_shifted(d) for d in (-0.5, 0.5)]
    every = placements(affine, shape)
    for number, repair in enumerate([*(p.matrix for p in every), *half]):
        bad = good.transform(np.linalg.inv(repair))
        moved = Tractogram(bad, affine, shape)
        finding = row.timed(lambda t=moved: check_streamlines(t, fibres, numbers))
        if number == 0:
            row.counts["alarm"] += finding.status == "wrong"
            continue
        row.counts[_judge(finding, repair, every, sample_steps(bad).middle)] += 1
    return row


def _shifted(by: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = by
    return matrix


def _judge(finding: SpaceFinding, repair: np.ndarray, every: list, points: np.ndarray) -> str:
    """Whether a finding is right, undecided or wrong, when `repair` is needed."""
    def fits(matrix: np.ndarray) -> bool:
        off = points @ (matrix - repair)[:3, :3].T + (matrix - repair)[:3, 3]
        return bool(np.abs(off).max() < 0.75)

    if finding.status == "open":
        return "undecided"
    if finding.status == "right":
        return "wrong"
    named = [p for p in every if p.fix and p.fix == finding.fix]
    if named:
        return "right" if any(fits(p.matrix) for p in named) else "wrong"
    if "half a voxel" in finding.fix:
        shift = [float(x) for x in finding.fix.split("by (")[1].split(")")[0].split(",")]
        return "right" if np.abs(repair[:3, 3] - shift).max() < 0.25 else "wrong"
    return "undecided" if any(fits(p.matrix) for p in every if p.name in finding.left) else "wrong"


def motions(shape: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """Whole voxels, rotations and scales, as kind and matrix."""
    for by in ((1, 1, 1), (-1, -1, -1), (1, 0, 0), (0, 1, 0), (2, 0, 0), (0, -2, 0), (-3, 0, 0), (0, 3, 0), (2, -2, 1)):
        matrix = np.eye(4)
        matrix[:3, 3] = by
        yield "shift", matrix
    middle = np.array(shape) / 2
    for linear in [
        *(Rotation.from_rotvec(np.radians(angle) * np.eye(3)[axis]).as_matrix()
          for axis in range(3) for angle in (5, 10, 15, 20)),
        *(np.eye(3) * scale for scale in (0.8, 0.9, 0.95, 1.1, 1.2)),
    ]:
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = linear, middle - linear @ middle
        yield "turn", matrix


def motions_row(data: str, tractogram: Tractogram, fibres: FibreField) -> Row:
    """Whole voxels, rotations and scales."""
    row, affine, shape = Row(data, "streamlines, moved"), fibres.affine, fibres.directions.shape[:3]
    good = tractogram.rasmm().transform(np.linalg.inv(affine))
    for kind, matrix in motions(shape):
        bad = good.transform(matrix)
        if np.linalg.norm(bad.points - good.points, axis=1).mean() < 1:
            continue
        moved = Tractogram(bad, affine, shape)
        finding = row.timed(lambda t=moved: check_streamlines(t, fibres))
        row.counts[_judge_motion(finding, kind, matrix)] += 1
    return row


def _judge_motion(finding: SpaceFinding, kind: str, matrix: np.ndarray) -> str:
    """Whether a finding is right, undecided or wrong, for streamlines that were moved by `matrix`."""
    if finding.status != "wrong":
        return "undecided" if finding.status == "open" else "wrong"
    if "compare the transforms" in finding.fix or "not decided" in finding.fix:
        return "right" if kind == "turn" and "compare" in finding.fix else "undecided"
    named = re.findall(r"(add|subtract) (\d+) voxels? in ([xyz])", finding.fix)
    shift = np.zeros(3)
    for word, number, axis in named:
        shift["xyz".index(axis)] = float(number) * (1 if word == "add" else -1)
    return "right" if kind == "shift" and named and np.array_equal(shift, -matrix[:3, 3]) else "wrong"


def whole(name: str, dwi: DWI, tractogram: Tractogram) -> Iterator[Row]:
    """Everything, of one series."""
    yield dwi_row(name, dwi)
    fodf = compute_fodf(dwi)
    yield peaks_row(name, fodf_peaks(fodf))
    yield from sh_rows(name, fodf, "descoteaux07_legacy", "fodf")
    yield from sh_rows(name, compute_sh(dwi), "descoteaux07_legacy", "signal")
    yield streamlines_row(name, tractogram, field_of_dwi(dwi))
    yield motions_row(name, tractogram, field_of_dwi(dwi))


def phantoms() -> Iterator[Row]:
    for layout in ("standard", "rotated"):
        with tempfile.TemporaryDirectory() as folder:
            (subject,) = make_phantom(folder, 1, layout=layout, progress=False)
            dwi = load_dwi(*(subject / n for n in ("dwi.nii.gz", "bvals", "bvecs", "mask.nii.gz")))
            yield from whole(f"phantom, {layout}", dwi, Tractogram.load(subject / "tractogram.trk"))


def real(data: Path) -> Iterator[Row]:
    d = data / "real_dwi_3mm"
    dwi = load_dwi(d / "dwi.nii.gz", d / "dwi.bval", d / "dwi.bvec", d / "mask.nii.gz")
    tractogram = Tractogram.load(d / "csd_det_compressed.trk")
    yield from whole("real_dwi_3mm", dwi, tractogram)
    yield peaks_row("real_dwi_3mm", fodf_peaks(compute_fodf(dwi)), "voxel", Volume.load(d / "dsi_FA.nii.gz"))
    yield streamlines_row("real_dwi_3mm", tractogram, None, Volume.load(d / "dsi_FA.nii.gz"), "streamlines, FA only")
    d = data / "human_atlas"
    yield streamlines_row("human_atlas", Tractogram.load(d / "bundles.trx"), None, Volume.load(d / "qa.nii.gz"),
                          "streamlines, QA only")
    yield peaks_row("tractseg", Volume.load(data / "tractseg" / "peaks.nii.gz"), "scanner")
    d = data / "mrtrix" / "msmt"
    volume, mask = Volume.load(d / "dwi.mif"), Volume.load(d / "mask.mif").data > 0
    bvals, bvecs = mif_gradients(d / "dwi.mif")
    small = DWI(volume, bvals, bvecs, mask.reshape(volume.shape3d))
    wm = Volume.load(d / "wm.mif")
    yield dwi_row("mrtrix/msmt", small)
    yield from sh_rows("mrtrix/msmt", wm, "tournier07", "fodf", "scanner")
    few, fibres = Tractogram.load(d / "derived_csd_det.trk"), field_of_sh(wm, "tournier07", "fodf", "scanner")
    yield streamlines_row("mrtrix/msmt", few, fibres)
    yield motions_row("mrtrix/msmt", few, fibres)
    yield from brain(dwi, tractogram)


def brain(dwi: DWI, tractogram: Tractogram) -> Iterator[Row]:
    """A whole brain at 2 mm with 64 directions: how long one check takes."""
    factor = dwi.volume.voxel_sizes[0] / 2
    data = np.stack([zoom(dwi.volume.data[..., k].astype(np.float32), factor, order=1) for k in range(21)], axis=-1)
    mask = zoom(dwi.mask.astype(np.float32), factor, order=1) > 0.5
    several = np.concatenate([[0], np.tile(np.arange(1, 21), 4)[:64]])
    affine = dwi.volume.affine.copy()
    affine[:3, :3] *= np.array(dwi.volume.shape3d) / np.array(mask.shape)
    fine = DWI(Volume(data[..., several], affine), dwi.bvals[several], dwi.bvecs[several], mask)
    row = Row(f"2 mm, {int(mask.sum()):,} voxels", "gradients and streamlines, once")
    field_ = row.timed(lambda: field_of_dwi(fine))
    judge_axes(row, np.eye(3), field_)
    row.counts["alarm"] += row.timed(lambda: check_streamlines(tractogram, field_)).status == "wrong"
    row.seconds = [sum(row.seconds)]
    yield row
    sh = compute_sh(fine, 8)
    row = Row(f"2 mm, {int(mask.sum()):,} voxels", "45 coefficients, once")
    judge_axes(row, np.eye(3), row.timed(lambda: field_of_sh(sh)))
    yield row


def wheel() -> Iterator[Row]:
    files = Path(dipy.__file__).parent / "data" / "files"
    volume = Volume.load(files / "small_64D.nii")
    bvals, bvecs = np.loadtxt(files / "small_64D.bval").ravel(), np.loadtxt(files / "small_64D.bvec")
    bvecs = bvecs if bvecs.shape[1] == 3 else bvecs.T
    length = np.linalg.norm(bvecs, axis=1, keepdims=True)
    bvecs = np.where(length > 0, bvecs / np.where(length > 0, length, 1), 0)
    yield dwi_row("dipy small_64D", DWI(volume, bvals, bvecs, volume.data[..., 0] > 0))


def rows() -> Iterator[Row]:
    yield from phantoms()
    yield from wheel()
    if os.environ.get("TRACTKIT_DATA"):
        yield from real(Path(os.environ["TRACTKIT_DATA"]))


def table() -> str:
    """A Markdown table, with all in the last line."""
    heads = ["data", "what", "mistakes", "right", "undecided", "wrong", "alarms", "s"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every = list(rows())
    total = Row("all", "", sum((row.counts for row in every), Counter()), [max(max(row.seconds) for row in every)])
    lines = [heads, ["---"] * len(heads), *(row.cells() for row in [*every, total])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
