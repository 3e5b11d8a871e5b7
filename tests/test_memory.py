"""Memory of results is taken again where nobody holds it, and only there."""

import threading

import pytest
import torch

import fxhess
from fxhess import _recycled, memory
from fxhess._recycled import Recycled

SHAPE = (7, 50, 50)
SIZE = 7 * 50 * 50 * 4


@pytest.fixture
def results():
    assert _recycled._COUNTS
    return Recycled(3 * SIZE)


def place(results, shape=SHAPE, dtype=torch.float32):
    """Where a result lies that is dropped at once."""
    return results.empty(shape, dtype, lambda _: None).data_ptr()


def test_memory_of_a_dropped_result_is_taken_again(results):
    fetched = []
    first = results.empty(SHAPE, torch.float32, fetched.append)
    assert first.is_contiguous() and first.shape == SHAPE and not first._is_view()
    where = first.data_ptr()
    fetched.clear()
    second = results.empty(SHAPE, torch.float32, fetched.append)
    assert second.data_ptr() != where and len(fetched) == 1
    del first
    fetched.clear()
    third = results.empty((50, 7, 50), torch.int32, fetched.append)  # as many bytes
    assert third.data_ptr() == where and not fetched
    assert place(results, (7, 50, 51)) not in (where, second.data_ptr())


HOLDERS = {
    "the tensor": lambda t: t,
    "a view": lambda t: t[3:, ::2].mT,
    "an array": lambda t: t.numpy(),
    "a view of an array": lambda t: t.numpy()[2:],
    "its storage": lambda t: t.untyped_storage(),
    "its typed storage": lambda t: t.storage(),
    "a detached one": lambda t: t.detach(),
    "a capsule": torch.utils.dlpack.to_dlpack,
    "a buffer": lambda t: memoryview(t.numpy()),
    "what backward needs": lambda t: (t * torch.ones((), requires_grad=True)).grad_fn,
    "a parameter": torch.nn.Parameter,
    "a list": lambda t: [t],
}


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_held_memory_is_not(results, name):
    result = results.empty(SHAPE, torch.float32, lambda _: None).fill_(3.0)
    where = result.data_ptr()
    holder = HOLDERS[name](result)
    del result
    assert place(results) != where
    assert place(results) != where
    del holder
    found = {place(results)}
    other = results.empty(SHAPE, torch.float32, lambda _: None)
    found |= {place(results), other.data_ptr()}
    assert where in found


def test_shared_and_resized_memory_is_not(results):
    shared = results.empty(SHAPE, torch.float32, lambda _: None)
    where = shared.share_memory_().data_ptr()
    del shared
    assert place(results) != where
    resized = results.empty(SHAPE, torch.float32, lambda _: None)
    resized.untyped_storage().resize_(2 * SIZE)
    where = resized.data_ptr()
    del resized
    assert place(results) != where


def test_results_sent_to_another_process_stay(results):
    context = torch.multiprocessing.get_context("spawn")
    queue, done = context.Queue(), context.Queue()
    sender = context.Process(target=_forward, args=(queue, done))
    sender.start()
    got = [queue.get(timeout=120) for _ in range(4)]
    assert [float(t.mean()) for t in got] == [0.0, 1.0, 2.0, 3.0]
    assert [float(t.amax()) for t in got] == [0.0, 1.0, 2.0, 3.0]
    done.put(None)
    sender.join()


def _forward(queue, done):
    memory._LARGE = 1 << 10
    for i in range(4):
        queue.put(memory.empty(SHAPE, torch.float32, torch.device("cpu")).fill_(float(i)))
    done.get()


def test_no_more_is_kept_than_allowed(results):
    held = [results.empty(SHAPE, torch.float32, lambda _: None) for _ in range(5)]
    places = [t.data_ptr() for t in held]
    assert len(set(places)) == 5
    assert len(results._blocks) == 3  # the others were forgotten, and are the callers' alone
    assert place(results, (8, 50, 50, 10)) not in places
    assert len(results._blocks) == 3
    results.release()
    assert results._blocks == []
    assert [float(t.fill_(i).mean()) for i, t in enumerate(held)] == [0, 1, 2, 3, 4]


def test_threads_have_memory_of_their_own(results):
    wrong = []

    def work(i):
        for k in range(60):
            t = results.empty(SHAPE, torch.float32, lambda _: None).fill_(1000.0 * i + k)
            if bool((t != 1000.0 * i + k).any()):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_results_of_calls(monkeypatch):
    monkeypatch.setattr(memory, "_LARGE", 1 << 10)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    hess = fxhess.transform(model.requires_grad_(False))
    x = torch.randn(600, 40)
    kept, copies = [], []
    for i in range(4):
        kept.append(hess(x + i))
        copies.append(kept[-1].clone())
        hess(x - i)  # dropped
    assert all(map(torch.equal, kept, copies))
    dropped = hess(x).data_ptr()
    assert hess(x).data_ptr() == dropped
    fxhess.cache_clear()
    assert memory._recycled.results._blocks == []


def test_without_a_count_nothing_is_taken_again(monkeypatch):
    monkeypatch.setattr(_recycled, "_COUNTS", False)
    results = Recycled()
    place(results)
    assert results._blocks == []


def test_where_there_is_no_memory_what_is_kept_is_given_back(monkeypatch):
    calls = []

    class Full:
        def empty(self, *_):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        def release(self):
            calls.append("released")

    monkeypatch.setattr(memory, "_LARGE", 1 << 10)
    monkeypatch.setattr(_recycled, "results", Full())
    assert memory.empty(SHAPE, torch.float32, torch.device("cpu")).shape == SHAPE
    assert calls == ["released"]
