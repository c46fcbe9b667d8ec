"""Curves, tables and correlations of runs."""

import csv
import math

import numpy as np
import pytest
from helpers_training import fit
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr

from tractkit.core.rng import normal
from tractkit.runs.curves import correlation, plot_correlation, plot_runs, read_run, smooth, write_csv
from tractkit.runs.log import RunLog


def pretend(folder, scale=1.0, epochs=5, n=30, **more):
    log, noise = RunLog(folder), normal(3, np.arange(epochs * n))
    for step in range(1, epochs * n + 1):
        epoch, value = (step - 1) // n, scale * float(np.exp(-step / 40) + .1 + .02 * noise[step - 1])
        log.append(
            "batch",
            epoch=epoch,
            batch=(step - 1) % n,
            step=step,
            loss=value,
            grad_norm=value,
            learning_rate=0.01,
            time={"seconds": 2.0},
        )
        if step % n == 0:
            log.append(
                "epoch",
                epoch=epoch,
                step=step,
                train_loss=value,
                valid_loss=value * 1.1 + 0.001 * epoch**2,
                **more,
                time={"training": 2.0 * step, "validation": 6.0 * (epoch + 1)},
            )
    log.close()
    return folder


@given(st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(np.nan)), max_size=40), st.sampled_from([0.0, 0.3, 0.9, 0.999]))
@settings(max_examples=60, deadline=None)
def test_smoothing_is_a_weighted_mean_of_what_is_there(values, weight):
    values = np.array(values, float)
    found = smooth(values, weight)
    for i in range(len(values)):
        past = values[:i + 1]
        weights = np.where(np.isfinite(past), weight ** np.arange(i, -1, -1.0), 0.0)
        if weights.sum() == 0:
            assert np.isnan(found[i]) or not np.isfinite(past).any() or weight == 0
        else:
            assert np.isclose(found[i], (weights * np.nan_to_num(past)).sum() / weights.sum(), rtol=1e-6, atol=1e-6)


def test_smoothing_refuses_other_weights():
    for weight in (1.0, -0.1, 2):
        with pytest.raises(ValueError, match="weight must be"):
            smooth([1], weight)


def test_where_records_are(tmp_path):
    run = read_run(pretend(tmp_path / "a"))
    assert run.along("batch", "step")[[0, -1]].tolist() == [1, 150]
    assert np.allclose(run.along("batch", "epoch"), np.arange(1, 151) / 30) and run.along(
        "epoch", "epoch"
    ).tolist() == [1, 2, 3, 4, 5]
    assert np.allclose(run.along("epoch", "hours"), np.arange(1, 6) * 60 / 3600)
    assert np.allclose(run.find("training_minutes")[1], 1.0) and np.allclose(run.find("validation_minutes")[1], 0.1)
    RunLog(tmp_path / "a").truncate(75, 2)
    assert np.allclose(read_run(tmp_path / "a").along("batch", "epoch"), np.arange(1, 76) / 30)  # beyond the last epoch
    RunLog(tmp_path / "a").truncate(20, 0)
    assert np.isnan(read_run(tmp_path / "a").along("batch", "epoch")).all()  # no epoch yet


def test_a_real_run_and_its_arrays_in_the_manner_of_dwi_ml(tmp_path):
    trainer = fit(tmp_path, npy_logs=True)
    trainer.train_and_validate()
    run = read_run(trainer)
    assert run.name == "run" and run.find("valid_loss")[1].tolist() == trainer.state.history["valid_loss"].tolist()
    trainer.log.path.unlink()
    old = read_run(trainer.folder, "old")
    assert old.find("train_loss")[1].tolist() == run.find("train_loss")[1].tolist()
    assert old.along("epoch", "epoch").tolist() == [1, 2, 3]
    plot_runs([run, old], {"loss": "train_loss"}, x="epoch").array()


def overlaps(figure):
    """Texts that cover a graph's inside, each other, or the edge of the picture."""
    figure.array()
    renderer = figure.canvas.get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in figure.texts]
    wrong = [
        f"{name} is not inside"
        for name, b in boxes
        if b.x0 < 0 or b.y0 < 0 or b.x1 > figure.bbox.x1 or b.y1 > figure.bbox.y1
    ]
    wrong += [f"{name} covers a graph" for name, b in boxes for ax in figure.axes if b.overlaps(ax.bbox)]
    wrong += [f"{a} covers {b}" for i, (a, x) in enumerate(boxes) for b, y in boxes[:i] if x.overlaps(y)]
    return wrong + [f"text inside of {ax}" for ax in figure.axes if ax.texts or ax.get_legend()]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("many", [1, 2, 4])
def test_nothing_covers_a_curve(tmp_path, many, dark):
    runs = [pretend(tmp_path / f"run {i}", 1 + i) for i in range(many)]
    for x in ("step", "epoch", "hours"):
        figure = plot_runs(runs, x=x, dark=dark)
        assert overlaps(figure) == [] and len(figure.axes) == 4
    assert overlaps(plot_correlation(runs, "train_loss", "valid_loss", fit=2, dark=dark)) == []
    picture = figure.array()[..., :3].astype(float)
    paper = picture[0, 0]
    assert (paper.mean() < 40) == dark and np.abs(picture - paper).max() > 100  # readable


def test_scales_limits_and_the_best(tmp_path):
    run = pretend(tmp_path / "a")
    loss, norm, rate, minutes = plot_runs(run).axes
    assert (loss.get_yscale(), norm.get_yscale(), rate.get_yscale(), minutes.get_yscale()) == (
        "log",
        "log",
        "linear",
        "linear",
    )
    valid = read_run(run).find("valid_loss")[1]
    ring = [line for line in loss.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    assert ring[0].get_ydata()[0] == valid.min() and ring[0].get_xdata()[0] == 30 * (valid.argmin() + 1)
    figure = plot_runs(
        run,
        {"l": ("train_loss", "valid_loss"), "g": "valid_loss - train_loss"},
        x="epoch",
        xlim=(0, 9),
        ylims={"l": (0.01, 5)},
        log={"l": False},
    )
    assert (
        figure.axes[0].get_xlim() == (0, 9)
        and figure.axes[0].get_ylim() == (0.01, 5)
        and figure.axes[0].get_yscale() == "linear"
    )
    (_, spike), = [(0, RunLog(tmp_path / "a"))]
    spike.append("batch", epoch=5, batch=0, step=151, loss=1e6, grad_norm=1e6, learning_rate=.01, time={"seconds": 2.0})
    assert plot_runs(run).axes[0].get_ylim()[1] > 1e6 > 10 > plot_runs(run, remove_outliers=True).axes[0].get_ylim()[1]


def test_values_that_are_zero_missing_or_not_finite(tmp_path):
    log = RunLog(tmp_path / "odd")
    for step in range(1, 6):
        log.append("batch", epoch=0, batch=step, step=step, loss=float("nan") if step == 2 else 0.0, time={})
    plot_runs(tmp_path / "odd").array()
    with pytest.raises(KeyError, match="odd has no valid_loss; it has batch/loss"):
        plot_runs(tmp_path / "odd", {"loss": "valid_loss"})
    plot_runs([tmp_path / "odd", pretend(tmp_path / "b")], {"loss": "valid_loss"}, allow_missing=True).array()
    RunLog(tmp_path / "new").append("epoch", epoch=0, step=1, train_loss=1.0, time={})
    plot_runs(tmp_path / "new").array()
    with pytest.raises(ValueError, match="the same name"):
        plot_runs([pretend(tmp_path / "x/b"), pretend(tmp_path / "y/b")])


def test_a_long_run_shows_its_spikes_its_rates_and_where_numbers_ended(tmp_path):
    log = RunLog(tmp_path / "long")
    for step in range(1, 9_001):
        loss = 40.0 if step == 4_321 else math.nan if 6_000 <= step < 6_500 else 0.5
        log.append("batch", epoch=0, batch=step, step=step, loss=loss, learning_rate=1000 if step > 4_500 else 0.01)
    loss, rate = plot_runs(tmp_path / "long", {"loss": "batch/loss", "rate": "batch/learning_rate"}).axes
    raw = loss.lines[0]
    assert raw.get_xdata()[np.nanargmax(raw.get_ydata())] == 4_321 and np.nanmax(raw.get_ydata()) == 40
    assert all(np.isnan(line.get_ydata()).any() for line in loss.lines[:2])  # a gap, in the smoothed line, too
    assert [line.get_xdata().tolist() for line in loss.lines if line.get_marker() == "x"] == [[6_000]]
    steps, = [line for line in rate.lines if len(line.get_xdata()) > 1]
    assert steps.get_drawstyle() == "steps-post" and set(steps.get_ydata()) == {0.01, 1000}


def test_a_table_says_what_the_log_says(tmp_path):
    a, b = pretend(tmp_path / "a"), pretend(tmp_path / "b", 2, dice=0.5)
    write_csv({"first": a, "b": b}, tmp_path / "runs.csv")
    rows = list(csv.DictReader(open(tmp_path / "runs.csv", encoding="utf-8")))
    assert len(rows) == 10 and {r["run"] for r in rows} == {"first", "b"}
    assert [r["dice"] for r in rows] == [""] * 5 + ["0.5"] * 5
    assert np.allclose([float(r["valid_loss"]) for r in rows[:5]], read_run(a).find("valid_loss")[1], rtol=1e-9)
    write_csv(a, tmp_path / "batches.csv", "batch")
    assert len((tmp_path / "batches.csv").read_text().splitlines()) == 151


def test_correlation_is_pearsons(tmp_path):
    a, b = pretend(tmp_path / "a"), pretend(tmp_path / "b", 3)
    found = correlation([a, b], "batch/loss", "batch/grad_norm")
    assert np.isclose(found["a"], 1) and np.isclose(found["all"], 1)
    x, y = (np.concatenate([read_run(r).find(m)[1][1:] for r in (a, b)]) for m in ("train_loss", "valid_loss"))
    assert np.isclose(correlation([a, b], "train_loss", "valid_loss", ignore_first=1)["all"], pearsonr(x, y)[0])
    assert np.isnan(correlation(a, "batch/learning_rate", "batch/loss")["a"])
    with pytest.raises(KeyError, match="of each epoch"):
        correlation(a, "train_loss", "batch/loss")
