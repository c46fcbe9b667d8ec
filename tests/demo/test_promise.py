"""What the project promises of the default demo, on subjects that nobody trained or chose on.

TRACTKIT_SEEDS=0,1,2 tries several trainings; one is what the time of a full run allows."""

import pytest

from benchmarks.bench_phantom import CONTROL, MODEL, TESTING, Outcome, as_table, chosen_seeds, outcomes, train
from tractkit.evaluation.scoring import BundleScores, Scores

pytestmark = pytest.mark.filterwarnings("ignore:The legacy descoteaux07:PendingDeprecationWarning")


@pytest.mark.full
@pytest.mark.parametrize("seed", chosen_seeds("0"))
def test_the_default_demo_keeps_its_promises(seed, tmp_path, capsys):
    demo = train(seed, tmp_path / "demo")
    assert not {t.split()[0] for t in (*demo.settings.training, *demo.settings.validation)} & set(TESTING)
    rows = outcomes(demo)
    with capsys.disabled():
        print(f"\n{as_table(rows)}")
    assert [row.subject for row in rows] == list(TESTING)
    assert rows[0].scores != rows[1].scores
    assert [text for row in rows for text in row.shortcomings()] == []


def scores(valid, invalid, found=7):
    bundles = {str(k): BundleScores(100, k < found, 0.9, 0.1, 0.9) for k in range(7)}
    return Scores(1000, valid, invalid, 1000 - valid - invalid, 0, bundles)


GOOD = dict(
    model=scores(900, 50), dipy=scores(600, 300), shuffled=scores(100, 100), mine=0.008, control=0.009, repeat=0.0085
)


@pytest.mark.parametrize("change, words", [
    ({}, None),
    ({"model": scores(900, 50, found=6)}, "all bundles found: 6 of 7"),
    ({"model": scores(600, 50)}, "valid share above"),
    ({"model": scores(700, 300)}, "invalid connections below"),
    ({"shuffled": scores(600, 100)}, "shuffled"),
    ({"mine": 0.0085, "control": 0.01}, "repeating"),
    ({"mine": 0.0082}, "10 % below"),
])
def test_a_broken_promise_is_noticed(change, words):
    v = GOOD | change
    outcome = Outcome(
        0,
        "sub-15",
        {MODEL: v["model"], "DIPY deterministic CSD": v["dipy"], "this model, signal shuffled": v["shuffled"]},
        {MODEL: v["mine"], CONTROL: v["control"], "repeating the previous direction": v["repeat"]},
    )
    short = outcome.shortcomings()
    assert len(short) == (words is not None) and all(words in text for text in short)
    assert outcome.cells()[-1] == ("no" if words else "yes")
