"""Keyed random numbers: known answers, independence of shape, distributions."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tractkit.core import rng as keyed
from tractkit.core.rng import fold, fold_ids, normal, permutation, random_bits, torch_seed, uniform

KNOWN = {
    "key": 2267202552174987731,
    "bits": [3953890882154268188, 8829606292364334302, 3268494001670127727],
    "ids": [17013130513584026285, 10828170656700633590, 253383679116287351],
    "uniform32": "287c5b3e2012f53e1470353e",
    "uniform64": "00bb8367856fcb3f84bb100944a2de3f",
    "normal": "709c4abfa3445bbdd0176dbf92fbcd3f",
    "permutation": [2, 0, 1, 6, 4, 7, 3, 5],
    "torch_seed": 9127041824972962644,
}


def test_known_answers_pin_the_version():
    """These numbers are in people's files: if one changes, KEYED_VERSION must."""
    assert keyed.KEYED_VERSION == 1
    key = fold(1234, 7, "sub-01", "noise")
    assert key == KNOWN["key"]
    assert [int(b) for b in random_bits(key, np.arange(3))] == KNOWN["bits"]
    assert [int(k) for k in fold_ids(key, [0, 1, 2**40])] == KNOWN["ids"]
    assert uniform(key, np.arange(3)).tobytes().hex() == KNOWN["uniform32"]
    assert uniform(key, np.arange(2), np.float64).tobytes().hex() == KNOWN["uniform64"]
    assert normal(key, np.arange(4)).tobytes().hex() == KNOWN["normal"]
    assert permutation(key, 8).tolist() == KNOWN["permutation"]
    assert torch_seed(key) == KNOWN["torch_seed"]


def test_threefry_known_answers_of_its_authors():
    """kat_vectors of Random123 (threefry2x64, 20 rounds)."""
    ones = 2**64 - 1
    for k, c, answer in (
        ((0, 0), (0, 0), ("c2b6e3a8c2c69865", "6f81ed42f350084d")),
        ((ones, ones), (ones, ones), ("e02cb7c4d95d277a", "d06633d0893b8b68")),
        ((0xA4093822299F31D0, 0x082EFA98EC4E6C89), (0x243F6A8885A308D3, 0x13198A2E03707344),
         ("263c7d30bb0f0af1", "56be8361d3311526")),
    ):
        assert tuple(f"{int(w):016x}" for w in keyed._threefry(*(np.uint64(w) for w in (*k, *c)))) == answer


ints = st.integers(-(2**63), 2**64 - 1)


@given(st.lists(ints | st.text(max_size=8), max_size=4), ints)
@settings(max_examples=50, deadline=None)
def test_fold_ids_is_fold(parts, last):
    array = np.array([last], dtype=np.int64 if last < 0 else np.uint64)
    assert int(fold_ids(fold(*parts), array)[0]) == fold(*parts, last)


def test_keys_differ_by_order_type_and_nesting():
    keys = [fold(), fold(0), fold(0, 0), fold("0"), fold(""), fold("0", 0), fold(0, "0"), fold(1), fold("a", "b"),
            fold("ab"), fold("b", "a"), fold(-1), int(random_bits(fold(), 0)), torch_seed(fold()) << 1]
    assert len(set(keys)) == len(keys)
    assert fold(-1) == fold(2**64 - 1)  # integers count modulo 2**64


def test_draws_do_not_depend_on_shape():
    keys, counters = fold_ids(3, np.arange(40)), np.arange(50)
    for draw in (random_bits, uniform, normal, lambda k, c: uniform(k, c, np.float64)):
        whole = draw(keys[:, None], counters)
        assert whole.shape == (40, 50)
        assert whole[7, 9] == draw(int(keys[7]), 9)
        np.testing.assert_array_equal(whole[:, ::-3].T, draw(keys, counters[::-3, None]))
        counts = np.arange(40)  # ragged
        ragged = draw(np.repeat(keys, counts), np.concatenate([np.arange(c) for c in counts]))
        np.testing.assert_array_equal(ragged[-39:], whole[39, :39])
        assert draw(keys[:0], counters[:0]).shape == (0,)


def test_types():
    assert random_bits(1, 2).dtype == np.uint64
    assert normal(1, np.arange(2)).dtype == np.float32
    assert uniform(1, np.arange(2)).dtype == np.float32
    assert permutation(1, 4).dtype == np.int64
    assert permutation(1, 0).shape == (0,) and permutation(1, 1).tolist() == [0]
    assert isinstance(torch_seed(5), int) and 0 <= torch_seed(5) < 2**63
    for bad in (1.0, None, b"x"):
        with pytest.raises(TypeError):
            fold(bad)
    with pytest.raises(TypeError, match="float64"):
        normal(1, np.arange(3.0))
    with pytest.raises(TypeError, match="float16"):
        uniform(1, 1, np.float16)


def test_the_ends_of_the_intervals():
    """The largest draws stay below 1 and finite: the kernels' last bits, not a lucky sample."""
    assert np.float32(2**24 - 1) * np.float32(2.0**-24) < 1
    for word in (0, 2**52 - 1):
        x = keyed._normal_quantile((word + 0.5) * 2.0**-52)
        assert 8 < abs(x) < 8.3
    np.testing.assert_allclose([keyed._log(p) for p in (1e-300, 0.3, 0.5, 0.7071, 1.0)],
                               np.log([1e-300, 0.3, 0.5, 0.7071, 1.0]), rtol=4e-16)


def test_quantile_against_scipy():
    p = np.concatenate([2.0 ** -np.arange(2.0, 53), 1 - 2.0 ** -np.arange(2.0, 53), np.linspace(1e-6, 1 - 1e-6, 2001)])
    np.testing.assert_allclose([keyed._normal_quantile(x) for x in p], stats.norm.ppf(p), rtol=1e-13, atol=1e-15)


N = 200_000


@pytest.mark.parametrize("layout", ["one key", "one counter", "diagonal"])
def test_distributions(layout):
    """Along counters, along keys that are themselves small numbers, and along both."""
    i = np.arange(N)
    key, counter = {"one key": (fold("d"), i), "one counter": (i, 3), "diagonal": (i, i)}[layout]
    u, x, bits = uniform(key, counter, np.float64), normal(key, counter), random_bits(key, counter)
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.kstest(x, "norm").pvalue > 1e-3
    ones = np.array([((bits >> np.uint64(b)) & np.uint64(1)).sum() for b in range(64)])
    assert np.abs(ones - N / 2).max() < 5 * np.sqrt(N) / 2          # each bit is fair
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / np.sqrt(N)  # neighbours are unrelated
    assert len(np.unique(bits)) == N


def test_one_bit_of_input_flips_half_of_the_output():
    base = np.arange(2000, dtype=np.uint64)
    for b in range(64):
        flip = base ^ np.uint64(1 << b)
        for one, two in ((random_bits(flip, 5), random_bits(base, 5)), (random_bits(5, flip), random_bits(5, base))):
            assert abs(np.unpackbits((one ^ two).view(np.uint8)).mean() - 0.5) < 0.01


def test_every_permutation_is_equally_likely():
    counts = np.zeros(24)
    names = {}
    for i in range(6000):
        order = tuple(permutation(fold("p", i), 4))
        counts[names.setdefault(order, len(names))] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


def test_same_in_another_process_and_without_torch():
    code = ("import sys; from tractkit.core.rng import fold, normal; import numpy as np;"
            "print(fold(1, 'sub-01'), normal(fold(1, 'sub-01'), np.arange(3)).tobytes().hex(), 'torch' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    key = fold(1, "sub-01")
    assert out == [str(key), normal(key, np.arange(3)).tobytes().hex(), "False"]


def test_threads_that_draw_first_at_the_same_time(monkeypatch, recwarn):
    """Numba compiles in each of them, and warns."""
    vectorize = keyed.numba.vectorize
    monkeypatch.setattr(keyed.numba, "vectorize", lambda cache: vectorize)  # nothing that an earlier run has compiled
    for _ in range(2):
        draw, gate, drawn = keyed._vectorize(lambda key, counter: key + counter), threading.Barrier(4), []

        def run(draw=draw, gate=gate, drawn=drawn):
            gate.wait()
            drawn.append(draw(np.uint64(1), np.arange(3, dtype=np.uint64)).tolist())

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert drawn == [[1, 2, 3]] * 4
    assert not len(recwarn)
