"""Models that dwi_ml trained: the two of the sample give what dwi_ml said; others, what plain formulas give."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dipy.data import get_sphere
from torch import nn
from torch.nn.functional import linear

import tractkit as tk
from tractkit.core.files import DataError
from tractkit.models.attention import sinusoidal_table
from tractkit.models.base import load_model, save_model
from tractkit.models.dwi_ml_import import import_dwi_ml_model
from tractkit.models.targets import unit
from tractkit.spatial.volume import Volume

SETTINGS = {
    "experiment_name": "x", "step_size": 1.0, "compress_lines": None, "nb_points": None, "nb_features": 3,
    "input_embedding_key": "no_embedding", "input_embedded_size": None, "kernel_size": None, "nb_cnn_filters": None,
    "neighborhood_type": None, "neighborhood_radius": None, "neighborhood_resolution": None,
    "dg_key": "cosine-regression", "dg_args": {"dropout": 0.0, "add_eos": False, "eos_weight": 1.0},
    "nb_previous_dirs": 0, "prev_dirs_embedding_key": None, "prev_dirs_embedded_size": None,
    "normalize_prev_dirs": False, "rnn_key": "lstm", "rnn_layer_sizes": [6, 4], "dropout": 0.0,
    "use_skip_connection": False, "use_layer_normalization": False}


def write(folder: Path, weights: dict[str, torch.Tensor], kind="Learn2TrackModel", **settings) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model_type.txt").write_text(kind)
    (folder / "parameters.json").write_text(json.dumps(SETTINGS | settings))
    torch.save(weights, folder / "model_state.pkl")
    return folder


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def recurrent(input_size: int, sizes=(6, 4)) -> dict[str, torch.Tensor]:
    layers = [nn.LSTM(a, b) for a, b in zip([input_size, *sizes], sizes, strict=False)]
    return {f"rnn_model.rnn_{i}.{name}": numbers(*value.shape, seed=i) * 0.5
            for i, layer in enumerate(layers) for name, value in layer.named_parameters()}


def two_layers(name: str, nb_outputs: int, input_size=4) -> dict[str, torch.Tensor]:
    half = input_size // 2
    shapes = {"0.weight": (half, input_size), "0.bias": (half,),
              "1.weight": (nb_outputs, half), "1.bias": (nb_outputs,)}
    return {f"direction_getter.{name}.{key}": numbers(*shape, seed=len(name)) for key, shape in shapes.items()}


def plain(weights, x: torch.Tensor, stack="layers") -> torch.Tensor:
    """What the numbers of a direction getter are for one streamline, (n, inputs), by a plain way through the layers."""
    for i in range(2):
        own = {k.removeprefix(f"rnn_model.rnn_{i}."): v for k, v in weights.items() if f"rnn_{i}." in k}
        rnn = nn.LSTM(own["weight_ih_l0"].shape[1], own["weight_hh_l0"].shape[1])
        rnn.load_state_dict(own)
        x = rnn(x[:, None])[0][:, 0]
        x = torch.relu(x) if i == 0 else x
    w = {k.removeprefix(f"direction_getter.{stack}."): v for k, v in weights.items()}
    return linear(torch.relu(linear(x, w["0.weight"], w["0.bias"])), w["1.weight"], w["1.bias"])


def one_line(n=12, seed=1):
    """A batch of one streamline, of which nothing is known before."""
    points = numbers(n, 3, seed=seed).cumsum(0)
    return type("Batch", (), dict(points=points, offsets=torch.tensor([0, n]), voxel_sizes=torch.full((1, 3), 2.0),
                                  first_known=torch.tensor([True]), previous=torch.zeros(1, 3)))


# -- the sample

def sample_batch(dataset, model, said):
    """The streamlines of the sample, at the points that dwi_ml had: it rounds the number of points down."""
    loader = tk.BatchLoaderOneInput(dataset, model, "input", "streamlines", known_start_ratio=0.0)
    subject, ends = dataset.validation_set[0].name, np.cumsum(said["lengths"])
    batch = loader.load_batch_streamlines([(subject, said["streamline_ids"])], training=False)
    points, offsets = torch.from_numpy(said["points_vox_corner"]) - 0.5, torch.from_numpy(np.append(0, ends))
    return dataclasses.replace(batch, points=points, offsets=offsets, point_ranges=[slice(0, int(ends[-1]))],
                               first_known=torch.ones(len(ends), dtype=torch.bool)), loader


@pytest.mark.real
@torch.no_grad()
def test_learn2track_of_the_sample_answers_as_in_dwi_ml(real_data):
    folder = real_data / "dwi_ml_sample"
    model, said = import_dwi_ml_model(folder / "l2t_best_model"), np.load(folder / "l2t_expected.npz")
    dataset = tk.MultiSubjectDataset(folder / "data.hdf5").load_data()
    batch, loader = sample_batch(dataset, model, said)
    ends = np.cumsum(said["lengths"])
    inputs = loader.load_batch_inputs(batch, batch)
    kept = np.delete(np.arange(ends[-1]), ends - 1)
    np.testing.assert_allclose(inputs[kept], said["inputs"], atol=1e-5)
    outputs = model(inputs, batch)
    np.testing.assert_allclose(outputs[kept], said["outputs"], atol=1e-5)
    loss, n = model.compute_loss(outputs, model.targets(batch))
    assert n == said["n"] and abs(float(loss) - said["loss"]) < 1e-5
    straight = tk.BatchLoaderOneInput(dataset, None, "input", "streamlines")
    assert np.abs(straight.load_batch_inputs(batch, batch)[kept].numpy() - said["inputs"]).max() > 1e-3  # half a voxel


@pytest.mark.real
@torch.no_grad()
def test_the_transformer_of_the_sample_answers_as_in_dwi_ml(real_data):
    folder = real_data / "dwi_ml_sample"
    model, said = import_dwi_ml_model(folder / "tts_best_model"), np.load(folder / "tts_expected.npz")
    dataset = tk.MultiSubjectDataset(folder / "data.hdf5").load_data()
    batch, loader = sample_batch(dataset, model, said)
    inputs = loader.load_batch_inputs(batch, batch)
    np.testing.assert_allclose(inputs, said["inputs"], atol=1e-5)
    outputs = model(inputs, batch)
    np.testing.assert_allclose(outputs, said["outputs"], atol=1e-5)
    loss, n = model.compute_loss(outputs, model.targets(batch))
    assert n == said["n"] and abs(float(loss) - said["loss"]) < 1e-5
    first, state = slice(0, int(said["lengths"][0])), model.init_state(1)
    model.set_step(0.5, [2.0, 2.0, 2.0])
    wanted = model.direction_getter.answer(outputs[first], eos_stop=1.0)
    model.direction_getter.eos_stop = 1.0
    for row, answer in zip(inputs[first], wanted, strict=True):
        step, state = model.step(row[None], torch.zeros(1, 3), state)
        np.testing.assert_allclose(step[0], answer, atol=1e-4)
    with pytest.raises(DataError, match="max_len"):
        import_dwi_ml_model(folder / "tts_best_model")(inputs[:1].expand(121, -1), one_line(121))


# -- what dwi_ml can write besides

GETTERS = {"cosine-regression": 3, "l2-regression": 3, "cosine-plus-l2-regression": 3, "cos-plus-l2-regression": 3,
           "sphere-classification": 724, "smooth-sphere-classification": 724}


def of_transformer(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of torch's layers by the names that dwi_ml gives them: queries, keys and values have one each."""
    found = {}
    for name, value in module.state_dict().items():
        if name.endswith("in_proj_weight"):
            start = name.removesuffix("in_proj_weight")
            found |= {f"{start}{k}_proj_weight": part.clone() for k, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            found[name] = value
    return {f"modified_torch_transformer.{name}": value for name, value in found.items()}


def tokens_of(points: torch.Tensor, kind: str) -> torch.Tensor:
    """What dwi_ml reads of the directions so far: steps in voxels with a label, or a one for the nearest class."""
    steps = points[1:] - points[:-1]
    if kind == "as_label":
        return torch.cat([torch.tensor([[0.0, 0, 0, 1]]), nn.functional.pad(steps, (0, 1))])
    vertices = torch.tensor(get_sphere(name=kind).vertices, dtype=torch.float32)
    nearest = nn.functional.normalize(steps) @ vertices.T
    classes = torch.cat([torch.tensor([len(vertices)]), nearest.argmax(-1)])
    return nn.functional.one_hot(classes, len(vertices) + 1).float()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("token", ["as_label", "repulsion100"])
@pytest.mark.parametrize("kind", ["OriginalTransformerModel", "TransformerSrcAndTgtModel"])
@torch.no_grad()
def test_transformers_with_targets_answer_as_torchs_layers_put_together_as_in_dwi_ml(kind, token, norm_first, tmp_path):
    batch, x, of_input, of_target = one_line(), numbers(12, 5), nn.Linear(5, 8), nn.Linear(
        4 if token == "as_label" else 101, 8 if kind[0] == "O" else 4)
    size, tokens = 8 if kind[0] == "O" else 12, tokens_of(batch.points, token)
    options = dict(dim_feedforward=6, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(size, 2, **options), 2, enable_nested_tensor=False)
    weights = {f"input_embedding_layer.linear.{k}": v for k, v in of_input.state_dict().items()}
    weights |= {f"embedding_layer_t.linear.{k}": v for k, v in of_target.state_dict().items()}
    weights["position_encoding_layer.pos_emb"] = sinusoidal_table(40, size)[None]
    mask, positions = nn.Transformer.generate_square_subsequent_mask(12), sinusoidal_table(40, size)[:12]
    rows, targets = torch.relu(of_input(x)), torch.relu(of_target(tokens))
    more = {"n_layers_d": 1} if kind[0] == "O" else {"target_embedded_size": 4}
    if kind[0] == "O":
        decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(size, 2, **options), 1)
        weights |= of_transformer(nn.ModuleDict({"encoder": encoder, "decoder": decoder}))
        memory = encoder((rows + positions)[None], mask=mask)
        rows = decoder((targets + positions)[None], memory, tgt_mask=mask, memory_mask=mask)[0]
    else:
        weights |= of_transformer(encoder)
        rows = encoder((torch.cat([rows, targets], 1) + positions)[None], mask=mask)[0]
    weights |= two_layers("layers", 3, size)
    w = {k.removeprefix("direction_getter.layers."): v for k, v in weights.items()}
    wanted = linear(torch.relu(linear(rows, w["0.weight"], w["0.bias"])), w["1.weight"], w["1.bias"])
    of_recurrent = "rnn", "use", "dropout", "nb_prev", "norm", "prev"
    settings = {k: v for k, v in SETTINGS.items() if not k.startswith(of_recurrent)}
    settings |= dict(nb_features=5, input_embedding_key="nn_embedding", input_embedded_size=8, max_len=40, n_layers_e=2,
                     positional_encoding_key="sinusoidal", dropout_rate=0.1, activation="gelu", nheads=2,
                     ffnn_hidden_size=6, norm_first=norm_first, sos_token_type=token,
                     target_embedding_key="nn_embedding", start_from_copy_prev=False, **more)
    (folder := tmp_path / "best_model").mkdir()
    (folder / "model_type.txt").write_text(kind)
    (folder / "parameters.json").write_text(json.dumps(settings))
    torch.save(weights, folder / "model_state.pkl")
    model = import_dwi_ml_model(folder)
    np.testing.assert_allclose(model(x, batch), wanted, atol=1e-5)
    (folder / "parameters.json").write_text(json.dumps(settings | {"start_from_copy_prev": True}))
    with pytest.raises(DataError, match="start_from_copy_prev is on"):
        import_dwi_ml_model(folder)


@pytest.mark.parametrize("skip, norm", [(True, False), (False, True), (True, True)])
@torch.no_grad()
def test_recurrent_layers_are_joined_as_in_dwi_ml(skip, norm, tmp_path):
    """Layer, norm, ReLU between layers; a joined one reads the input again, and all are read in the end."""
    x, sizes = numbers(12, 3), (6, 4)
    layers = nn.ModuleList([nn.LSTM(3, 6), nn.LSTM(9 if skip else 6, 4)])
    norms = nn.ModuleList([nn.LayerNorm(size) for size in sizes])
    for i, n in enumerate(norms):
        n.weight.copy_(numbers(sizes[i], seed=i))
        n.bias.copy_(numbers(sizes[i], seed=i + 5))
    weights = {f"rnn_model.rnn_{i}.{k}": v for i, one in enumerate(layers) for k, v in one.state_dict().items()}
    if norm:
        weights |= {f"rnn_model.layer_norm_{i}.{k}": v for i, n in enumerate(norms) for k, v in n.state_dict().items()}
    y, outputs = x, []
    for i, (layer, n) in enumerate(zip(layers, norms, strict=True)):
        y = layer(y[:, None])[0][:, 0]
        y = n(y) if norm else y
        y = torch.relu(y) if i == 0 else y
        outputs.append(y)
        y = torch.cat([y, x], 1) if skip and i == 0 else y
    y = torch.cat(outputs, 1) if skip else y
    weights |= two_layers("layers", 3, y.shape[1])
    w = {k.removeprefix("direction_getter.layers."): v for k, v in weights.items()}
    wanted = linear(torch.relu(linear(y, w["0.weight"], w["0.bias"])), w["1.weight"], w["1.bias"])
    folder = write(tmp_path / "best_model", weights, use_skip_connection=skip, use_layer_normalization=norm)
    np.testing.assert_allclose(import_dwi_ml_model(folder)(x, one_line()), wanted, atol=1e-5)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("key", GETTERS)
@torch.no_grad()
def test_getters_of_one_stack(key, eos, tmp_path):
    weights = recurrent(3) | two_layers("layers", GETTERS[key] + eos)
    more = {} if "sphere" in key else {"normalize_targets": 1.0, "normalize_outputs": None}
    folder = write(tmp_path, weights, dg_key=key, dg_args={"dropout": 0.1, "add_eos": eos, "eos_weight": 1.0} | more)
    model, x, batch = import_dwi_ml_model(folder), numbers(12, 3), one_line()
    np.testing.assert_allclose(model(x, batch), plain(weights, x), atol=1e-5)
    save_model(model, tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    assert torch.equal(again(x, batch), model(x, batch)) and again.input_shift == 0.5
    assert again.direction_getter.add_eos is eos


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("key, part, size", [("gaussian", "sigmas", 3), ("fisher-von-mises", "kappa", 1)])
@torch.no_grad()
def test_getters_of_several_stacks(key, part, size, eos, tmp_path):
    weights = recurrent(3) | two_layers(f"layers_{part}", size) | two_layers("layers_mean", 3)
    weights |= two_layers("eos_layers", 1) if eos else {}
    folder = write(tmp_path, weights, dg_key=key, dg_args={"dropout": 0.0, "add_eos": eos, "eos_weight": 1.0})
    model, x, batch = import_dwi_ml_model(folder), numbers(12, 3), one_line()
    outputs, getter = model(x, batch), model.direction_getter
    mean, width = plain(weights, x, "layers_mean"), plain(weights, x, f"layers_{part}")
    directions = unit(numbers(12, 3, seed=5))
    if key == "gaussian":
        wanted = torch.distributions.MultivariateNormal(mean, torch.diag_embed(width.exp() ** 2)).log_prob(directions)
    else:
        kappa, cosine = 20 * width[:, 0].sigmoid(), (directions * mean / mean.norm(dim=1, keepdim=True)).sum(1)
        wanted = kappa * cosine + torch.log(kappa / (2 * np.pi * (kappa.exp() - (-kappa).exp())))
    np.testing.assert_allclose(getter.log_prob(outputs, directions), wanted, rtol=1e-4, atol=1e-4)
    if eos:
        np.testing.assert_allclose(getter.eos_probability(outputs), plain(weights, x, "eos_layers")[:, 0].sigmoid(),
                                   atol=1e-6)


@pytest.mark.parametrize("settings", [
    dict(compress_lines=0.02, step_size=None), dict(nb_points=20, step_size=None),
    dict(compress_lines=False), dict(dg_args=None), dict(dg_args={"normalize_targets": True}),
    dict(prev_dirs_embedding_key="no_embedding", prev_dirs_embedded_size=0), dict(kernel_size=3, nb_cnn_filters=4),
    dict(input_embedding_size=None)])
def test_settings_in_every_form(settings, tmp_path):
    model = import_dwi_ml_model(write(tmp_path, recurrent(3) | two_layers("layers", 3), **settings))
    for name in ("compress", "nb_points", "step_size"):
        assert getattr(model, name) == (
            (SETTINGS | settings)[{"compress": "compress_lines"}.get(name, name)] or None)
    if settings.get("dg_args"):
        assert model.hyperparameters["normalize_targets"] == 1.0


@torch.no_grad()
def test_embeddings_are_read(tmp_path):
    weights = {"input_embedding_layer.cnn_layers.0.weight": numbers(5, 3, 2, 2, 2),
               "input_embedding_layer.cnn_layers.0.bias": numbers(5),
               "prev_dirs_embedding.linear.weight": numbers(7, 6), "prev_dirs_embedding.linear.bias": numbers(7)}
    weights |= recurrent(5 * 8 + 7) | two_layers("layers", 3)
    model = import_dwi_ml_model(write(
        tmp_path, weights, input_embedding_key="cnn_embedding", nb_cnn_filters=[5], kernel_size=[2], nb_previous_dirs=2,
        neighborhood_type="grid", neighborhood_radius=1, neighborhood_resolution=0.5, normalize_prev_dirs=True,
        prev_dirs_embedding_key="nn_embedding", prev_dirs_embedded_size=7))
    x, batch = numbers(12, 81), one_line()
    directions = batch.points[1:] - batch.points[:-1]
    directions = torch.cat([torch.zeros(2, 3), directions / directions.norm(dim=1, keepdim=True)])
    past = torch.cat([directions[1:], directions[:-1]], 1)
    past = torch.relu(linear(past, *(weights[f"prev_dirs_embedding.linear.{k}"] for k in ("weight", "bias"))))
    cube = x.view(12, 27, 3)[:, [*range(1, 14), 0, *range(14, 27)]].transpose(1, 2).reshape(12, 3, 3, 3, 3)
    kernel = [weights[f"input_embedding_layer.cnn_layers.0.{k}"] for k in ("weight", "bias")]
    seen = torch.relu(nn.functional.conv3d(cube, *kernel)).flatten(1)
    np.testing.assert_allclose(model(x, batch), plain(weights, torch.cat([seen, past], 1)), atol=1e-4)


def test_the_tracker_reads_half_a_voxel_off(tmp_path):
    """Each voxel holds its x; a model that writes down what it sees."""
    model = import_dwi_ml_model(write(tmp_path, recurrent(3) | two_layers("layers", 3)))
    x = np.arange(30, dtype=np.float32)[:, None, None, None] * np.ones((1, 30, 30, 3), np.float32)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    tracker = tk.Tracker(model, Volume(x, affine), Volume(np.ones((30, 30, 30), bool), affine), min_length=0)
    seen = tracker._ground.features(torch.tensor([[10.0, 4, 4], [10.25, 4, 4]]))
    np.testing.assert_allclose(seen[:, 0], [10.5, 10.75], atol=1e-5)
    assert tracker._model.tracked_voxels == (2.0, 2.0, 2.0)
    tracker.track(np.array([[10.0, 15, 15]]), progress=False)
    assert tracker.report.nb_seeds == 1


# -- what is refused

class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def broken(name):
    def change(folder: Path):
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
    return change


def with_settings(**settings):
    def change(folder: Path):
        write(folder, recurrent(3) | two_layers("layers", 3), **settings)
    return change


@pytest.mark.parametrize("change, text, file", [
    (lambda f: (f / "model_type.txt").write_text("ModelAE"),
     "is a 'ModelAE'.*Give the folder of a Learn2TrackModel or a TransformerSrcOnlyModel",
     "model_type.txt"),
    (lambda f: (f / "model_type.txt").write_text("CopyPrevDirModel"), "CopyPrevDirModel", "model_type.txt"),
    (lambda f: (f / "model_type.txt").unlink(), "no model_type.txt.*best_model", ""),
    (broken("parameters.json"), "cannot be read", "parameters.json"),
    (broken("model_state.pkl"), "cannot be read as weights", "model_state.pkl"),
    (lambda f: torch.save([1], f / "model_state.pkl"), "no weights by name", "model_state.pkl"),
    (with_settings(curl=3), r"curl \(3\)", "parameters.json"),
    (with_settings(dg_args={"width": 3}), r"dg_args width", "parameters.json"),
    (with_settings(nb_features=None), "nb_features is missing", "parameters.json"),
    (with_settings(rnn_layer_sizes=[6, 5]), "do not fit parameters.json", "model_state.pkl"),
    (with_settings(use_skip_connection=True), "do not fit parameters.json", "model_state.pkl"),
    (with_settings(dg_key="gaussian-mixture"), "cannot train", "parameters.json"),
    (with_settings(rnn_key="rnn"), "rnn_key", "parameters.json"),
    (lambda f: torch.save(recurrent(3) | {"spin.weight": numbers(2)} | two_layers("layers", 3), f / "model_state.pkl"),
     "not known: spin.weight", "model_state.pkl"),
    (lambda f: torch.save(recurrent(3), f / "model_state.pkl"), "direction getter", "model_state.pkl"),
])
def test_a_model_of_another_kind_is_one_clear_error(change, text, file, tmp_path):
    folder = write(tmp_path / "best_model", recurrent(3) | two_layers("layers", 3))
    import_dwi_ml_model(tmp_path)  # as it is, from the folder of the experiment
    change(folder)
    with pytest.raises(DataError, match=text) as error:
        import_dwi_ml_model(folder)
    assert str(folder / file) in str(error.value) and error.value.fix


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["model_type.txt", "parameters.json", "model_state.pkl"])
@pytest.mark.parametrize("content, text", [
    (LFS, "a pointer of Git LFS"), (b"\n<!DOCTYPE html><html></html>", "a web page"), (b"", "empty"),
    (b"\xff\xfe", "cut or damaged")])
def test_a_damaged_file_is_told_in_words_of_its_own(name, content, text, tmp_path):
    folder = write(tmp_path / "best_model", recurrent(3) | two_layers("layers", 3))
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: cannot be read as \w+: it is {text}") as error:
        import_dwi_ml_model(folder)
    assert error.value.fix == "Copy the folder again" and error.value.__cause__ is error.value.__context__ is None


def test_a_short_file_of_weights_and_odd_options_are_told(tmp_path):
    folder = write(tmp_path / "a", recurrent(3) | two_layers("layers", 3), dg_args=3)
    with pytest.raises(DataError, match="dg_args must be options by name, not 3"):
        import_dwi_ml_model(folder)
    (folder / "model_state.pkl").write_bytes(b"abc")
    said = "cannot be read as weights: it is cut or damaged, or holds something else. Copy the folder again"
    with pytest.raises(DataError, match=said):
        import_dwi_ml_model(folder)


def test_a_folder_of_the_other_kind_is_told_with_what_reads_it(tmp_path):
    with pytest.raises(DataError, match="none: does not exist"):
        import_dwi_ml_model(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: is a file, not a folder"):
        import_dwi_ml_model(tmp_path / "file")
    theirs = write(tmp_path / "best_model", recurrent(3) | two_layers("layers", 3))
    for folder in (theirs, tmp_path):
        with pytest.raises(DataError, match="one of dwi_ml: tractkit.models.dwi_ml_import.import") as error:
            load_model(folder)
        assert repr(str(folder)) in str(error.value)
    ours = tmp_path / "run" / "best_model"
    save_model(import_dwi_ml_model(theirs), ours)
    for folder in (ours, ours.parent):
        with pytest.raises(DataError, match="this is a model of tractkit. Read it with tk.load_model") as error:
            import_dwi_ml_model(folder)
        assert repr(str(ours)) in str(error.value)


def test_no_code_of_a_file_is_run(tmp_path):
    folder = write(tmp_path / "best_model", {})
    torch.save({"a": Runs(str(tmp_path / "made"))}, folder / "model_state.pkl")
    with pytest.raises(DataError, match="cannot be read as weights"):
        import_dwi_ml_model(folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.real
@pytest.mark.parametrize("settings, text, file", [
    (dict(positional_encoding_key="relational"), "relational", "parameters.json"),
    (dict(max_len=121), "not the sinusoidal ones", "model_state.pkl"),
    (dict(n_layers_e=3), "encoder.2", "model_state.pkl"),
    (dict(ffnn_hidden_size=None), "do not fit", "model_state.pkl"),
    (dict(nheads=3), "3 heads", "parameters.json"),
    (dict(curl=3), r"curl \(3\)", "parameters.json"),
])
def test_a_transformer_whose_files_do_not_fit_is_refused(settings, text, file, real_data, tmp_path):
    own = real_data / "dwi_ml_sample" / "tts_best_model"
    for name in ("model_type.txt", "model_state.pkl"):
        shutil.copy(own / name, tmp_path / name)
    (tmp_path / "parameters.json").write_text(json.dumps(json.loads((own / "parameters.json").read_text()) | settings))
    with pytest.raises(DataError, match=text) as error:
        import_dwi_ml_model(tmp_path)
    assert str(tmp_path / file) in str(error.value) and error.value.fix
