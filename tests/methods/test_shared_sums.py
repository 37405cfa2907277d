"""Sums of rows that lie in several processes: nobody waits for one that has failed."""

import torch

from keeplora.lora.shares import LocalRows
from keeplora.methods import shared_sums


class Recorded:
    """The one process there is, and what it was called for."""

    def __init__(self):
        self.calls = []

    def gather(self, value):
        self.calls.append("gather")
        return [value]

    def add(self, tensor):
        self.calls.append("add")


def test_failures_are_asked_for_before_sums_are_added_up(monkeypatch):
    peers = Recorded()
    monkeypatch.setattr(shared_sums, "processes", lambda: peers)
    weights = [(LocalRows(torch.randn(4, 3), 0), (4, 3)), (LocalRows(torch.randn(2, 5), 0), (2, 5))]
    assert len(set(shared_sums.sums_everywhere(weights))) == 2
    assert peers.calls == ["gather", "add"]
    assert shared_sums.sums_everywhere([]) == []
