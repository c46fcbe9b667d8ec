"""train_model, TorchModel and batch iterators: against plain torch, against themselves after a kill, and against what
they must refuse."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import functional_child
import numpy as np
import pytest
import torch
from functional_child import BATCHES, EPOCHS, make_batches, make_core
from helpers_children import kill_after
from helpers_training import log_without_time, same_states
from torch import nn

from tractkit.core.rng import uniform
from tractkit.functional.batch_iter import Infinite, as_batch_iter
from tractkit.functional.pipeline import (
    ExpirationPool,
    Iterator,
    Loky,
    Threads,
    combine_batches,
    combine_pad,
    combine_to_arrays,
)
from tractkit.functional.sources import (
    Source,
    apply_at,
    item_key,
    load_by_random_id,
    multiply,
    random_apply,
    sample,
    sample_args,
    unpack_args,
    zip_apply,
)
from tractkit.functional.steps import inference_step, multi_inference_step, train_step
from tractkit.functional.torch_model import ConsoleLogger, ModelTrainer, TorchModel, train_model
from tractkit.models.layers import KeyedDropout, initialize_weights
from tractkit.runs.log import RunLog
from tractkit.training.callbacks import OnNonFinite
from tractkit.training.policy import TQDM, EarlyStopping, Exponential, LoggerPolicy, Policy, TimeProfiler
from tractkit.training.state import TrainerState

# ---- killed and gone on with ---------------------------------------------------------------------------------


class Children:
    def __init__(self, root: Path):
        self.root = root
        here = Path(__file__).parent.parent
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
        self.process = subprocess.Popen(
            [sys.executable, str(here / "functional_child.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=root,
        )

    def start(self, name, **job):
        self.process.stdin.write(json.dumps({"folder": str(self.root / name), **job}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def run(self, name, **job):
        self.start(name, **job)
        return self.end()

    def end(self):
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def log(self, name):
        return RunLog(self.root / name / "logs")

    def step(self, name):
        return max([r["step"] for r in self.log(name).records("batch")], default=0)

    def kill_at_random(self, name, rng, **job):
        pid = self.start(name, **job)
        until = self.step(name) + rng.randint(1, max(1, (BATCHES * EPOCHS - self.step(name)) // 2))
        kill_after(pid, lambda: self.step(name), until, rng.random() * 0.02)
        self.end()
        return self.step(name)

    def differences(self, name, other):
        def load(n):
            return TrainerState.load(self.root / n / "checkpoints", make_core(), optimizer=torch.optim.AdamW)
        a, b = load(name), load(other)
        best = [(self.root / n / "checkpoints/best_model/model.safetensors").read_bytes() for n in (name, other)]
        of_the_killer = "/fingerprints/config/policies/3"  # what kills is a policy, and is on record as one
        return (
            [k for k in same_states(a, b) if k != of_the_killer]
            + ["log"] * (log_without_time(self.log(name)) != log_without_time(self.log(other)))
            + ["best"] * (best[0] != best[1])
        )


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    made = Children(tmp_path_factory.mktemp("functional"))
    for kind in ("keyed", "stream", "counted"):
        assert made.run(f"whole-{kind}", kind=kind) == 0
        assert made.step(f"whole-{kind}") == BATCHES * EPOCHS
    yield made
    made.process.stdin.close()
    made.process.wait(20)


@pytest.mark.parametrize("kind", ["keyed", "stream", "counted"])
def test_killed_and_called_again(children, kind):
    """Dropout of both kinds, random transforms in threads, rates and weights that depend on the past: equal bits."""
    rng = random.Random(len(kind))
    where = [children.kill_at_random(f"random-{kind}", rng, kind=kind) for _ in range(2 if kind == "keyed" else 1)]
    print("killed after steps", where)
    assert children.run(f"random-{kind}", kind=kind) == 0
    assert children.differences(f"random-{kind}", f"whole-{kind}") == []


@pytest.mark.parametrize("hook, count", [("train_step_finished", 9), ("epoch_finished", 2), ("rename", 8)])
def test_killed_at_a_point(children, hook, count):
    name = f"{hook}-{count}"
    assert children.run(name, hook=hook, count=count) == -signal.SIGKILL
    assert children.step(name) < BATCHES * EPOCHS
    assert children.run(name) == 0
    assert children.differences(name, "whole-keyed") == []


def test_workers_make_no_difference(children):
    assert children.run("workers", num_workers=2) == 0
    assert children.differences("workers", "whole-keyed") == []


@pytest.mark.full
def test_killed_many_times(children):
    rng, hit = random.Random(5), set()
    hooks = [
        "epoch_started",
        "train_step_started",
        "train_step_finished",
        "validation_started",
        "epoch_finished",
        "fsync",
        "rename",
        "serialise",
    ]
    for i in range(30):
        name, kind = f"many-{i // 5}", "keyed" if i // 5 % 2 == 0 else "counted"
        if i % 2:
            hook, count = hooks[i // 2 % len(hooks)], 1 + rng.randrange(4)
            children.run(name, kind=kind, hook=hook, count=count)
            hit.add((hook, children.step(name)))
        else:
            hit.add(("random", children.kill_at_random(name, rng, kind=kind)))
        if i % 5 == 4:
            assert children.run(name, kind=kind) == 0
            assert children.differences(name, f"whole-{kind}") == []
    print("killed at", sorted(hit))
    assert len(hit) > 15


# ---- sources and stages --------------------------------------------------------------------------------------


def loaded(log):
    def load(i):
        log.append(i)
        return np.array([i + float(uniform(item_key(), 0))])
    return load


def test_batch_ten_thousand_is_as_near_as_the_first():
    log = []
    batches = Infinite(
        load_by_random_id(loaded(log), ids=range(50)),
        Threads(np.sqrt, n_workers=3),
        batch_size=4,
        batches_per_epoch=100,
    )
    assert batches.nb_replayed(10_000) == 0
    far = batches.load(10_000)
    assert len(log) == 4
    again = Infinite(
        load_by_random_id(loaded([]), ids=range(50)), Threads(np.sqrt), batch_size=4, batches_per_epoch=100
    )
    for _ in range(3):
        list(again)
    np.testing.assert_array_equal(again.load(10_000)[0], far[0])
    assert not np.array_equal(again.load(10_001)[0], far[0])


@pytest.mark.parametrize("workers", [1, 4])
def test_threads_keep_the_order(workers):
    threads = set()

    def slow(x):
        threads.add(threading.get_ident())
        time.sleep(0.004 * (x % 5 == 0))
        return x + float(uniform(item_key(), 0, np.float64))

    with Infinite(itertools.count(), Threads(slow, n_workers=workers), batch_size=20, batches_per_epoch=2) as batches:
        values = np.concatenate([b[0] for b in batches])
    assert np.floor(values).tolist() == list(range(40))
    assert (len(threads) > 1) == (workers > 1)
    other = Infinite(itertools.count(), Threads(slow, n_workers=3), batch_size=20, batches_per_epoch=2)
    assert np.concatenate([b[0] for b in other]).tolist() == values.tolist()


def scaled(x, by=1.0):
    return os.getpid(), x * by + float(uniform(item_key(), 0, np.float64))


def test_loky_keeps_the_order_in_processes():
    results = []
    for stage in (Loky(scaled, 10.0, n_workers=2), Threads(scaled, by=10.0), Loky(scaled, by=10.0, n_workers=-1)):
        with Infinite(sample(np.arange(9.0), random_state=4), stage, batch_size=8, batches_per_epoch=2) as batches:
            results.append([np.concatenate(x) for x in zip(*batches, strict=True)])
    assert results[0][1].tolist() == results[1][1].tolist() == results[2][1].tolist()
    assert os.getpid() not in results[0][0] and set(results[1][0]) == {os.getpid()}
    assert Loky(scaled, n_workers=-1).n_workers == os.cpu_count()
    with pytest.raises(ValueError, match="n_workers"):
        Threads(scaled, n_workers=0)


def test_errors_of_loaders_and_transforms_arrive():
    def broken(x):
        raise OSError("no such image")
    for stage in (broken, Threads(broken, n_workers=3)):
        with pytest.raises(OSError, match="no such image"):
            next(iter(Infinite(sample([1]), stage, batch_size=3, batches_per_epoch=1)))


def test_sampling_follows_the_weights():
    source = sample("abc", weights=[6, 0, 3], random_state=1)
    drawn = "".join(itertools.islice(source, 3000))
    assert set(drawn) == set("ac") and abs(drawn.count("a") / 3000 - 2 / 3) < 0.03
    assert next(source) == drawn[0] and next(source) == drawn[1]
    even = np.bincount([sample(range(4), random_state=2).item(k) for k in range(4000)]) / 4000
    assert np.abs(even - 0.25).max() < 0.03
    assert (
        sample(range(99), random_state=np.random.RandomState(3)).seed
        == sample(range(99), random_state=np.random.RandomState(3)).seed
    )
    assert sample(range(9), random_state=1).item(0, seed=5) == sample(range(9), random_state=1).item(0, seed=6)
    values = [[sample(range(10**6)).item(k, seed=s) for k in range(3)] for s in (5, 6)]
    assert values[0] != values[1]
    for wrong in ([1, 2], [1, -1, 1], [0, 0, 0], [1, float("nan"), 1]):
        with pytest.raises(ValueError, match="weights"):
            sample("abc", weights=wrong)
    with pytest.raises(ValueError, match="empty"):
        load_by_random_id(str, ids=[])


@pytest.mark.parametrize("pool_size, repetitions, iterations", [(5, 3, 1), (5, 3, 2), (1, 4, 1), (4, 1, 3)])
def test_the_pool_gives_each_item_so_many_times(pool_size, repetitions, iterations):
    log = []

    def load(k):
        log.append(k)
        return k

    batches = Infinite(
        Source(load, seed=1), ExpirationPool(pool_size, repetitions, iterations), batch_size=1, batches_per_epoch=60
    )
    given = [int(b[0][0]) for b in batches]
    counts = np.bincount(given)
    assert counts.max() <= repetitions
    assert (counts == repetitions).sum() >= len(set(given)) - pool_size
    assert len(log) == len(set(log))  # each was loaded once
    log.clear()
    later = Infinite(
        Source(load, seed=1), ExpirationPool(pool_size, repetitions, iterations), batch_size=1, batches_per_epoch=60
    )
    assert later.nb_replayed(50) == 0 and int(later.load(50)[0][0]) == given[50] and log == [given[50]]


def test_a_stream_is_counted_and_replayed_with_a_warning():
    def make(): return Infinite(iter(range(1000)), Iterator(in_threes), batch_size=4, batches_per_epoch=5)
    whole = [b[0].tolist() for b in make()]
    batches = make()
    with pytest.warns(UserWarning, match="12 items of the source are drawn again"):
        assert batches.load(3)[0].tolist() == whole[3]
    with pytest.warns(UserWarning, match="8 items"), pytest.raises(ValueError, match="cannot begin again"):
        batches.load(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert batches.load(4)[0].tolist() == whole[4]  # the next one
        assert batches.load(3)[0].tolist() == whole[3]  # was just made
        make_batches().load(10**6)
    restarts = Infinite(range(1000), Iterator(in_threes), batch_size=4, batches_per_epoch=5)
    with pytest.warns(UserWarning, match="28 items"):
        first = restarts.load(7)
    restarts._recent.clear()
    with pytest.warns(UserWarning, match="8 items"):
        assert restarts.load(2)[0].tolist() == whole[2]
    restarts._recent.clear()
    with pytest.warns(UserWarning, match="16 items"):
        assert restarts.load(7)[0].tolist() == first[0].tolist()


def in_threes(xs):
    return (x for x in xs if x % 3)


def test_finite_sources_end_with_words():
    batches = Infinite([1, 2, 3, 4, 5], batch_size=2, batches_per_epoch=3)
    assert [b[0].tolist() for b in batches] == [[1, 2], [3, 4], [5]]
    with pytest.raises(ValueError, match="ended after 3 batches"):
        batches.load(3)
    with pytest.warns(UserWarning, match="6 items"), pytest.raises(ValueError, match="ended after 3 batches"):
        Infinite(iter([1, 2, 3, 4, 5]), batch_size=2, batches_per_epoch=9).load(3)


def test_batches_of_a_size_that_depends():
    def fits(chunk, item): return sum(chunk) + item <= 10

    batches = Infinite(
        sample([1, 2, 5, 7], random_state=3), batch_size=fits, batches_per_epoch=40, combiner=combine_batches
    )
    chunks = [b[0] for b in batches]
    items = list(itertools.islice(sample([1, 2, 5, 7], random_state=3), sum(map(len, chunks))))
    assert [x for c in chunks for x in c] == items
    assert all(sum(c) <= 10 for c in chunks) and all(sum(a) + b[0] > 10 for a, b in itertools.pairwise(chunks))


def test_what_an_iterator_refuses():
    for options in ({}, {"batches_per_epoch": 1, "n_iters_per_epoch": 1}):
        with pytest.raises(TypeError, match="batches_per_epoch"):
            Infinite([1], batch_size=1, **options)
    for batch_size, n in ((0, 1), (1.5, 1), (1, 0)):
        with pytest.raises(ValueError):
            Infinite([1], batch_size=batch_size, batches_per_epoch=n)
    with pytest.raises(ValueError, match="one worker"):
        Iterator(iter, n_workers=2)
    with pytest.raises(ValueError, match="positive"):
        ExpirationPool(0, 1)


def test_combiners():
    x, y = np.arange(6.0).reshape(2, 3), np.ones((1, 5))
    assert combine_batches([(1, "a"), (2, "b")]) == ((1, 2), ("a", "b"))
    arrays = combine_to_arrays([x, x + 1])  # one array an item: not torn into rows
    assert len(arrays) == 1 and arrays[0].shape == (2, 2, 3)
    a, n = combine_pad([(x, 1), (y, 2)], padding_values=[np.min, 0], ratio=[1.0, 0.5])
    assert a.shape == (2, 2, 5) and n.tolist() == [1, 2]
    np.testing.assert_array_equal(a[0], np.pad(x, ((0, 0), (1, 1))))
    np.testing.assert_array_equal(a[1], np.ones((2, 5)))
    padded = Infinite([x, y], batch_size=2, batches_per_epoch=1, combiner=combine_pad, padding_values=-1).load(0)[0]
    assert (padded == -1).sum() == 20 - 6 - 5
    with pytest.raises(ValueError, match="different numbers"):
        combine_batches([(1, 2), (1, 2, 3)])
    with pytest.raises(ValueError, match="combine_pad"):
        combine_to_arrays([x, y])


def test_functions_of_functions():
    assert multiply(pow, 2)([3, 4]) == (9, 16)
    assert apply_at([0, -1], pow, 2)([3, 4, 5]) == (9, 4, 25)
    with pytest.raises(IndexError):
        apply_at(3, abs)([1, 2])
    assert zip_apply(abs, float)([-1, "2"]) == (1, 2.0)
    assert unpack_args(divmod)([7, 2]) == (3, 1)
    assert sample_args(round, ndigits=lambda: 1)(2.34) == 2.3
    flipped = [random_apply(p, lambda x: -x)(1) for p in (0, 1)]
    assert flipped == [1, -1]
    turned = Infinite(
        Source(lambda k: 1.0),
        random_apply(0.3, np.negative),
        sample_args(np.add, lambda: float(uniform(item_key(), 0))),
        batch_size=3000,
        batches_per_epoch=2,
    )
    values = turned.load(1)[0]
    assert abs((values < 0).mean() - 0.3) < 0.03 and len(set(values.tolist())) > 2900
    assert values.tolist() == turned.load(1)[0].tolist()
    with pytest.raises(ValueError, match="probability"):
        random_apply(2, abs)


def test_closing_ends_the_threads():
    before = threading.active_count()
    batches = Infinite(sample([1.0]), Threads(np.sqrt, n_workers=3), batch_size=6, batches_per_epoch=3)
    with batches:
        next(iter(batches))
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
    assert len(list(batches)) == 3  # and begins again when it is used again
    batches.close()


# ---- steps ---------------------------------------------------------------------------------------------------


def line(dropout=0.0, seed=0):
    core = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), KeyedDropout(dropout), nn.Linear(8, 1))
    initialize_weights(core, seed)
    return core


def make_model(kind=TorchModel, optimize=torch.optim.Adam, loss=None, **options):
    return kind(line(), nn.Tanh(), loss or nn.MSELoss(), optimize, **options)


X = np.linspace(-1, 1, 12)[:, None]
DATA = [(X[i::4], X[i::4] ** 2) for i in range(4)]


def plain_loop(epochs, rates, make=torch.optim.Adam):
    core = line()
    optimizer = make(core.parameters())
    for epoch in range(epochs):
        for x, y in DATA:
            for group in optimizer.param_groups:
                group["lr"] = rates[epoch]
            optimizer.zero_grad()
            nn.functional.mse_loss(
                core(torch.tensor(x, dtype=torch.float32)), torch.tensor(y, dtype=torch.float32)
            ).backward()
            optimizer.step()
    return core


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("optimize", [torch.optim.Adam, torch.optim.SGD])
def test_it_does_what_a_plain_loop_does(optimize):
    model = make_model(optimize=optimize)
    train_model(model, DATA, 3, Exponential(.1, .5), progress=False)
    assert same_weights(model.model_core, plain_loop(3, [.1, .05, .025], optimize))
    by_hand = make_model(optimize=optimize)
    for epoch in range(3):
        for x, y in DATA:
            by_hand.do_train_step(x, y, lr=[.1, .05, .025][epoch])
    assert same_weights(by_hand.model_core, model.model_core)
    core = line()
    optimizer = optimize(core.parameters())
    for epoch in range(3):
        for x, y in DATA:
            train_step(
                x,
                y,
                architecture=core,
                criterion=nn.functional.mse_loss,
                optimizer=optimizer,
                lr=[0.1, 0.05, 0.025][epoch],
            )
    assert same_weights(core, model.model_core)


def test_inference():
    model = make_model()
    model.model_core.train()
    expected = np.tanh(model.model_core.eval()(torch.tensor(X, dtype=torch.float32)).detach().numpy())
    np.testing.assert_allclose(model.do_inf_step(X), expected, rtol=1e-6)
    assert model.do_inf_step(X).dtype == np.float32
    half = inference_step(X, architecture=model.model_core, activation=torch.tanh, amp=True, out_dtype=torch.float64)
    assert half.dtype == np.float64 and 0 < np.abs(half - expected).max() < 0.02
    from tractkit.models.layers import Split
    two = Split(model.model_core, nn.Identity())
    a, b = multi_inference_step(X, architecture=two, activations=[torch.tanh, None])
    np.testing.assert_allclose(a, expected, rtol=1e-6)
    np.testing.assert_allclose(b, X, rtol=1e-6)
    with pytest.raises(ValueError, match="1 activations for 2 outputs"):
        multi_inference_step(X, architecture=two, activations=[None])


def test_losses_of_several_parts_and_several_targets():
    def criterion(out, a, b):
        return {"total": ((out - a) ** 2).mean() + ((out - b) ** 2).mean(), "a": ((out - a) ** 2).mean()}
    model = make_model(loss=criterion, n_targets=2, loss_key="total")
    returned = model.do_train_step(X, X, X**2, lr=.01)
    assert set(returned) == {"total", "a"} and returned["total"] > returned["a"]
    state = train_model(model, [(X, X, X**2)] * 2, 2, .01, progress=False)
    assert 0 < state.epochs[0]["train_loss"] < float(returned["total"])
    with pytest.raises(ValueError, match="loss_key is None"):
        make_model(loss=criterion, n_targets=2).do_train_step(X, X, X, lr=.1)
    with pytest.raises(ValueError, match="shape"):
        make_model(loss=lambda a, b: (a - b) ** 2).do_train_step(X, X, lr=.1)
    with pytest.raises(ValueError, match="no 3 targets"):
        make_model(n_targets=3).do_train_step(X, X, lr=.1)


def test_a_step_of_ones_own(tmp_path):
    """Without the inherited step and without its optimizer's update by the trainer."""
    class Own(TorchModel):
        def do_train_step(self, x, y, lr):
            loss = nn.functional.l1_loss(
                self.model_core(torch.tensor(x, dtype=torch.float32)), torch.tensor(y, dtype=torch.float32)
            )
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            return loss.item()

    model = make_model(Own)
    before = [p.detach().clone() for p in model.model_core.parameters()]
    state = train_model(model, DATA, 5, .02, progress=False, checkpoints_path=tmp_path)
    assert state.global_step == 20 and state.epochs[-1]["train_loss"] < state.epochs[0]["train_loss"]
    assert not all(torch.equal(a, b) for a, b in zip(before, model.model_core.parameters(), strict=True))

    class Silent(TorchModel):
        def do_train_step(self, *inputs, lr):
            super().do_train_step(*inputs, lr=lr)

    with pytest.raises(TypeError, match="must return the loss"):
        train_model(make_model(Silent), DATA, 1, .1, progress=False)


def test_a_loss_that_is_no_number_leaves_the_weights(tmp_path):
    bad = [*DATA[:2], (X[:3], np.full((3, 1), np.nan)), DATA[3]]
    model = make_model()
    with pytest.raises(FloatingPointError, match="loss is nan in epoch 1, batch 3"):
        train_model(model, bad, 1, .1, progress=False, checkpoints_path=tmp_path)
    assert TrainerState.load(tmp_path, line(), optimizer=torch.optim.Adam).global_step == 2
    train_model(model, DATA, 1, .1, progress=False, checkpoints_path=tmp_path)
    assert same_weights(model.model_core, plain_loop(1, [.1]))

    class LosesIt(TorchModel):
        def do_train_step(self, *inputs, lr):
            super().do_train_step(*inputs, lr=lr)
            return float("nan")

    with pytest.raises(ArithmeticError, match="may have changed the weights"):
        train_model(make_model(LosesIt), DATA, 1, .1, progress=False, checkpoints_path=tmp_path / "loses")
    assert TrainerState.load(tmp_path / "loses", line(), optimizer=torch.optim.Adam).global_step == 0


def test_accumulation_is_the_mean_over_all_points(tmp_path):
    """Five batches of unequal size, two to a step: three steps an epoch, the last of one batch. Also for a child's
    step."""
    sizes = [4, 1, 2, 3, 2]
    data = [(X[a:b], X[a:b] ** 2) for a, b in itertools.pairwise(np.cumsum([0, *sizes]))]

    class Weighted(TorchModel):
        calls = 0

        def do_train_step(self, *inputs, lr, weights):
            Weighted.calls += 1
            return super().do_train_step(*inputs, lr=lr * weights)

    model = make_model(Weighted, torch.optim.SGD)
    state = train_model(model, data, 2, .1, weights=Exponential(1, .5), gradient_accumulation_steps=2, progress=False)
    assert state.global_step == 6 and Weighted.calls == 10
    core = line()
    for epoch in range(2):
        for a, b in ((0, 5), (5, 10), (10, 12)):
            x = torch.tensor(X[a:b], dtype=torch.float32)
            nn.functional.mse_loss(core(x), x**2).backward()
            with torch.no_grad():
                for p in core.parameters():
                    p -= .1 * .5**epoch * p.grad
                    p.grad = None
    for a, b in zip(model.model_core.parameters(), core.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_options_of_the_trainer(tmp_path):
    clipped = make_model(optimize=torch.optim.SGD)
    before = [p.detach().clone() for p in clipped.model_core.parameters()]
    train_model(clipped, DATA[:1], 1, 1.0, options={"clip_grad": 1e-3}, progress=False)
    moved = (
        sum(
            float((p.detach() - b).square().sum()) for p, b in zip(clipped.model_core.parameters(), before, strict=True)
        )
        ** 0.5
    )
    assert moved == pytest.approx(1e-3, rel=1e-2)
    bad = [*DATA[:2], (X[:3], np.full((3, 1), np.nan)), DATA[3]]
    model, rates = make_model(), []

    class Notes(TorchModel):
        def do_train_step(self, *inputs, lr):
            rates.append(lr)
            return super().do_train_step(*inputs, lr=lr)

    model = make_model(Notes)
    state = train_model(model, bad, 1, .1, skip=OnNonFinite(factor=.5), progress=False)
    assert state.global_step == 4 and rates == [.1, .1, .1, .05]
    assert all(torch.isfinite(p).all() for p in model.model_core.parameters())


def test_two_steps_in_one(tmp_path):
    class Twice(TorchModel):
        def do_train_step(self, *inputs, lr):
            super().do_train_step(*inputs, lr=lr)
            return super().do_train_step(*inputs, lr=lr / 2)

    model = make_model(Twice, torch.optim.SGD)
    assert train_model(model, DATA, 2, .1, progress=False).global_step == 8
    by_hand = make_model(optimize=torch.optim.SGD)
    for x, y in DATA * 2:
        by_hand.do_train_step(x, y, lr=.1)
        by_hand.do_train_step(x, y, lr=.05)
    assert same_weights(model.model_core, by_hand.model_core)


def test_an_error_after_the_update_is_not_saved(tmp_path):
    """The weights have moved and the count of batches has not: going on must begin before the step."""
    class Fails(TorchModel):
        calls = 0

        def do_train_step(self, *inputs, lr):
            loss = super().do_train_step(*inputs, lr=lr)
            Fails.calls += 1
            if Fails.calls == 3:
                raise OSError("full")
            return loss

    model = make_model(Fails)
    with pytest.raises(OSError, match="full"):
        train_model(model, DATA, 2, .1, progress=False, checkpoints_path=tmp_path)
    train_model(model, DATA, 2, .1, progress=False, checkpoints_path=tmp_path)
    assert same_weights(model.model_core, plain_loop(2, [.1, .1]))


# ---- train_model ---------------------------------------------------------------------------------------------


def test_more_epochs_and_nothing_left(tmp_path, capsys):
    model = make_model()
    for epochs in (1, 3, 3):
        state = train_model(model, DATA, epochs, .1, checkpoints_path=tmp_path)
    assert state.epoch == 3 and same_weights(model.model_core, plain_loop(3, [.1] * 3))
    assert "Nothing left to train" in capsys.readouterr().out
    other = make_model()
    train_model(other, DATA, 3, .1, checkpoints_path=tmp_path, progress=False)
    assert same_weights(other.model_core, model.model_core)  # read from there
    with pytest.raises(Exception, match="another model"):
        train_model(
            TorchModel(nn.Linear(1, 1), nn.Identity(), nn.MSELoss(), torch.optim.Adam),
            DATA,
            3,
            0.1,
            checkpoints_path=tmp_path,
            progress=False,
        )


def test_without_paths_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    train_model(make_model(), DATA, 2, .1, progress=False)
    import gc
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    train_model(make_model(), DATA, 2, .1, progress=False, log_path=tmp_path / "logs")
    gc.collect()
    assert [p.name for p in tmp_path.iterdir()] == ["logs"] and len(RunLog(tmp_path / "logs").batches()["loss"]) == 8


@pytest.mark.parametrize(
    "hook", ["epoch_started", "train_step_started", "train_step_finished", "validation_started", "epoch_finished"]
)
def test_early_stopping_in_any_hook(tmp_path, hook):
    class Stops(Policy):
        calls = 0

    def stop(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 2:
            raise EarlyStopping(f"in {hook}")

    setattr(Stops, hook, stop)
    state = train_model(make_model(), DATA, 4, .1, progress=False, checkpoints_path=tmp_path, stops=Stops())
    assert state.finished["message"] == f"in {hook}"
    assert (
        state.global_step
        == {
            "epoch_started": 4,
            "train_step_started": 1,
            "train_step_finished": 2,
            "validation_started": 8,
            "epoch_finished": 8,
        }[hook]
    )
    assert TrainerState.load(tmp_path, line(), optimizer=torch.optim.Adam).global_step == state.global_step


def test_policies_are_told_and_given():
    told = []

    class Listens(Policy):
        def epoch_started(self, epoch): told.append(("epoch", epoch))
        def train_step_started(self, epoch, iteration): told.append(("step", iteration))
        def validation_started(self, epoch, train_losses): told.append(("validation", len(train_losses)))
        def epoch_finished(self, epoch, train_losses, metrics, policies):
            told.append(("end", metrics["score"], policies["weights"].value, policies["lr"].value, policies["flag"]))

    class Takes(TorchModel):
        def do_train_step(self, *inputs, lr, weights, flag):
            told.append((weights, flag))
            return super().do_train_step(*inputs, lr=lr)

    def validate():
        told.append("validate")
        return {"score": np.float32(0.5)}

    train_model(
        make_model(Takes),
        DATA[:1],
        2,
        0.1,
        validate=validate,
        progress=False,
        weights=Exponential(4, 0.5),
        listens=Listens(),
        flag="as it is",
    )
    assert told == [
        ("epoch", 0),
        ("step", 0),
        (4.0, "as it is"),
        ("validation", 1),
        "validate",
        ("end", 0.5, 4.0, 0.1, "as it is"),
        ("epoch", 1),
        ("step", 0),
        (2.0, "as it is"),
        ("validation", 1),
        "validate",
        ("end", 0.5, 2.0, 0.1, "as it is"),
    ]
    with pytest.raises(TypeError, match="not the class"):
        train_model(make_model(), DATA, 1, .1, stop=Listens)


@pytest.mark.parametrize("metrics, error, match", [
    ({"step": 1}, ValueError, "cannot be called step"), ({"image": np.zeros((2, 2))}, TypeError, "image is none"),
    ({"name": "text"}, TypeError, "name is none"), ([1], TypeError, "dict of metrics")])
def test_metrics_that_are_none(metrics, error, match):
    with pytest.raises(error, match=match):
        train_model(make_model(), DATA, 1, .1, validate=lambda: metrics, progress=False)


def test_the_best_is_by_the_validation_loss_if_there_is_one(tmp_path):
    values = iter([3.0, 1.0, 2.0])
    state = train_model(
        make_model(),
        DATA,
        3,
        0.1,
        validate=lambda: {"valid_loss": next(values)},
        checkpoints_path=tmp_path,
        progress=False,
    )
    assert state.best == {"epoch": 1, "loss": 1.0}


def test_loggers(tmp_path, capsys):
    steps = []

    class Listing(ConsoleLogger):
        def value(self, name, value, step):
            steps.append((name, step))
            super().value(name, value, step)

    logger = Listing()
    profile = tmp_path / "times.jsonl"
    train_model(
        make_model(),
        DATA,
        2,
        Exponential(0.1, 0.5),
        validate=lambda: {"score": 1},
        logger=logger,
        progress=False,
        steps=LoggerPolicy(logger),
        times=TimeProfiler(profile),
    )
    assert [s for n, s in steps if n == "train/loss"] == [0, 1, 2, 3, 0, 4, 5, 6, 7, 1]
    assert [(n, s) for n, s in steps if n != "train/loss"] == [
        ("policies/lr", 0),
        ("val/metrics/score", 0),
        ("policies/lr", 1),
        ("val/metrics/score", 1),
    ]
    assert "00001: policies/lr: 0.05" in capsys.readouterr().out
    times = [json.loads(line) for line in profile.read_text().splitlines()]
    assert [(t["index"], t["n_steps"]) for t in times] == [(0, 4), (1, 4)]
    assert all(t["epoch"] >= t["steps"] + t["validation"] > 0 and t["between"] >= 0 for t in times)
    bar = TQDM()
    train_model(make_model(), DATA, 1, .1, bar=bar)
    assert bar.total == 4 and "4/4" in capsys.readouterr().err


def test_what_validate_draws_is_the_same_after_a_resume(tmp_path):
    """From torch, NumPy and `random`; who draws after the training finds the generators as they were."""
    def drawn():
        return float(torch.rand(())) + np.random.rand() + random.random()  # noqa: NPY002

    def seed(n):
        torch.manual_seed(n)
        np.random.seed(n)  # noqa: NPY002
        random.seed(n)

    logs = {}
    for name, parts in {"whole": [3], "parts": [2, 3]}.items():
        for i, n_epochs in enumerate(parts):
            seed(i + len(name))
            expected, model = drawn(), make_model()
            seed(i + len(name))
            train_model(model, DATA, n_epochs, .1, checkpoints_path=tmp_path / name, progress=False,
                        validate=lambda: {"score": drawn()})
            assert drawn() == expected
        logs[name] = [r["score"] for r in RunLog(tmp_path / name).records("epoch")]
    assert logs["whole"] == logs["parts"] and len(logs["whole"]) == 3


def test_interrupted_streams_lose_nothing(tmp_path):
    """A generator that was read ahead of the training, in the same session."""
    def stream():
        yield from ((X[k % 4::4], X[k % 4::4] * k) for k in itertools.count())

    whole = make_model()
    train_model(whole, stream(), 2, .01, batches_per_epoch=10, progress=False)

    class Breaks(Policy):
        def train_step_finished(self, epoch, iteration, loss):
            if (epoch, iteration) == (1, 3) and not broken:
                broken.append(1)
                raise OSError("something bad")

    broken, source, model = [], as_batch_iter(stream(), 10), make_model()
    with pytest.raises(OSError):
        train_model(
            model, source, 2, 0.01, checkpoints_path=tmp_path, breaks=Breaks(), progress=False, options={"prefetch": 4}
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_model(model, source, 2, .01, checkpoints_path=tmp_path, breaks=Breaks(), progress=False)
    assert same_weights(model.model_core, whole.model_core)
    other = make_model()  # in a new session: a new generator
    (tmp_path / "step-00000020.ckpt").unlink()
    with pytest.warns(UserWarning, match="4 items|14 items|13 items"):
        train_model(
            other, stream(), 2, 0.01, batches_per_epoch=10, checkpoints_path=tmp_path, breaks=Breaks(), progress=False
        )
    assert same_weights(other.model_core, whole.model_core)


def test_other_batches_in_the_midst_of_an_epoch_are_refused(tmp_path):
    class Breaks(Policy):
        def train_step_finished(self, epoch, iteration, loss):
            if iteration == 2:
                raise OSError

    def batches(seed):
        return Infinite(
            load_by_random_id(loaded([]), ids=range(9), random_state=seed),
            lambda x: (x, x),
            batch_size=2,
            batches_per_epoch=5,
        )

    with pytest.raises(OSError):
        train_model(make_model(), batches(1), 1, .1, checkpoints_path=tmp_path, b=Breaks(), progress=False)
    with pytest.raises(ValueError, match="batches are not this sampler's"):
        train_model(make_model(), batches(2), 1, .1, checkpoints_path=tmp_path, b=Breaks(), progress=False)


@pytest.mark.filterwarnings("ignore:Dropout draws")
def test_step_by_step_and_in_the_background(tmp_path):
    whole = functional_child.train(str(tmp_path / "whole"))

    def make(name):
        model = TorchModel(make_core(), nn.Softmax(-1), nn.CrossEntropyLoss(), torch.optim.AdamW)
        return ModelTrainer(
            model, make_batches(), EPOCHS, 0.02, checkpoints_path=tmp_path / name, progress=False, num_threads=1
        )

    cell, background = make("cell"), make("background")
    cell.train_and_validate()
    background.step(4)
    background.step(3)
    background.resume()
    background.wait()
    assert same_states(cell.state, background.state) == [] and log_without_time(cell.log) == log_without_time(
        background.log
    )
    assert same_states(cell.state, whole) != []


def test_ctrl_c_ends_after_the_batch(tmp_path):
    """The first interrupt ends after the batch, saves, and returns; the same call goes on."""
    class Interrupts(Policy):
        remembers = ()

        def train_step_finished(self, epoch, iteration, loss):
            if (epoch, iteration) == (0, 2):
                signal.raise_signal(signal.SIGINT)

    model = make_model()
    state = train_model(model, DATA, 2, .1, checkpoints_path=tmp_path, i=Interrupts(), progress=False)
    assert state.global_step == 3 and state.finished is None
    train_model(model, DATA, 2, .1, checkpoints_path=tmp_path, i=Interrupts(), progress=False)
    assert same_weights(model.model_core, plain_loop(2, [.1, .1]))


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    model = make_model()
    model = TorchModel(
        model.model_core, nn.Identity(), nn.CrossEntropyLoss(weight=torch.ones(1)), torch.optim.Adam, cuda=True
    )
    assert model.device.type == "cuda" and model.logits2loss.weight.is_cuda
    model.logits2loss = nn.MSELoss()
    train_model(model, DATA, 3, .1, checkpoints_path=tmp_path, progress=False)
    core = plain_loop(3, [.1] * 3)
    np.testing.assert_allclose(
        model.do_inf_step(X), core(torch.tensor(X, dtype=torch.float32)).detach().numpy(), atol=1e-4
    )
