"""What objects show of themselves: text and HTML, names as they are, a bounded size, and nothing heavy read for it."""

import re
import warnings
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_training import fit
from torch import nn

from tractkit.core.html import Html, html_card, html_table, svg_bars
from tractkit.core.rng import uniform
from tractkit.data.batch import StreamlineBatch
from tractkit.data.dataset import MultiSubjectDataset, MultisubjectSubset, SubjectData
from tractkit.data.loader import BatchLoaderOneInput
from tractkit.data.sampler import BatchIDSampler
from tractkit.data.subject import MRIData, SFTData
from tractkit.evaluation.scoring import TextTable
from tractkit.models.base import TractographyModel, model_card
from tractkit.models.learn2track import Learn2Track
from tractkit.runs.log import RunLog, _read_end
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.training.state import TrainerState

NAME = "<b>x</b>"


class Untouched:
    """Points, voxels: whoever reads them has read too much."""

    def __call__(self, *_):
        raise AssertionError("this was read")

    __getattr__ = __array__ = __len__ = __iter__ = __call__


def subject(i: int) -> SubjectData:
    name, n = f"{NAME}{i}", 20 + i % 7
    counts = 2 + (uniform(i, np.arange(n)) * 60).astype(int)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    volume = MRIData(NAME, name, np.eye(4), (10, 11, 12, 15), ("f", i), Untouched())
    sft = SFTData(
        "streamlines",
        name,
        np.eye(4),
        (10, 11, 12),
        offsets,
        counts * 2.0,
        Untouched(),
        dps={NAME: np.zeros((n, 1))},
        groups={NAME: np.arange(3)},
    )
    return SubjectData(name, {NAME: volume}, {"streamlines": sft})


def dataset(n: int, monkeypatch) -> MultiSubjectDataset:
    """`n` subjects in training and in validation, without a file."""
    made = object.__new__(MultiSubjectDataset)
    subjects = [subject(i) for i in range(n)]
    made.__dict__ |= {
        "lazy": True,
        "step_size": None,
        "nb_points": None,
        "compress": None,
        "_arguments": {},
        "_file": SimpleNamespace(path=f"{NAME}.hdf5"),
        "_subsets": {
            k: MultisubjectSubset(k, s) for k, s in (("training", subjects), ("validation", subjects), ("testing", []))
        },
    }
    return made


class Mine(TractographyModel):
    """Of a person who calls a layer what they like."""

    def __init__(self, n=3):
        super().__init__(1.0, note=NAME)
        self.layers = nn.ModuleDict({f"{NAME}{i}": nn.Linear(4, 5, device="meta") for i in range(n)})


def batch() -> StreamlineBatch:
    points = torch.rand(90, 3, generator=torch.Generator().manual_seed(1)) * 9
    n, no = 10, torch.zeros(10, dtype=torch.int64)
    return StreamlineBatch(
        points,
        torch.arange(0, 91, 9),
        [NAME],
        [slice(0, n)],
        [slice(0, 90)],
        np.eye(4)[None],
        torch.arange(n),
        no,
        no.bool(),
        torch.zeros(n, 3),
        no.bool(),
        torch.ones(n, 3),
        dps={NAME: torch.zeros(n, 1)},
        operations=(NAME,),
    )


def log(folder, epochs=3) -> RunLog:
    made = RunLog(folder)
    for e in range(epochs):
        made.append("batch", epoch=e, batch=0, step=e + 1, loss=1.0)
        made.append("epoch", epoch=e, step=e + 1, train_loss=1 / (e + 1), valid_loss=None if e == 1 else 2 / (e + 1))
    made.close()
    return made


def state(_) -> TrainerState:
    made = TrainerState.create(nn.Linear(3, 2))
    made.finished = {"why": "", "by": "", "message": NAME}
    return made


OBJECTS = {
    "dataset": lambda tmp, mp: dataset(1000, mp),
    "subset": lambda tmp, mp: dataset(1000, mp).training_set,
    "subject": lambda tmp, mp: subject(0),
    "volume": lambda tmp, mp: subject(0).volumes[NAME],
    "streamlines of a subject": lambda tmp, mp: subject(0).streamlines["streamlines"],
    "sampler": lambda tmp, mp: BatchIDSampler(
        dataset(1000, mp),
        "streamlines",
        200,
        300,
        balance_weights={f"{NAME}{i}": 1 + i % 2 for i in range(1000)},
        balance="subject",
    ),
    "loader": lambda tmp, mp: BatchLoaderOneInput(
        dataset(1000, mp), Mine(), NAME, "streamlines", reverse_ratio=0.5, dps_keys=[NAME]
    ),
    "batch": lambda tmp, mp: batch(),
    "provenance": lambda tmp, mp: batch().provenance(),
    "model": lambda tmp, mp: Mine(),
    "state": lambda tmp, mp: state(tmp),
    "run log": lambda tmp, mp: log(tmp / "<b>x<b>"),
    "score table": lambda tmp, mp: TextTable(
        ("", NAME), tuple((f"{NAME}{i}", "1") for i in range(1000)), (NAME,), NAME
    ),
    "tractogram": lambda tmp, mp: Tractogram(
        Streamlines.from_list([np.zeros((2, 3))]), np.eye(4), (2, 2, 2), dps={NAME: np.zeros(1)}
    ),
}


class Page(HTMLParser):
    """The tags of a page, each closed where it should be."""

    void = ("rect", "circle", "polyline", "img", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open += [tag] * (tag not in self.void)

    def handle_endtag(self, tag):
        assert tag in self.void or self.open.pop() == tag


@pytest.mark.parametrize("what", OBJECTS)
def test_text_and_html_of_everything(what, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        thing = OBJECTS[what](tmp_path, monkeypatch)
        page, text = thing._repr_html_(), repr(thing)
    assert "object at 0x" not in text and "0x" not in page and text.strip()
    assert NAME not in page and "&lt;b&gt;x" in page
    parsed = Page(page)
    assert parsed.open == [] and "b" not in set(parsed.tags) - ({"b"} if what in ("dataset", "subset") else set())
    assert parsed.tags.count("b") == {"dataset": 3, "subset": 1}.get(what, 0)  # our own
    assert len(page) < 120_000
    assert len(text) < {"sampler": 40_000, "score table": 40_000, "provenance": 3_000, "loader": 3_000}.get(what, 8_000)
    assert not re.search(r"(?<![-\w])color:\s*(black|white|#000|#fff)", page)  # reads on light and on dark


def test_a_dataset_says_how_many_it_does_not_show(monkeypatch):
    few, many = dataset(3, monkeypatch), dataset(1000, monkeypatch)
    assert "more" not in few._repr_html_() and few._repr_html_().count("<details") == 3 + 2 * 3
    assert many._repr_html_().count("and 992 more") == 2 and repr(many).count("and 980 more") == 2
    total = sum(20 + i % 7 for i in range(1000))
    assert f"1,000 subjects, {total:,} streamlines" in many._repr_html_()
    few._subsets, few._names = None, {"training": [NAME], "validation": [], "testing": []}
    assert "load_data()" in few._repr_html_() and NAME not in few._repr_html_()


def test_a_sampler_shows_the_epoch_as_it_is_cut(monkeypatch):
    data = dataset(5, monkeypatch)
    sampler = BatchIDSampler(data, "streamlines", 25, 40)
    plan, counts = (
        sampler._make(0, "training"),
        np.concatenate([s.streamlines["streamlines"].nb_points for s in data.training_set]),
    )
    padded = sum(
        len(o := counts[plan.order[a:b]]) * o.max() for a, b in zip(plan.starts[:-1], plan.starts[1:], strict=True)
    )
    page = sampler._repr_html_()
    assert f">{len(plan)}<" in page and f">{len(counts)}<" in page and f">{1 - counts.sum() / padded:.0%}<" in page
    assert not sampler._plans and not sampler._warned  # looking leaves no trace
    bucketed = BatchIDSampler(data, "streamlines", 25, 40, bucket=True)._repr_html_()
    assert max(map(int, re.findall(r">(\d+)%<", bucketed))) < max(map(int, re.findall(r">(\d+)%<", page)))
    monkeypatch.setattr("tractkit.data.sampler._MOST", 10)
    assert "not cut yet" in sampler._repr_html_()
    data._subsets = None
    assert "cannot be cut" in sampler._repr_html_()


def test_a_model_shows_every_parameter_once():
    model = Learn2Track(15, rnn_layer_sizes=(10, 8), dropout=.1)
    page = model._repr_html_()
    shown = sum(int(n.replace(",", "")) for n in re.findall(r"nowrap\">([\d,]+)</td>", page))
    assert shown == sum(p.numel() for p in model.parameters()) and f"{shown:,}; " in page
    model.requires_grad_(False)
    assert f"of which {shown:,} are not trained" in model_card(model)
    assert "and 460 more" in model_card(Mine(500)) and len(model_card(Mine(500))) < 60_000


def test_a_log_is_looked_at_from_its_end(tmp_path):
    made = log(tmp_path / "run", 5)
    assert _read_end(made, 1)[0] == 5 and len(_read_end(made, 1)[1]) < 5
    assert repr(made) == "RunLog(run: 5 epochs, 5 steps)" and "<svg" in made._repr_html_()
    assert (
        repr(RunLog(tmp_path / "none")) == "RunLog(none: 0 epochs, 0 steps)"
        and "none yet" in RunLog(tmp_path / "none")._repr_html_()
    )
    with made.path.open("a") as f:
        f.write('{"kind": "change", "step": 5, "name": "x"}\n{"kind": "epo')
    assert "5 epochs, 5 steps" in repr(made)


def test_the_card_of_a_training(tmp_path):
    trainer = fit(tmp_path, tensorboard=False, max_epochs=2)
    page = trainer.train_and_validate()._repr_html_()
    assert Page(page).open == [] and page.count("<polyline") == 3 and "2 epochs done" in page


def test_small_things():
    assert html_table(("a",), []) == html_table(("a",), [], most=1)
    assert "right" in html_table((), [("x", "1")], align="lr") and "<thead" not in html_table((), [("x",)])
    assert html_card(Html("<i>t</i>")).count("<i>") == 1 and "&lt;i&gt;" in html_card("<i>t</i>")
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"/>', svg_bars([1, 1, 1, 9], "x", 60, 30, 2))]
    assert heights == [30, 10]
