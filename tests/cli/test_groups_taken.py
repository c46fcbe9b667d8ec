"""`tractkit train data.hdf5`: groups that are the only ones are taken, the others are asked for together."""

import h5py
import pytest
from helpers_data import make_file

from tractkit.cli.commands import parser
from tractkit.cli.train import config_of_options
from tractkit.core.files import DataError
from tractkit.training.config import check_run_config


@pytest.fixture(params=[False, True], ids=["one file", "a file per subject"])
def data(request, tmp_path):
    return make_file(tmp_path, 2, 5, points=(4, 9), one_file_per_subject=request.param)[0]


def config_of(*words):
    return config_of_options(parser("train").parse_args(["train", *map(str, words)]))[0]


def test_the_only_groups_are_taken_and_said(data, capsys):
    config = config_of(data)
    assert config["loader"] == {"streamline_group_name": "streamlines", "input_group_name": "input"}
    assert config["sampler"] == {"streamline_group_name": "streamlines"}
    assert "streamlines 'streamlines', volume 'input'" in capsys.readouterr().out
    check_run_config(config)
    assert config_of(data, "--input-group-name", "mine")["loader"]["input_group_name"] == "mine"
    config_of(data, "--input-group-name", "mine", "--streamline-group-name", "own")
    assert "own" not in capsys.readouterr().out  # what was given is not said


def test_all_that_must_be_chosen_is_asked_for_together(tmp_path):
    data = make_file(tmp_path, 1, 5, points=(4, 9))[0]
    with h5py.File(data, "r+") as h5:
        for name in ("input", "streamlines"):
            h5.copy(f"sub-0/{name}", f"sub-0/{name}_2")
    with pytest.raises(DataError) as e:
        config_of(data)
    for words in ("--streamline-group-name", "streamlines, streamlines_2", "--input-group-name", "input, input_2"):
        assert words in str(e.value)
    with pytest.raises(DataError, match="the volume groups input, input_2") as e:
        config_of(data, "--streamline-group-name", "streamlines")
    assert "--streamline" not in str(e.value)
    with pytest.raises(DataError) as e:  # a config of one's own: all that it lacks
        check_run_config({"data": {"path": str(data)}})
    for words in ("sampler.streamline_group_name", "loader.streamline_group_name", "loader.input_group_name"):
        assert f"{words} is missing" in str(e.value)
