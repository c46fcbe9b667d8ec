"""The filter by latent distance: against brute force, on the phantom, and what it says of wrong input; its picture."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from tractkit.core.files import DataError
from tractkit.dwi.phantom import sample_subjects
from tractkit.evaluation.filtering import (
    LatentFilter,
    best_threshold,
    latent_distances,
    plot_latent,
    principal_axes,
)
from tractkit.models.autoencoder import Autoencoder, equal_points
from tractkit.spatial.tractogram import Tractogram
from tractkit.viz.theme import DARK


@pytest.fixture(scope="module")
def phantom():
    """Streamlines of the bundles of a subject, in two halves."""
    t = Tractogram.load(sample_subjects(1, progress=False) / "sub-01" / "tractogram.trk")
    number = t.dps["bundle"][:, 0]
    halves = [{f"bundle {k:.0f}": [*t[np.flatnonzero(number == k)[start::2]].rasmm()] for k in np.unique(number)}
              for start in (0, 1)]
    return t, *halves


@pytest.fixture(scope="module")
def model(phantom):
    """Trained for a few epochs."""
    made = Autoencoder(nb_points=32, latent_size=8, layer_sizes=(16, 32, 32), seed=1)
    lines, g = torch.from_numpy(equal_points(phantom[0], 32)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(made.parameters(), 3e-3)
    for _ in range(4):
        for ids in torch.randperm(len(lines), generator=g).split(32):
            some = lines[ids] + 2 * torch.randn(len(ids), 1, 3, generator=g)
            optimizer.zero_grad()
            made.compute_loss(made.rebuild(some), some)[0].backward()
            optimizer.step()
    return made


def joined(a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray]:
    """The first half of one streamline and the second of another."""
    return [np.concatenate([x[: len(x) // 2], y[len(y) // 2:]]) for x, y in zip(a, b, strict=True)]


def test_distances_are_those_of_all_pairs(model, phantom):
    _, references, others = phantom
    lines = [line for some in others.values() for line in some[:3]]
    found = latent_distances(model, lines, references)
    z = model.embed(lines).astype(float)
    wanted = np.stack([np.linalg.norm(z[:, None] - model.embed(some).astype(float), axis=2).min(1)
                       for some in references.values()], axis=1)
    assert found.shape == (21, 7) and found.dtype == np.float32 and np.allclose(found, wanted, rtol=1e-5)
    backwards = latent_distances(model, [line[::-1] for line in lines], references)
    assert np.allclose(found, backwards, atol=1e-4)
    assert latent_distances(model, [], references).shape == (0, 7)


def test_the_threshold_is_the_best_of_all():
    r = np.random.default_rng(0)
    for good, bad in ((r.normal(0, 1, 80), r.normal(1, 1, 60)), (np.r_[1.0, 2, 2, 3], np.r_[2.0, 3, 4])):
        point = best_threshold(good, bad)
        both = np.unique(np.r_[good, bad])
        best = max((good <= t).mean() + (bad > t).mean() for t in np.r_[both, both + 1e-9])
        assert point.kept + point.rejected == pytest.approx(best)
        shares = (good <= point.threshold).mean(), (bad > point.threshold).mean()
        assert (point.kept, point.rejected) == pytest.approx(shares)
        assert point.auc == pytest.approx((good[:, None] < bad).mean() + (good[:, None] == bad).mean() / 2)
    apart = best_threshold([1, 2], [6, 8])
    assert (apart.threshold, apart.kept, apart.rejected, apart.auc) == (4, 1, 1, 1)
    with pytest.raises(ValueError, match="examples of both kinds, here are 1 plausible and 0"):
        best_threshold([1.0], [])


def test_on_the_phantom_it_keeps_bundles_and_leaves_out_what_changes_over(model, phantom):
    _, references, others = phantom
    known, unseen = ({name: some[start::2] for name, some in others.items()} for start in (0, 1))
    names = [*others]
    wrong = [line for a, b in zip(names, names[1:] + names[:1], strict=True) for line in joined(others[a], others[b])]
    for choice in (LatentFilter.fit(model, references, known, wrong[::2]), LatentFilter.fit(model, references, known)):
        good = [choice.apply(unseen[name]) for name in names]
        assert np.mean([r.kept.mean() for r in good]) > .9
        assert all((r.bundle[r.kept] == name).mean() > .9 for r, name in zip(good, names, strict=True))
        bad = choice.apply(wrong[1::2])
        assert (~bad.kept).mean() > .9 and set(bad.bundle[~bad.kept]) == {""}
        assert np.array_equal(bad.kept, bad.nearness <= 1)
    q = LatentFilter.fit(model, references, known, quantile=.5)
    share = [(latent_distances(model, known[n], {n: references[n]})[:, 0] <= q.thresholds[n]).mean() for n in names]
    assert np.allclose(share, .5, atol=.05)
    empty = q.apply([])
    assert len(empty.kept) == 0 and empty.distances.shape == (0, 7) and repr(empty) == "0 of 0 streamlines kept"


def test_what_a_filter_needs(model, phantom):
    _, references, others = phantom
    for wrong, message in ((dict(references={}), "at least one reference bundle"), (dict(quantile=0), "quantile"),
                           (dict(plausible={}), "bundle 0.*no plausible streamlines|no plausible"),
                           (dict(references={"empty": []}), "empty.*no streamlines|no streamlines")):
        with pytest.raises(ValueError, match=message):
            LatentFilter.fit(model, **{"references": references, "plausible": others, **wrong})
    with pytest.raises(DataError, match="fewer than two points"):
        LatentFilter.fit(model, references, others).apply([np.zeros((1, 3))])


def test_principal_axes_are_those_of_the_covariance():
    x = np.random.default_rng(0).normal(size=(200, 5)) * [5, 1, 3, .5, .1]
    mean, axes, shares = principal_axes(x)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    assert np.allclose(mean, x.mean(0)) and np.allclose(np.abs(axes @ vectors[:, [-1, -2]]), np.eye(2), atol=1e-6)
    assert np.allclose(shares, values[[-1, -2]] / values.sum())
    assert (axes[np.arange(2), np.abs(axes).argmax(1)] > 0).all()
    mean, axes, shares = principal_axes(np.ones((1, 1)))  # one point, one number
    assert axes.shape == (2, 1) and shares.tolist() == [0, 0]


def _contrast(a, b) -> float:
    def light(color):
        c = np.array(to_rgb(color))
        return np.where(c <= .04045, c / 12.92, ((c + .055) / 1.055) ** 2.4) @ [.2126, .7152, .0722]

    low, high = sorted((light(a), light(b)))
    return (high + .05) / (low + .05)


def test_the_picture_has_each_bundle_in_its_color_and_text_that_can_be_read():
    r = np.random.default_rng(0)
    latent = {f"b{k}": r.normal(3 * k, 1, (30 + k, 6)) for k in range(7)}
    figure = plot_latent(latent, r.normal(size=(9, 6)), others_name="not valid")
    ax = figure.axes[0]
    assert [len(part.get_offsets()) for part in ax.collections] == [9, *range(30, 37)]
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert texts == ["not valid (9)", *(f"b{k} ({30 + k})" for k in range(7))]
    colors = [tuple(part.get_facecolor()[0][:3]) for part in ax.collections]
    assert len(set(colors)) == 8 and all(_contrast(c, DARK) > 3 for c in colors)
    words = [*ax.get_legend().get_texts(), ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels()]
    assert all(_contrast(t.get_color(), DARK) > 4.5 for t in words)
    assert "% of the variance" in ax.get_xlabel()
    mean, axes, _ = principal_axes(np.concatenate([*latent.values()]))
    assert np.allclose(ax.collections[1].get_offsets(), (latent["b0"] - mean) @ axes.T)
    pixels, bound = figure.array(), ax.get_legend().get_window_extent()
    assert pixels.shape[:2] == (520, 800) and bound.x1 <= 800 and bound.y0 >= 0
    for names in ([f"Association_SuperiorLongitudinalFasciculusR_{k}" for k in range(40)], ["a", "b"]):
        figure = plot_latent({name: r.normal(size=(12_345, 4)) for name in names})
        figure.array()
        ax, bound = figure.axes[0], figure.axes[0].get_legend().get_window_extent()
        assert bound.x0 > ax.bbox.x1 and bound.x1 <= 800 and bound.y0 >= 0 and ax.bbox.width > 300
        assert ax.yaxis.label.get_window_extent().x0 >= 0  # left of numbers of any length
    assert "… and 22 more" in [t.get_text() for t in plot_latent({str(k): r.normal(size=(3, 4)) for k in range(40)})
                               .axes[0].get_legend().get_texts()]
    with pytest.raises(ValueError, match="no bundle has a streamline"):
        plot_latent({"a": np.zeros((0, 6))})
    for given in ([np.zeros((5, 3))], "a.trk"):
        with pytest.raises(TypeError, match="a: this is drawn from arrays .* as model.embed"):
            plot_latent({"a": given})


def test_tick_labels_of_any_length_leave_room_for_the_label():
    for scale in (.02, 1e3, 1e-4):
        latent = scale * np.random.default_rng(0).normal(size=(50, 4))
        figure = plot_latent({"a long name of a bundle, the left one": latent})
        figure.array()
        ax = figure.axes[0]
        assert ax.yaxis.label.get_window_extent().x0 >= 4 and ax.get_legend().get_window_extent().x1 <= 800
