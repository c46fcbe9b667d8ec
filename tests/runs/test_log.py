"""The run log and the bounded curve."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tractkit.runs import log as runlog
from tractkit.runs.log import Curve, RunLog


def write(folder, steps, per_epoch=4):
    log = RunLog(folder)
    for step in range(1, steps + 1):
        epoch = (step - 1) // per_epoch
        log.append(
            "batch",
            epoch=epoch,
            batch=(step - 1) % per_epoch,
            step=step,
            loss=1 / step,
            n=step,
            time={"seconds": 0.5, "at": 1e9},
        )
        if step % per_epoch == 0:
            log.append("epoch", epoch=epoch, step=step, train_loss=1.0)
    return log


@given(
    st.integers(0, 23), st.integers(0, 23), st.integers(1, 200), st.binary(max_size=30).filter(lambda b: b"\n" not in b)
)
@settings(max_examples=80, deadline=None)
def test_truncating_equals_writing_less(tmp_path_factory, steps, kept, block, torn):
    a, b = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    kept = min(kept, steps)
    log, expected = write(a, steps), write(b, kept)
    with open(log.path, "ab") as f:
        f.write(torn)
    whole = runlog._lines_backwards
    try:
        runlog._lines_backwards = lambda path: whole(path, block)
        log.truncate(kept, kept // 4)
    finally:
        runlog._lines_backwards = whole
    assert (log.path.read_bytes() if log.path.exists() else b"") == (
        expected.path.read_bytes() if expected.path.exists() else b""
    )
    log.append("batch", epoch=9, batch=0, step=99, loss=0.0)
    assert log.records()[-1]["step"] == 99


def test_an_epoch_that_is_not_finished_in_the_checkpoint_goes(tmp_path):
    log = write(tmp_path, 8)
    assert log.truncate(8, 1) == 1
    assert len(log.epochs()["epoch"]) == 1 and log.batches()["step"][-1] == 8


def test_a_last_line_without_its_end_is_completed(tmp_path):
    log = write(tmp_path, 3)
    log.path.write_bytes(log.path.read_bytes()[:-1])
    log.truncate(3, 0)
    log.append("batch", epoch=0, step=4, loss=0.0)
    assert [r["step"] for r in log.records()] == [1, 2, 3, 4]


def test_truncating_reads_only_what_it_drops(tmp_path, monkeypatch):
    log = write(tmp_path, 3000)
    seen = []
    parse = runlog._parse
    monkeypatch.setattr(runlog, "_parse", lambda line: seen.append(1) or parse(line))
    log.truncate(2990, 747)
    assert len(seen) < 20


def test_numbers_that_are_no_json_numbers(tmp_path):
    log = RunLog(tmp_path)
    log.append("epoch", epoch=0, step=np.int64(3), valid_loss=float("nan"), train_loss=np.float32(0.5))
    log.append("epoch", epoch=1, step=4, extra=1)
    json.loads(log.path.read_text().splitlines()[0], parse_constant=pytest.fail)
    columns = log.epochs()
    assert np.isnan(columns["valid_loss"]).all() and columns["train_loss"][0] == 0.5 and np.isnan(columns["extra"][0])


def test_losses_of_an_epoch(tmp_path):
    log = write(tmp_path, 11)
    assert log.losses(1) == [1 / 5, 1 / 6, 1 / 7, 1 / 8]
    assert log.losses(2) == [1 / 9, 1 / 10, 1 / 11]
    assert RunLog(tmp_path / "none").losses(0) == []


@given(st.integers(0, 3000), st.sampled_from([4, 12, 64]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_curve_keeps_extremes_where_they_were_gaps_and_means(n, capacity, broken):
    values = np.sin(np.arange(n) / 50)
    values[n // 3::97] += 5
    if broken:
        values[n // 2:n // 2 + 40] = np.nan
    curve = Curve(capacity)
    for i, v in enumerate(values):
        curve.append(i, v)
    (x, y), (mean_x, mean_y), finite = curve.arrays(), curve.means(), np.flatnonzero(np.isfinite(values))
    assert len(x) <= 3 * capacity // 2 and np.all(np.diff(x) > 0)
    assert np.array_equal(y, values[x.astype(int)], equal_nan=True)  # each point where it was
    if len(finite):
        assert np.nanmax(y) == np.nanmax(values) and np.nanmin(y) == np.nanmin(values)
    assert np.isnan(y).any() == np.isnan(values).any()
    whole = finite[:len(mean_x) * curve.width].reshape(-1, curve.width)
    assert len(finite) - whole.size < curve.width and np.allclose(mean_y, values[whole].mean(1))
    assert np.allclose(mean_x, whole.mean(1))
    again = Curve()
    again.load_state_dict(json.loads(json.dumps(curve.state_dict())))
    for c in (curve, again):
        c.append(n, 7.0)
    assert json.dumps(again.state_dict()) == json.dumps(curve.state_dict())


def test_a_curve_of_before_goes_on_with_its_means():
    """What was saved before the extremes were: means only."""
    now, before = Curve(8), Curve(8)
    for i in range(37):
        now.append(i, i % 5)
    before.load_state_dict({k: v for k, v in now.state_dict().items() if k != "extremes"})
    assert [a.tolist() for a in before.arrays()] == [a.tolist() for a in now.means()]
    for i in range(37, 60):
        now.append(i, 9.0)
        before.append(i, 9.0)
    old = ("capacity", "width", "points", "open")
    assert {k: before.state_dict()[k] for k in old} == {k: now.state_dict()[k] for k in old}
    assert before.arrays()[1].max() == 9.0


def test_a_line_written_in_part_is_an_error(tmp_path):
    """What a disk that becomes full does: it takes some of the bytes, and raises nothing."""
    log = RunLog(tmp_path)
    log.append("batch", step=1)
    file = log._file

    class Full:
        def write(self, data):
            return file.write(data[:5])

        close = file.close

    log._file = Full()
    with pytest.raises(OSError, match="No space left on device"):
        log.append("batch", step=2)
    assert log.truncate(1, 0) == 1 and [r["step"] for r in log.records()] == [1]


@pytest.mark.parametrize("batches", [0, 3, 40_000])
def test_a_stretch_of_steps_is_read_without_the_rest(tmp_path, batches, monkeypatch):
    log = RunLog(tmp_path)
    lines = []
    for k in range(1, batches + 1):
        lines.append(json.dumps({"kind": "batch", "step": k, "epoch": k // 100, "loss": 1 / k}))
        if k % 100 == 0:
            lines.append(json.dumps({"kind": "epoch", "step": k, "epoch": k // 100 - 1, "valid_loss": 2 / k}))
            lines.append(json.dumps({"kind": "change", "step": k, "name": "x", "from": 1, "to": 2}))
    if lines:
        log.path.write_text("\n".join(lines) + "\n")
    assert log.between(1, 2) == [json.loads(line) for line in lines[:2]]
    read, since = [], RunLog.since
    monkeypatch.setattr(RunLog, "since", lambda self, at: (read.append(r) or r for r in since(self, at)))
    found = log.between(19_950, 20_050)
    wanted = [r for r in map(json.loads, lines) if r["kind"] != "change" and 19_950 <= r["step"] <= 20_050]
    assert found == wanted and len(read) < 2_000
    ending = [r for r in map(json.loads, lines[-3:]) if r["kind"] != "change" and r["step"] >= batches]
    assert log.between(batches, batches + 10) == ending
    assert log.between(0, 50_000) == []  # too long: the thinned curve is as good
