"""The default demo on phantom subjects that nobody trained or chose on: 12 subjects train, 2 validate, sub-15 and
sub-16
test. For each seed of training and each test subject: this model beside DIPY's deterministic tracking, from the same
fODF, seeds, mask and length limits, DIPY with its best settings on a validation subject. About 10 minutes a seed on two
cores; the environment variable TRACTKIT_SEEDS chooses the seeds (default: 0,1,2)."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tractkit.demo.pipeline import run_demo
from tractkit.demo.results import Demo
from tractkit.demo.settings import demo_settings
from tractkit.evaluation.scoring import Scores

TESTING = ("sub-15", "sub-16")
MODEL, DIPY, SHUFFLED = "this model", "DIPY deterministic CSD", "this model, signal shuffled"
CONTROL, REPEAT = "the same model, input set to zero", "repeating the previous direction"


@dataclass(frozen=True)
class Outcome:
    """What one training came to on one subject."""

    seed: int
    subject: str
    scores: dict[str, Scores]  # who tracked -> scores
    losses: dict[str, float]   # of the validation subjects

    def shortcomings(self) -> list[str]:
        """Which of the project's promises this does not keep, each in words."""
        model, dipy, shuffled = self.scores[MODEL], self.scores[DIPY], self.scores[SHUFFLED]
        mine = self.losses[MODEL]
        kept = {
            f"all bundles found: {model.bundles_found} of {len(model.bundles)}": model.bundles_found
            == len(model.bundles)
            == 7,
            f"valid share above DIPY's: {model.share('valid'):.3f}, {dipy.share('valid'):.3f}": model.share("valid")
            > dipy.share("valid"),
            f"invalid connections below DIPY's: {model.share('invalid_connections'):.3f}, "
            f"{dipy.share('invalid_connections'):.3f}": model.share(
                "invalid_connections"
            )
            < dipy.share("invalid_connections"),
            f"with the signal shuffled, valid share below DIPY's: {shuffled.share('valid'):.3f}, "
            f"{dipy.share('valid'):.3f}": shuffled.share(
                "valid"
            )
            < dipy.share("valid"),
            f"loss below that of repeating the previous direction: {mine:.4f}, {self.losses[REPEAT]:.4f}": mine
            < self.losses[REPEAT],
            f"loss 10 % below that of the control: {mine:.4f}, {self.losses[CONTROL]:.4f}": mine
            <= 0.9 * self.losses[CONTROL],
        }
        return [f"seed {self.seed}, {self.subject}: not {promise}" for promise, holds in kept.items() if not holds]

    def cells(self) -> list[str]:
        shares = [
            f"{100 * self.scores[who].share(kind):.1f}"
            for kind in ("valid", "invalid_connections")
            for who in (MODEL, DIPY)
        ]
        found = [f"{s.bundles_found} of {len(s.bundles)}" for s in (self.scores[MODEL], self.scores[DIPY])]
        shuffled = f"{100 * self.scores[SHUFFLED].share('valid'):.1f}"
        losses = [f"{self.losses[who]:.4f}" for who in (MODEL, CONTROL, REPEAT)]
        return [
            str(self.seed),
            self.subject,
            *shares,
            *found,
            shuffled,
            *losses,
            "no" if self.shortcomings() else "yes",
        ]


HEADINGS = [
    "seed",
    "subject",
    "valid %, model",
    "valid %, DIPY",
    "invalid %, model",
    "invalid %, DIPY",
    "bundles, model",
    "bundles, DIPY",
    "valid %, shuffled",
    "loss, model",
    "loss, control",
    "loss, repeating",
    "promises kept",
]


def chosen_seeds(default: str) -> list[int]:
    """The seeds named by TRACTKIT_SEEDS, as in 0,1,2."""
    return [int(seed) for seed in os.environ.get("TRACTKIT_SEEDS", default).split(",")]


def train(seed: int, folder: str | Path, **changes) -> Demo:
    """The default demo, with two test subjects; `changes` are of its settings. A finished one is reused."""
    return run_demo(folder, settings=replace(demo_settings(seed=seed), testing=TESTING, **changes), html=False)


def outcomes(demo: Demo) -> list[Outcome]:
    """One for each test subject."""
    return [
        Outcome(demo.settings.seed, each.subject()[0].name, each.scores(), demo.losses["validation"])
        for each in demo.tests
    ]


def as_table(rows: Sequence[Outcome]) -> str:
    """A Markdown table."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _all_seeds() -> Iterator[Outcome]:
    for seed in chosen_seeds("0,1,2"):
        with tempfile.TemporaryDirectory() as folder:
            yield from outcomes(train(seed, folder))


def table() -> str:
    """Everything, as Markdown. What falls short is listed under it."""
    rows = list(_all_seeds())
    return "\n\n".join([as_table(rows), *(text for row in rows for text in row.shortcomings())])
