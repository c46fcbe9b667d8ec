"""The three transformers: in tracking as in training, blind for the future, as dwi_ml's, resumed bit for bit."""

import ast
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_data import make_file
from helpers_training import same_states, streamline_trainer
from test_embeddings import LENGTHS, batch_of, track

from tractkit.models.attention import BatchPast, sinusoidal_table
from tractkit.models.base import load_model, model_class, save_model
from tractkit.models.direction_getters import DIRECTION_GETTERS
from tractkit.models.targets import unit
from tractkit.models.transformers import (
    DirectionTokens,
    OriginalTransformerModel,
    TransformerSrcAndTgtModel,
    TransformerSrcOnlyModel,
    arc_lengths,
)

BODIES = ("tts", "tto", "ttst")
FORMS = ("as_label", "zeros", "symmetric362", "symmetric642", "symmetric724", "repulsion100", "repulsion200",
         "repulsion724")
FEW = [4, 1, 23, 0, 40, 3]
OF_LENGTHS = pytest.mark.parametrize(
    "lengths", [FEW, pytest.param(LENGTHS, marks=pytest.mark.full)], ids=["few", "300"])


def small(body, **options):
    own = {"tts": {}, "tto": {"n_layers_d": 2}, "ttst": {"target_embedded_size": 8}}[body]
    size = {"input_embedded_size": 8 if body == "ttst" else 16} if "input_embedding_key" not in options else {}
    return model_class(body)(3, **({"nheads": 2, "n_layers_e": 2, "step_size": 0.5} | own | size | options))


@torch.no_grad()
def agrees(model, lengths=LENGTHS, nb_places=4, step=0.5):
    model = model.eval()
    inputs, batch = batch_of(lengths, step=step)
    wanted = model.direction_getter.answer(model(inputs, batch))
    np.testing.assert_allclose(track(model, inputs, batch, nb_places), wanted, atol=1e-4)


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
@pytest.mark.parametrize("body", BODIES)
def test_tracking_answers_as_training_does_while_places_are_refilled(body, positions):
    agrees(small(body, position_encoding=positions, norm_first=body == "tto", activation="gelu", nb_previous_dirs=2,
                 prev_dirs_embedding_key="nn_embedding", prev_dirs_embedded_size=4))


@OF_LENGTHS
@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("body", ["tto", "ttst"])
def test_so_it_does_with_every_form_of_the_start(body, form, positions, lengths):
    model = small(body, SOS_token_type=form, position_encoding=positions, n_layers_e=1)
    agrees(model, lengths, nb_places=3)
    inputs, batch = batch_of(FEW)
    turned = SimpleNamespace(**vars(batch) | {"previous": torch.where(batch.previous == 0, batch.points[0], 0)})
    before, after = (model(inputs, b).detach() for b in (batch, turned))
    assert not torch.allclose(before[0], after[0], atol=1e-4)  # whether the direction is known is seen, and which


@OF_LENGTHS
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("key", DIRECTION_GETTERS)
@pytest.mark.parametrize("body", BODIES)
def test_every_getter_trains_is_stored_and_tracks_as_it_was_trained(body, key, eos, lengths, tmp_path):
    model = small(body, dg_key=key, add_eos=eos, n_layers_e=1, dropout_rate=0.05)
    inputs, batch = batch_of(FEW, known=False)
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.01), []
    for _ in range(12):
        loss, n = model.compute_loss(model(inputs, batch), model.targets(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert n == (71 if eos else 66) and losses[-1] < losses[0] - 0.005
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.hyperparameters == model.hyperparameters
    assert torch.equal(again(inputs, batch), model.eval()(inputs, batch))
    agrees(again, lengths, nb_places=3)


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
@pytest.mark.parametrize("body", BODIES)
def test_the_future_is_not_seen_nor_a_neighbour(body, positions):
    model = small(body, position_encoding=positions, nb_previous_dirs=1, prev_dirs_embedding_key="nn_embedding",
                  prev_dirs_embedded_size=8, input_embedded_size=16).eval()
    inputs, batch = batch_of([9, 14, 5])
    inputs.requires_grad_()
    for t in (9, 15, 22):
        seen = torch.autograd.grad(model(inputs, batch)[t].square().sum(), inputs)[0].abs().sum(1).nonzero()[:, 0]
        assert seen.tolist() == list(range(9, t + 1))
    with torch.no_grad():
        before = model(inputs, batch)
        batch.points[16:] += 3  # the 8th point of the second, and what follows: the step to it is the 7th
        inputs[16:] -= 1
        after = model(inputs, batch)
        np.testing.assert_allclose(before[:16], after[:16], atol=1e-6)
        assert (before[16:] - after[16:]).abs().max(1).values.min() > 1e-5
        alone = SimpleNamespace(points=batch.points[9:23], offsets=torch.tensor([0, 14]),
                                **{k: getattr(batch, k)[1:2] for k in ("first_known", "previous", "voxel_sizes")})
        np.testing.assert_allclose(model(inputs[9:23], alone), after[9:23], atol=1e-5)


def test_positions_are_arc_lengths_and_hold_for_another_step():
    _, batch = batch_of([5, 0, 1, 8], step=0.7)
    wanted = np.concatenate([0.7 * np.arange(n) for n in (5, 0, 1, 8)])
    np.testing.assert_allclose(arc_lengths(batch), wanted, atol=1e-5)
    model = small("ttst", position_encoding="rotary").eval()
    model.set_step(2.0)
    agrees(model, FEW, nb_places=3, step=2.0)
    with pytest.raises(AssertionError):
        model.set_step(0.5)
        agrees(model, FEW, nb_places=3, step=2.0)
    free = small("tts", position_encoding="rotary", step_size=None).eval()
    with pytest.raises(ValueError, match="set_step"):
        free.step(torch.zeros(1, 3), torch.zeros(1, 3), free.init_state(1))


@pytest.mark.parametrize("body", BODIES)
def test_directions_in_voxels_are_brought_to_mm_in_tracking(body):
    model = small(body, convention="dwi_ml", dg_key="fisher-von-mises", nb_previous_dirs=1, nheads=1,
                  SOS_token_type="repulsion100") if body != "tts" else small(body, convention="dwi_ml", nheads=1,
                                                                             nb_previous_dirs=1)
    inputs, batch = batch_of(FEW, step=0.5)
    model.eval().set_step(0.5, batch.voxel_sizes[0])
    with torch.no_grad():
        wanted = model.to_voxmm(model.direction_getter.answer(model(inputs, batch)))
        np.testing.assert_allclose(track(model, inputs, batch, 2), wanted, atol=1e-4)


@pytest.mark.parametrize("body", BODIES)
def test_duplicate_points_one_point_and_nothing_are_finite(body):
    model = small(body, add_eos=True, position_encoding="rotary")
    for lengths in ([], [0], [1], [3, 0, 2]):
        inputs, batch = batch_of(lengths) if lengths else (
            torch.zeros(0, 3), SimpleNamespace(
                points=torch.zeros(0, 3), offsets=torch.tensor([0]), voxel_sizes=torch.zeros(0, 3),
                first_known=torch.zeros(0, dtype=torch.bool), previous=torch.zeros(0, 3)))
        batch.points[:] = 1.0
        model.zero_grad()
        outputs = model(inputs, batch)
        loss, _ = model.compute_loss(outputs, model.targets(batch))
        loss.backward()
        assert len(outputs) == len(inputs) and torch.isfinite(loss)
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_streamline_that_is_too_long_is_named_in_training_and_ends_in_tracking():
    model = small("tto", max_len=20).eval()
    inputs, batch = batch_of([3, 21, 20])
    with pytest.raises(ValueError, match=r"streamline 1 of the batch has 21 points.*20 \(max_len\).*max_len=21"):
        model(inputs, batch)
    batch.streamline_ids, batch.subject_of = torch.tensor([7, 812, 9]), lambda i: f"sub-{i}"
    with pytest.raises(ValueError, match="sub-1: streamline 812 has 21 points"):
        model(inputs, batch)
    state, previous = model.init_state(1), torch.zeros(1, 3)
    for t in range(22):
        direction, state = model.step(inputs[t:t + 1], previous, state)
        assert bool(direction.any()) == (t < 20)


@pytest.mark.parametrize(("options", "error", "text"), [
    (dict(input_embedded_size=15), ValueError, "2 heads cannot share it|2 heads cannot share"),
    (dict(input_embedded_size=6, position_encoding="rotary"), ValueError, "rotary positions turn pairs"),
    (dict(position_encoding="relational"), ValueError, "'sinusoidal' or 'rotary'"),
    (dict(activation="tanh"), ValueError, "'relu' or 'gelu'"),
    (dict(n_layers=3), TypeError, "did you mean n_layers_e"),
    (dict(max_len=0), ValueError, "max_len must be of at least 1"),
    (dict(dropout_rate=1.0), ValueError, "dropout_rate must be in"),
])
def test_settings_that_do_not_fit_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        small("tts", **options)


def test_settings_of_the_tokens_are_refused_where_they_do_not_fit():
    with pytest.raises(ValueError, match="did you mean symmetric724"):
        small("tto", SOS_token_type="symmetric742")
    with pytest.raises(ValueError, match="target_embedding_key='nn_embedding'"):
        small("tto", target_embedding_key="no_embedding")
    with pytest.raises(ValueError, match="a token has 4 numbers, not 7"):
        small("ttst", target_embedding_key="no_embedding", target_embedded_size=7)
    agrees(small("ttst", target_embedding_key="no_embedding", target_embedded_size=None), FEW)


@pytest.mark.parametrize("form", ["as_label", "repulsion100"])
def test_tokens_are_numbers_or_classes_and_classes_are_a_row_with_a_one(form):
    plain, embedded = DirectionTokens(form, "no_embedding"), DirectionTokens(form, "nn_embedding", 5)
    previous = torch.cat([torch.zeros(1, 3), unit(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))])
    rows = plain(previous)
    assert rows.shape == (10, 4 if form == "as_label" else 101) and rows[0].tolist() == [0] * (rows.shape[1] - 1) + [1]
    np.testing.assert_allclose(embedded(previous).detach(), embedded.embedding(rows).detach(), atol=1e-6)
    if form != "as_label":
        nearest = plain.vertices[rows[1:].argmax(1)]
        assert (nearest * previous[1:]).sum(1).min() > 0.9 and rows[1:].sum(1).eq(1).all()


@pytest.mark.real
def test_a_trained_transformer_of_dwi_ml_answers_alike(real_data):
    folder = real_data / "dwi_ml_sample"
    theirs = torch.load(folder / "tts_best_model" / "model_state.pkl", weights_only=True)
    p = json.loads((folder / "tts_best_model" / "parameters.json").read_text())
    seen = np.load(folder / "tts_expected.npz")
    names = ("step_size", "input_embedding_key", "input_embedded_size", "dg_key", "max_len", "n_layers_e",
             "dropout_rate", "activation", "nheads", "ffnn_hidden_size", "norm_first")
    model = model_class("tts")(p["nb_features"], **{name: p[name] for name in names}, add_eos=True).eval()
    own = model.state_dict()
    for mine, its in (("embedding.inputs.linear", "input_embedding_layer.linear"),
                      ("direction_getter.hidden", "direction_getter.layers.0"),
                      ("direction_getter.out", "direction_getter.layers.1")):
        own |= {f"{mine}.{w}": theirs[f"{its}.{w}"] for w in ("weight", "bias")}
    for i in range(p["n_layers_e"]):
        its, mine = f"modified_torch_transformer.layers.{i}.", f"encoder.{i}."
        own[mine + "attention.into.weight"] = torch.cat([theirs[its + f"self_attn.{x}_proj_weight"] for x in "qkv"])
        own[mine + "attention.into.bias"] = theirs[its + "self_attn.in_proj_bias"]
        for one, other in (("attention.out", "self_attn.out_proj"), ("feed_forward.hidden", "linear1"),
                           ("feed_forward.out", "linear2"), ("around_attention.norm", "norm1"),
                           ("around_feed_forward.norm", "norm2")):
            own |= {f"{mine}{one}.{w}": theirs[f"{its}{other}.{w}"] for w in ("weight", "bias")}
    model.load_state_dict(own)
    offsets, n = torch.tensor(np.cumsum([0, *seen["lengths"]])), len(seen["lengths"])
    batch = SimpleNamespace(points=torch.tensor(seen["points_vox_corner"]), offsets=offsets,
                            voxel_sizes=torch.ones(n, 3), previous=torch.zeros(n, 3),
                            first_known=torch.zeros(n, dtype=torch.bool))
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor(seen["inputs"]), batch), seen["outputs"], atol=1e-5)


def test_who_looks_at_whom():
    inputs, batch = batch_of([9])
    for body, names in (("tts", 2), ("tto", 6), ("ttst", 2)):
        model = small(body, position_encoding="rotary").eval()
        weights = model.attention_weights(inputs, batch)
        assert len(weights) == names == len(model.attentions) and all(w.shape == (2, 9, 9) for w in weights.values())
        for w in weights.values():
            np.testing.assert_allclose(w.sum(-1), 1, atol=1e-5)
            assert (w.triu(1) == 0).all() and (w.tril() > 0).any(-1).all()
    with pytest.raises(ValueError, match="one streamline at a time"):
        model.attention_weights(*batch_of([3, 3]))


def test_weights_and_dropout_come_from_seeds():
    one, two, other = (small("tto", seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    inputs, batch = batch_of(FEW)
    before = torch.get_rng_state()
    outputs = [model.train()(inputs, batch) for model in (one, two)]
    assert torch.equal(*outputs) and torch.equal(before, torch.get_rng_state())
    assert not torch.equal(outputs[0], one(inputs, batch))  # further on in its generator


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_file(tmp_path_factory.mktemp("data"), n=16, points=(4, 30))[0]


@pytest.mark.parametrize("body, key, eos", [
    each if each[1:] == ("fisher-von-mises", True) else pytest.param(*each, marks=pytest.mark.full)
    for each in itertools.product(BODIES, DIRECTION_GETTERS, (False, True))])
def test_stopped_at_a_batch_and_resumed_it_ends_in_the_same_bits(body, key, eos, data, tmp_path):
    def trainer(name):
        model = small(body, step_size=2.0, dg_key=key, add_eos=eos, dg_dropout=0.1, dropout_rate=0.2,
                      position_encoding="rotary" if eos else "sinusoidal")
        return streamline_trainer(data, tmp_path, name, model=model, max_epochs=1)

    whole = trainer("whole")
    whole.train_and_validate()
    cut = trainer("cut")
    cut.step(1)
    cut.stop(wait=True)
    assert cut.state.snapshot().global_step == 1 < whole.state.global_step
    again = trainer("cut")
    again.train_and_validate()
    assert same_states(again.state, whole.state) == []


@torch.no_grad()
def test_a_decoder_knows_where_its_tokens_are():
    """Against the layers, put together by hand."""
    model = small("tto").eval()
    inputs, batch = batch_of([7])
    past = BatchPast(batch.offsets)
    place = sinusoidal_table(7, 16)
    memory = torch.relu(model.embedding.inputs.linear(inputs)) + place
    for layer in model.encoder:
        memory = layer(memory, past)
    steps = unit(batch.points.diff(dim=0) * batch.voxel_sizes[0])
    tokens = torch.cat([torch.cat([batch.previous, steps]), torch.zeros(7, 1)], 1)
    rows = torch.relu(model.tokens.embedding.linear(tokens)) + place
    for layer in model.decoder:
        rows = layer(rows, memory, past)
    np.testing.assert_allclose(model(inputs, batch), model.direction_getter(rows), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("body", BODIES)
def test_the_memory_of_a_state_is_known_beforehand(body):
    model = small(body, max_len=64).eval()
    state = model.init_state(3)
    for _ in range(64):
        state = model.step(torch.zeros(3, 3), torch.zeros(3, 3), state)[1]
    assert sum(part.nbytes for part in state[3:]) == 3 * model.state_bytes(64) == 3 * model.state_bytes(900)


def test_a_training_on_streamlines_that_are_too_long_says_which_and_what_to_do(data, tmp_path):
    trainer = streamline_trainer(data, tmp_path, model=small("tts", step_size=None, max_len=10))
    with pytest.raises(ValueError, match=r"sub-\w+: streamline \d+ has \d\d points.*max_len=\d\d or more"):
        trainer.train_and_validate()


def test_the_code_of_a_run_builds_its_model(data, tmp_path):
    from tractkit.lab.settings_code import code_of_settings

    trainer = streamline_trainer(data, tmp_path, model=small("ttst", step_size=2.0, position_encoding="rotary"))
    code = code_of_settings(trainer.config())
    assert "from tractkit.models.transformers import TransformerSrcAndTgtModel" in code
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)
             and getattr(node.func, "id", "") == "TransformerSrcAndTgtModel"]
    given = {k.arg: ast.literal_eval(k.value) for k in found[0].keywords}
    first = [ast.literal_eval(a) for a in found[0].args]
    assert model_class("ttst")(*first, **given).hyperparameters == trainer.model.hyperparameters
    assert "nheads" in given and "max_len" not in given  # what is the default is left out


@pytest.mark.parametrize("cls", [TransformerSrcOnlyModel, OriginalTransformerModel, TransformerSrcAndTgtModel])
def test_settings_that_are_missing_are_told_by_the_name_of_the_class(cls):
    with pytest.raises(TypeError, match=rf"^{cls.__name__}.__init__\(\) missing .* 'nb_features'"):
        cls()
