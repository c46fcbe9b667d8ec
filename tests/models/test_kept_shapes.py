"""oneDNN keeps what it compiled for few shapes of blocks: the memory of a training does not climb, its bits stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tractkit.models.layers import StackedRNN

NAME = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
SHAPES = """
import torch
from torch import nn
{before}
{made}
total = 0.0
def step(n):
    out = rnn(torch.ones(5, n, 3))[0]
    out.square().sum().backward()
    return repr(out.sum().item())
values = [step(n) for n in range(1, 60)]
print("AGAIN", flush=True)
values += [step(1)]
print("VALUES", *values, rnn.get_parameter(next(iter(dict(rnn.named_parameters())))).grad.sum().item())
"""
OURS = """
from tractkit.models.layers import StackedRNN, initialize_weights
rnn = StackedRNN(3, (4,))
initialize_weights(rnn, 0)
"""
LSTM = """
import sys, tempfile
from tractkit.models.layers import initialize_weights
sys.path.insert(0, "tests")
from helpers_training import Fit, Points

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.rnn = nn.Linear(1, 1), nn.LSTM(3, 4)
    def forward(self, x):
        return self.linear(x)

model = Own()
Fit(model, tempfile.mkdtemp(), "run", Points(), Points(), max_epochs=1, progress=False).train_and_validate()
rnn = model.rnn
initialize_weights(rnn, 0)
"""


def run_shapes(made: str, before: str = "", **environment: str) -> tuple[bool, str]:
    """Whether the first of 60 shapes was compiled again, and the values that were computed."""
    clean = {k: v for k, v in os.environ.items() if k != NAME}
    code = SHAPES.format(made=made, before=before)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).resolve().parents[2],
                         env=clean | {"ONEDNN_VERBOSE": "profile_create", "OMP_NUM_THREADS": "1"} | environment).stdout
    again, values = out.split("AGAIN\n")[1].split("VALUES")
    return "create:cache_miss,cpu,rnn" in again, values


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@needs_onednn
def test_few_shapes_are_kept():
    assert run_shapes(OURS)[0]


@needs_onednn
@pytest.mark.full
def test_the_bits_are_those_of_many_kept_shapes():
    dropped, values = run_shapes(OURS)
    again, same = run_shapes(OURS, **{NAME: "1024"})  # a bound that the user has set stays
    assert dropped and not again and values == same


@needs_onednn
@pytest.mark.full
def test_it_holds_where_torch_was_imported_and_not_where_it_has_computed():
    assert run_shapes(OURS, before="import tractkit")[0]
    assert not run_shapes(OURS, before="nn.LSTM(3, 4)(torch.ones(2, 2, 3))")[0]


@needs_onednn
@pytest.mark.full
def test_it_holds_for_a_model_of_ones_own_once_a_training_begins():
    assert run_shapes(LSTM)[0]


def test_models_without_an_lstm_leave_the_environment_alone(monkeypatch):
    monkeypatch.delenv(NAME, raising=False)
    StackedRNN(3, (4,), rnn_key="gru")
    assert NAME not in os.environ
    nn.LSTM(3, 4)
    StackedRNN(3, (4,))
    assert os.environ.pop(NAME) == "32"
