import threading

import pytest
import torch

from sd_mini.cpu import threads
from sd_mini.cpu.threads import in_threads
from training.optim import optimizer


def test_calls_run_side_by_side_on_one_core_each_and_keep_their_order():
    meet = threading.Barrier(2, timeout=20)

    def call(number):
        meet.wait()  # which one thread alone would never pass
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    before = torch.get_num_threads()
    assert in_threads([lambda: call(0), lambda: call(1)]) == [(0, 1, False), (1, 1, False)]
    assert torch.get_num_threads() == before and torch.is_grad_enabled()


def test_what_another_thread_sets_later_changes_nothing():
    """torch keeps the number that was last set in any thread for those that have not asked yet."""
    threads._pool.cache_clear()
    begun, changed = threading.Barrier(3, timeout=20), threading.Event()

    def call():
        begun.wait()
        changed.wait(20)
        return torch.get_num_threads()

    def change():
        begun.wait()
        torch.set_num_threads(7)
        changed.set()

    other = threading.Thread(target=change)
    other.start()
    found = in_threads([call, call])
    other.join()
    torch.set_num_threads(torch.get_num_threads())  # what is kept for others is this thread's again
    assert found == [1, 1]


def test_what_a_call_raises_is_raised():
    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        in_threads([lambda: 1, fail])


def test_an_update_in_two_threads_is_the_update_in_one():
    def updated(threads):
        torch.manual_seed(0)
        network = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(8, 24)]) for _ in range(3)])
        made = optimizer.build(network, optimizer.OptimizerConfig(muon_lr=0.02))
        made.create_state()
        torch.set_num_threads(threads)
        for _ in range(3):
            for parameter in network.parameters():
                parameter.grad = torch.randn_like(parameter)
            made.step()
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    before = torch.get_num_threads()
    try:
        torch.testing.assert_close(updated(2), updated(1), rtol=0, atol=1e-6)
    finally:
        torch.set_num_threads(before)
