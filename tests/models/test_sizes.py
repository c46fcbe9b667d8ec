"""Sizes and rates of models are checked like all settings: in our words, and whole numbers of any kind are taken."""

import json

import numpy as np
import pytest
import torch

from tractkit.models.direction_getters import CosineRegression
from tractkit.models.layers import KeyedDropout, StackedRNN
from tractkit.models.learn2track import Learn2Track

SMALL = dict(nb_features=3, rnn_layer_sizes=[4])
AROUND = dict(neighborhood_type="axes", neighborhood_radius=1, neighborhood_resolution=1)


@pytest.mark.parametrize(("given", "message"), [
    (dict(nb_features=-1), "nb_features must be of at least 1, not -1"),
    (dict(nb_features=0), "nb_features must be of at least 1, not 0"),
    (dict(nb_features="12"), "nb_features must be a whole number of at least 1, not '12'"),
    (dict(nb_features=None), "nb_features must be a whole number of at least 1, not None"),
    (dict(nb_features=np.inf), "nb_features must be a whole number of at least 1, not inf"),
    (dict(rnn_layer_sizes=100), r"rnn_layer_sizes must be a list with the size of each layer.*, not 100"),
    (dict(rnn_layer_sizes="100"), "rnn_layer_sizes must be a list with the size of each layer.*, not '100'"),
    (dict(rnn_layer_sizes=[]), r"rnn_layer_sizes must be a list with the size of each layer.*, not \[\]"),
    (dict(rnn_layer_sizes=[4, 0]), "each of rnn_layer_sizes must be of at least 1, not 0"),
    (dict(rnn_layer_sizes=[2.5]), "each of rnn_layer_sizes must be a whole number of at least 1, not 2.5"),
    (dict(rnn_layer_sizes=["a"]), "each of rnn_layer_sizes must be a whole number of at least 1, not 'a'"),
    (dict(use_skip_connection="yes"), "use_skip_connection must be True or False, not 'yes'"),
    (dict(step_size=None, nb_points=5.5), "nb_points must be a whole number of at least 1, not 5.5"),
    (AROUND | dict(neighborhood_radius="a"), "neighborhood_radius must be a whole number of at least 1, not 'a'"),
    (AROUND | dict(neighborhood_radius=-1), "neighborhood_radius must be of at least 1, not -1"),
    (AROUND | dict(neighborhood_resolution="a"), "neighborhood_resolution must be a positive number, not 'a'"),
])
def test_a_setting_of_a_model_that_is_none_is_refused_in_our_words(given, message):
    with pytest.raises(ValueError, match=message):
        Learn2Track(**SMALL | given)


def test_parts_of_models_check_their_sizes_too():
    for make, message in (
        (lambda: StackedRNN(-1, [4]), "input_size must be of at least 1, not -1"),
        (lambda: StackedRNN(3, [4, "5"]), "each of layer_sizes must be a whole number of at least 1, not '5'"),
        (lambda: CosineRegression("8"), "input_size must be a whole number of at least 1, not '8'"),
        (lambda: CosineRegression(8, dropout="a"), r"dropout must be in \[0, 1\), not 'a'"),
        (lambda: KeyedDropout(None), r"dropout must be in \[0, 1\), not None"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_whole_numbers_of_any_kind_are_taken_and_kept_as_plain_ones():
    whole = dict(nb_previous_dirs=1, seed=2, **AROUND)
    other = dict(nb_previous_dirs=1.0, seed=np.float64(2), **AROUND | dict(neighborhood_radius=1.0))
    one = Learn2Track(3, "lstm", (4, 5), **whole)
    two = Learn2Track(np.int64(3), "lstm", np.array([4.0, 5.0]), **other)
    assert json.dumps(one.hyperparameters) == json.dumps(two.hyperparameters)
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    assert Learn2Track(3.0, "lstm", [4]).hyperparameters["nb_features"] == 3
