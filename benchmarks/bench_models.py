"""The bodies of models: forward, loss and backward on streamlines of the phantom at 1 mm, 28 features, dropout .1.

Each model beside torch's bare modules of the same sizes, with a linear embedding, a direction getter's two layers and
1 - cos, on blocks that were laid out beforehand; what the ratio is above 1 is what the model does beside (blocks,
previous directions, positions, targets, keyed dropout). Torch's attention drops no weights here, as ours does not.
Then as it is done elsewhere: padded to the longest streamline with masks, or as a PackedSequence. Then a step of a
transformer in tracking, with keys and values kept, beside computing all points so far anew; and what is kept, in
training for the backward pass and in tracking for the next step, against the length of streamlines."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from benchmarks.pairs import Ratio, as_table, compare
from tractkit.dwi.phantom import sample_subjects
from tractkit.models.autoencoder import Autoencoder, equal_points
from tractkit.models.base import TractographyModel, model_class
from tractkit.models.layers import pad_buckets
from tractkit.models.targets import unit
from tractkit.spatial.resample import resample_nb_points, resample_step
from tractkit.spatial.tractogram import Tractogram

FEATURES, SIZE, HEADS, LAYERS, TIPS = 28, 128, 8, 2, 16
STREAMLINES = {"LSTM": 192, "GRU": 512}  # of a batch; of the others 48
MODELS: dict[str, tuple[str, dict]] = {
    "LSTM": ("learn2track", dict(rnn_key="lstm", rnn_layer_sizes=[SIZE] * LAYERS, dropout=0.1)),
    "GRU": ("learn2track", dict(rnn_key="gru", rnn_layer_sizes=[SIZE] * LAYERS, dropout=0.1)),
    "TTS": ("tts", dict(n_layers_e=LAYERS)), "TTO": ("tto", dict(n_layers_e=LAYERS)),
    "TTST": ("ttst", dict(n_layers_e=LAYERS))}


def batch_of(points: list[np.ndarray]) -> tuple[torch.Tensor, SimpleNamespace]:
    """Streamlines, (n, 3) voxel, with what a model reads of a batch; random features."""
    n, offsets = len(points), torch.tensor(np.cumsum([0, *map(len, points)]))
    batch = SimpleNamespace(points=torch.tensor(np.concatenate(points)), offsets=offsets,
                            voxel_sizes=torch.full((n, 3), 2.0), previous=torch.zeros(n, 3),
                            first_known=torch.zeros(n, dtype=torch.bool))
    return torch.randn(len(batch.points), FEATURES, generator=torch.Generator().manual_seed(0)), batch


def phantom_batch(n: int = 48) -> tuple[torch.Tensor, SimpleNamespace]:
    """Some streamlines of one subject, of all bundles."""
    t = Tractogram.load(sample_subjects(1, progress=False) / "sub-01" / "tractogram.trk")
    lines = resample_step(t.streamlines, 1.0, t.affine)[0]
    return batch_of([lines[i] for i in np.linspace(0, len(lines) - 1, n).astype(int)])


def straight(n: int, length: int) -> tuple[torch.Tensor, SimpleNamespace]:
    """As many straight streamlines of one length."""
    line = np.stack([np.arange(length) * 0.5, np.zeros(length), np.zeros(length)], 1).astype(np.float32)
    return batch_of([line] * n)


def learn(model: TractographyModel, inputs: torch.Tensor, batch: SimpleNamespace) -> Callable[[], None]:
    """Forward, loss and backward of a model."""
    def run() -> None:
        model.zero_grad()
        model.compute_loss(model(inputs, batch), model.targets(batch))[0].backward()

    return run


class Bare(nn.Module):
    """Torch's modules for one kind of body, on blocks (streamlines, points, features)."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, recurrent = kind, kind in ("LSTM", "GRU")
        self.embed = nn.Identity() if recurrent else nn.Sequential(nn.Linear(FEATURES, SIZE), nn.ReLU())
        self.embed_target = nn.Sequential(nn.Linear(4, SIZE), nn.ReLU()) if kind == "TTO" else None
        options = dict(dim_feedforward=SIZE // 2, dropout=0.1, batch_first=True)
        self.drop = nn.Dropout(0.1)
        if recurrent:
            self.body: nn.Module = getattr(nn, kind)(
                FEATURES + 3, SIZE, LAYERS, dropout=0.1, batch_first=True)
        elif kind == "TTO":
            self.body = nn.ModuleList([
                nn.TransformerEncoder(nn.TransformerEncoderLayer(SIZE, HEADS, **options), LAYERS),
                nn.TransformerDecoder(nn.TransformerDecoderLayer(SIZE, HEADS, **options), LAYERS)])
        else:
            self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(SIZE, HEADS, **options), LAYERS)
        for part in self.modules():
            if isinstance(part, nn.MultiheadAttention):
                part.dropout = 0.0
        self.head = nn.Sequential(nn.Linear(SIZE, SIZE // 2), nn.ReLU(), nn.Linear(SIZE // 2, 3))

    def forward(self, x: torch.Tensor, tokens: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        if self.kind in ("LSTM", "GRU"):
            return self.head(self.body(torch.cat([x, tokens[..., :3]], -1))[0])
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        if padding is not None:  # as dwi_ml has it: both masks, of True and False
            mask = mask < 0
        causal, rows = padding is None, self.drop(self.embed(x))
        if self.embed_target is None:
            return self.head(self.body(rows, mask=mask, src_key_padding_mask=padding, is_causal=causal))
        assert isinstance(self.body, nn.ModuleList)
        memory = self.body[0](rows, mask=mask, src_key_padding_mask=padding, is_causal=causal)
        targets = self.drop(self.embed_target(tokens))
        return self.head(self.body[1](targets, memory, tgt_mask=mask, memory_mask=mask, tgt_is_causal=causal,
                                      memory_is_causal=causal, tgt_key_padding_mask=padding,
                                      memory_key_padding_mask=padding))


def directions_of(batch: SimpleNamespace) -> torch.Tensor:
    steps = torch.zeros_like(batch.points)
    steps[:-1] = unit(batch.points[1:] - batch.points[:-1])
    return steps


def bare(kind: str, inputs: torch.Tensor, batch: SimpleNamespace) -> Callable[[], None]:
    """Forward, loss and backward of torch's modules, on the blocks that the model would make."""
    module, ends = Bare(kind), 0.0 if kind[0] == "T" else 8.0 if kind == "LSTM" else 32.0
    blocks = pad_buckets(batch.offsets.numpy(), ends, per_block=64.0 if kind[0] == "T" else 0.0, streamline_first=True)
    tokens = torch.nn.functional.pad(directions_of(batch), (0, 1))
    laid = list(zip(blocks.pad(inputs), blocks.pad(tokens), blocks.pad(directions_of(batch)), strict=True))

    def run() -> None:
        module.zero_grad()
        loss = sum((1 - (unit(module(x, t)) * d).sum(-1)).sum() for x, t, d in laid)
        (loss / len(inputs)).backward()

    return run


def longest(kind: str, inputs: torch.Tensor, batch: SimpleNamespace) -> Callable[[], None]:
    """The same of a batch padded to its longest streamline with masks, or of a PackedSequence."""
    module, lengths = Bare(kind), batch.offsets.diff()

    def dense(rows: torch.Tensor) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence(list(rows.split(lengths.tolist())), batch_first=True)

    def run() -> None:
        module.zero_grad()
        directions = directions_of(batch)
        tokens = torch.nn.functional.pad(directions, (0, 1))
        if kind in ("LSTM", "GRU"):
            rows = torch.cat([inputs, directions], 1).split(lengths.tolist())
            packed = nn.utils.rnn.pack_sequence(list(rows), enforce_sorted=False)
            answers = module.head(module.body(packed)[0].data)
            (1 - unit(answers).sum(-1)).mean().backward()  # costs as much as against directions in that order
            return
        x = dense(inputs)
        padding = torch.arange(x.shape[1]) >= lengths[:, None]
        found = module(x, dense(tokens), padding)[~padding]
        (1 - (unit(found) * directions).sum(-1)).mean().backward()

    return run


def rows() -> Iterator[Ratio]:
    """Ratios to torch's bare modules, to padding, and of cached steps to computing anew."""
    for name, (key, options) in MODELS.items():
        inputs, batch = phantom_batch(STREAMLINES.get(name, 48))
        n = len(inputs)
        model = model_class(key)(FEATURES, **options).train()
        ours = learn(model, inputs, batch)
        blocks = pad_buckets(batch.offsets.numpy(), per_block=64.0, overhead=0.0) if name[0] == "T" else pad_buckets(
            batch.offsets.numpy(), model._step_price(inputs.device))
        ratio = compare(f"{name}, {n:,} points", ours, "torch's bare modules, blocks given", bare(name, inputs, batch))
        yield replace(ratio, note=f"{n / ratio.ours_ms:,.0f} k points/s; {1 / ratio.ratio:.2f} of bare (asked .9); "
                                  f"in {len(blocks.gather)} block(s), {blocks.waste:.1%} padding; 1 thread")
        if name in ("LSTM", "TTS"):
            other = "PackedSequence" if name == "LSTM" else "padded to the longest, with masks"
            waste = 1 - n / (len(batch.offsets) - 1) / int(batch.offsets.diff().max())
            yield compare(f"{name}, {n:,} points", ours, other, longest(name, inputs, batch),
                          note="1 thread" if name == "LSTM" else f"{waste:.1%} padding; 1 thread")
    yield autoencoder()
    for length in (50, 200, 500):
        yield cached(length)


def autoencoder() -> Ratio:
    """The autoencoder on its 256 points, in voxels of a batch, beside torch's bare modules on what it feeds its own."""
    t = Tractogram.load(sample_subjects(1, progress=False) / "sub-01" / "tractogram.trk")
    some = t[np.linspace(0, len(t) - 1, STREAMLINES).astype(int)]
    model = Autoencoder()
    lines = resample_nb_points(some.streamlines, 256, t.affine)[0]
    _, batch = batch_of(list(lines))
    batch.affines, batch.point_ranges = t.affine[None], [slice(0, len(batch.points))]
    sizes = [3, *model.hyperparameters["layer_sizes"]]

    def conv(a: int, b: int, stride: int) -> list[nn.Module]:
        return [nn.ReflectionPad1d(1), nn.Conv1d(a, b, 3, stride), nn.ReLU()]

    down = [part for a, b in pairwise(sizes) for part in conv(a, b, 2)]
    up = [part for a, b in pairwise(sizes[::-1])
          for part in (nn.Upsample(scale_factor=2, mode="linear"), *conv(a, b, 1))]
    module = nn.Sequential(*down, nn.Flatten(), nn.Linear(4096, 32), nn.Linear(32, 4096), nn.ReLU(),
                           nn.Unflatten(1, (1024, 4)), *up[:-1])
    x = torch.tensor(equal_points(some, 256) / 50).transpose(1, 2).contiguous()

    def run() -> None:
        module.zero_grad()
        (module(x) - x).square().sum(1).mean().backward()

    n = len(batch.points)
    ratio = compare(f"autoencoder, {n:,} points", learn(model, batch.points, batch), "torch's bare modules", run)
    return replace(ratio, note=f"{n / ratio.ours_ms:,.0f} k points/s; {1 / ratio.ratio:.2f} of bare (asked .9); "
                               "1 thread")


@torch.no_grad()
def cached(length: int) -> Ratio:
    """A step of tracking after so many points, beside all of them computed anew."""
    model = model_class("tto")(FEATURES, n_layers_e=LAYERS).eval()
    inputs, batch = straight(TIPS, length)
    x, previous = inputs[:TIPS], torch.tensor([[1.0, 0, 0]]).expand(TIPS, 3)
    state = model.init_state(TIPS)
    for _ in range(length):
        state = model.step(x, previous, state)[1]
    ratio = compare(f"TTO, step {length} of {TIPS} tips, keys and values kept",
                    lambda: model.step(x, previous, state), "all points anew", lambda: model(inputs, batch))
    return replace(ratio, note=f"{1 / ratio.ratio:.0f} times faster" + (" (asked 10)" if length == 200 else ""))


def memory() -> str:
    """What is kept against the length of streamlines: bytes of tensors, not of the process."""
    lines = ["| points on each streamline | for the backward pass of TTS, bytes a point "
             "| kept in tracking, bytes a tip |",
             "| --- | --- | --- |"]
    for length in (50, 200, 800):
        model, kept = model_class("tts")(FEATURES, n_layers_e=LAYERS), dict[int, int]()

        def note(x: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        inputs, batch = straight(1600 // length, length)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = model.compute_loss(model(inputs, batch), model.targets(batch))[0]
        of_weights = sum(kept.pop(p.untyped_storage().data_ptr(), 0) for p in model.parameters())
        assert of_weights and torch.isfinite(loss)
        with torch.no_grad():
            state = model.eval().init_state(1)
            for _ in range(length):
                state = model.step(inputs[:1], torch.zeros(1, 3), state)[1]
        lines.append(f"| {length} | {sum(kept.values()) / len(inputs):,.0f} "
                     f"| {sum(part.nbytes for part in state):,} |")
    return "\n".join(lines)


def table() -> str:
    """The ratios, then what is kept."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return f"{as_table(list(rows()))}\n\n{memory()}"
    finally:
        torch.set_num_threads(threads)
