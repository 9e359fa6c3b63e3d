"""Layers and optimizers among threads, and how they end."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
from test_numpy_level import normal

import onebit_ext as ob


def test_a_busy_layer_refuses_and_keeps_its_state() -> None:
    layer = ob.TernaryLinear(2048, 2048, seed=1)
    opt = ob.FlipOptimizer([layer])
    x, dy = normal(1, 512, 2048), normal(2, 512, 2048)
    ob.set_num_threads(1)
    refused: list[str] = []
    started, done = threading.Event(), threading.Event()

    def train() -> None:
        for _ in range(4):
            layer.forward(x)
            started.set()
            layer.backward(dy)
        done.set()

    worker = threading.Thread(target=train)
    worker.start()
    started.wait()
    while not done.is_set():
        for call in (
            lambda: layer.forward(x[:1], keep=False),
            opt.zero_grad,
            opt.state_dict,
            lambda: setattr(opt, "lr", 0.1),
        ):
            try:
                call()
            except RuntimeError as error:
                refused.append(str(error))
    worker.join()
    assert refused and all("busy in another thread" in text for text in refused)
    layer.forward(x[:1])
    layer.backward(dy[:1])


def test_many_readers_at_once() -> None:
    layer = ob.TernaryLinear(256, 256, seed=1)
    x = normal(1, 64, 256)
    wanted = layer.forward(x, keep=False)
    wrong: list[int] = []

    def read() -> None:
        for i in range(50):
            if not np.array_equal(layer.forward(x, keep=False), wanted):
                wrong.append(i)

    workers = [threading.Thread(target=read) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_the_gil_is_free_while_a_kernel_runs() -> None:
    layer = ob.TernaryLinear(2048, 4096, seed=1)
    x = normal(1, 1024, 2048)
    ob.set_num_threads(1)
    ticks, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            ticks[0] += 1

    worker = threading.Thread(target=count)
    worker.start()
    before = ticks[0]
    layer.forward(x, keep=False)
    counted = ticks[0] - before
    stop.set()
    worker.join()
    assert counted > 0


def test_an_optimizer_may_die_while_its_layer_runs() -> None:
    layer, opt = ob.TernaryLinear(1024, 1024, seed=1), None
    x, dy = normal(1, 256, 1024), normal(2, 256, 1024)
    for _ in range(10):
        opt = ob.FlipOptimizer([layer])
        layer.forward(x)
        worker = threading.Thread(target=layer.backward, args=(dy,))
        worker.start()
        del opt
        gc.collect()
        worker.join()
    assert layer.planes is None


def test_cycles_are_collected() -> None:
    class Holder:
        pass

    holder = Holder()
    holder.layers = [ob.TernaryLinear(8, 8), ob.TernaryLinear(8, 8)]  # type: ignore[attr-defined]
    holder.opt = ob.FlipOptimizer(holder.layers)  # type: ignore[attr-defined]
    holder.self = holder  # type: ignore[attr-defined]
    dead = weakref.ref(holder)
    live = ob.memory()["live"]
    del holder
    gc.collect()
    assert dead() is None and ob.memory()["live"] < live
    assert gc.is_tracked(ob.TernaryLinear(8, 8)) and gc.is_tracked(ob.FlipOptimizer([]))
