"""Layers of transformers against torch's own, the past of batches and of steps against each other."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from tractkit.models.attention import (
    BatchPast,
    DecoderLayer,
    EncoderLayer,
    StepPast,
    reset_slots,
    rotary_frequencies,
    rotate,
    select_slots,
    sinusoidal_table,
)
from tractkit.models.layers import initialize_weights, pad_buckets

NAMES = {
    "self_attn.in_proj_weight": "attention.into.weight", "self_attn.in_proj_bias": "attention.into.bias",
    "self_attn.out_proj.weight": "attention.out.weight", "self_attn.out_proj.bias": "attention.out.bias",
    "multihead_attn.in_proj_weight": "to_memory.into.weight", "multihead_attn.in_proj_bias": "to_memory.into.bias",
    "multihead_attn.out_proj.weight": "to_memory.out.weight", "multihead_attn.out_proj.bias": "to_memory.out.bias",
    "linear1.weight": "feed_forward.hidden.weight", "linear1.bias": "feed_forward.hidden.bias",
    "linear2.weight": "feed_forward.out.weight", "linear2.bias": "feed_forward.out.bias",
}


def torchs_weights(layer, norms):
    """The weights of a layer of ours by the names of torch's."""
    ours = layer.state_dict()
    found = {theirs: ours[mine] for theirs, mine in NAMES.items() if mine in ours}
    for i, norm in enumerate(norms, 1):
        found |= {f"norm{i}.{w}": ours[f"{norm}.norm.{w}"] for w in ("weight", "bias")}
    return found


def ragged(lengths, size, seed=0):
    offsets = torch.tensor(np.cumsum([0, *lengths]))
    return offsets, torch.randn(int(offsets[-1]), size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("activation", "norm_first"), [("relu", False), ("gelu", True)])
def test_layers_are_torchs(activation, norm_first):
    offsets, x = ragged([5, 1, 0, 17, 9], 16)
    memory = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    past, options = BatchPast(offsets), (16, 4, 24, 0.1, activation, norm_first)
    encoder, decoder = EncoderLayer(*options).eval(), DecoderLayer(*options).eval()
    theirs = (nn.TransformerEncoderLayer(*options[:5], batch_first=True, norm_first=norm_first).eval(),
              nn.TransformerDecoderLayer(*options[:5], batch_first=True, norm_first=norm_first).eval())
    for mine, its, norms in ((encoder, theirs[0], ("around_attention", "around_feed_forward")),
                             (decoder, theirs[1], ("around_attention", "around_memory", "around_feed_forward"))):
        initialize_weights(mine, 3)
        its.load_state_dict(torchs_weights(mine, norms))
    with torch.no_grad():
        one = past.pack(encoder(past.pad(x), past))
        two = past.pack(decoder(past.pad(x), past.pad(memory), past))
        for a, b in itertools.pairwise(offsets.tolist()):
            if a < b:
                mask = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
                np.testing.assert_allclose(one[a:b], theirs[0](x[None, a:b], src_mask=mask)[0], atol=1e-5)
                wanted = theirs[1](x[None, a:b], memory[None, a:b], tgt_mask=mask, memory_mask=mask)[0]
                np.testing.assert_allclose(two[a:b], wanted, atol=1e-5)


def test_rotary_positions_are_turns_of_complex_numbers_and_relative():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 12, generator=g, dtype=torch.float64)
    speeds = rotary_frequencies(12).double()
    assert float(speeds[0]) == 1 and 2 * np.pi / float(speeds[-1]) == pytest.approx(2000, rel=1e-4)
    ratios = speeds[1:] / speeds[:-1]
    np.testing.assert_allclose(ratios, ratios[0].expand(5), rtol=1e-5)  # base^(-2/d)
    for mm in (0.0, 1.0, 130.5, -7.0):
        turned = torch.complex(q[:6], q[6:]) * torch.polar(torch.ones(6, dtype=torch.float64), mm * speeds)
        np.testing.assert_allclose(rotate(q, mm * speeds), torch.cat([turned.real, turned.imag]), atol=1e-12)
    fit = [float(rotate(q, (x + 3) * speeds) @ rotate(k, x * speeds)) for x in (-50.0, 0.0, 210.0)]
    np.testing.assert_allclose(fit, fit[0], atol=1e-10)
    assert float(rotary_frequencies(2)[0]) > 0 and sinusoidal_table(4, 5).shape == (4, 5)
    np.testing.assert_allclose(sinusoidal_table(9, 6)[7, :2], [np.sin(7), np.cos(7)], atol=1e-6)
    np.testing.assert_allclose(sinusoidal_table(9, 6)[7, 4:], [np.sin(7 / 1e4**(4 / 6)), np.cos(7 / 1e4**(4 / 6))],
                               atol=1e-6)


@pytest.mark.parametrize("price", [0.0, 64.0, 1e9])
def test_blocks_with_the_streamline_first_are_the_others_turned(price):
    lengths = [3, 0, 90, 1, 40, 41, 44, 2]
    offsets, x = ragged(lengths, 2)
    first, second = (pad_buckets(offsets, 0.0, per_block=price, streamline_first=s) for s in (False, True))
    assert all(torch.equal(a, b.T) for a, b in zip(first.gather, second.gather, strict=True))
    assert torch.equal(x, second.pack(second.pad(x))) and (price < 1e9 or len(second.gather) == 1)
    assert price or first.waste < 0.05


def test_an_empty_batch_has_a_past():
    past = BatchPast(torch.tensor([0, 0, 0]))
    layer = EncoderLayer(8, 2, 8, 0.0, "relu", False)
    assert past.pack(layer(past.pad(torch.zeros(0, 8)), past)).shape == (0, 8)


def test_streamlines_come_go_and_begin_anew_in_any_place():
    r = np.random.default_rng(0)
    lengths = [*r.integers(1, 60, 30), 120]
    offsets, x = ragged(lengths, 16, 7)
    layers = nn.ModuleList([EncoderLayer(16, 2, 16, 0.0, "relu", False), DecoderLayer(16, 2, 16, 0.0, "gelu", True)])
    initialize_weights(layers, 1)
    mm = torch.cat([torch.arange(n) * 0.5 for n in lengths])
    past, speeds = BatchPast(offsets, mm, rotary_frequencies(8)), rotary_frequencies(8)
    memory = layers[0](past.pad(x), past)
    wanted = past.pack(layers[1](past.pad(x.flip(1)), memory, past)).detach()
    waiting, at, found = list(range(9, 31)), list(range(9)), torch.full(wanted.shape, torch.nan)
    done, state, copies = [0] * 9, StepPast.begin(9, 3, 2, 8), 0
    with torch.no_grad():
        while at:
            rows = torch.tensor([int(offsets[i]) + t for i, t in zip(at, done, strict=True)])
            step = StepPast(state, 200, 0.5, speeds)
            assert step.index.tolist() == done
            found[rows] = layers[1](x.flip(1)[rows], layers[0](x[rows], step), step)
            state, done = step.state, [t + 1 for t in done]
            ended = torch.tensor([t == lengths[i] for i, t in zip(at, done, strict=True)])
            for place in ended.nonzero()[:, 0].tolist():  # a place is filled again, or given up
                if waiting and len(waiting) % 3:
                    at[place], done[place], ended[place] = waiting.pop(), 0, False
                    state = reset_slots(state, torch.tensor([place]))
                elif waiting:
                    waiting.pop(0)
            if ended.any():
                before = state[2]
                state = select_slots(state, ~ended)
                copies += state[2] is not before
                at, done = ([v for v, e in zip(values, ended, strict=True) if not e] for values in (at, done))
    seen = ~found.isnan().any(1)
    np.testing.assert_allclose(found[seen], wanted[seen], atol=1e-5)
    assert 0.6 < float(seen.float().mean()) and seen[offsets[-2]:].all()
    assert 2 <= copies < 7  # 9 places are given up; each time a quarter is free, those that go on are copied


def test_room_is_made_for_many_points_and_for_no_more_than_there_can_be():
    state, rooms = StepPast.begin(3, 1, 2, 4), []
    layer = EncoderLayer(8, 2, 8, 0.0, "relu", False)
    with torch.no_grad():
        for t in range(70):
            step = StepPast(state, 60)
            assert bool(step.is_full.all()) == (t >= 60)
            assert torch.isfinite(layer(torch.ones(3, 8), step)).all()
            state = step.state
            rooms.append(state[2].shape[2])
    assert sorted(set(rooms)) == [32, 60]
