"""Calls captured once in a CUDA graph and then replayed: what a call costs without the host's part in it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

__all__ = ["captured", "in_graph"]


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """Run ``call`` once, so that what it makes and keeps is there, capture it, and give what replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], None] = graph.replay
    return replay


def in_graph(call: Callable[..., Any]) -> Callable[..., None]:
    """A provider that replays ``call``. The last of its arguments is a dict, which holds the graph of these arguments.

    So a graph lives as long as what it was captured with.
    """

    def provider(*arguments: Any) -> None:
        graphs = arguments[-1]
        if call not in graphs:
            graphs[call] = captured(partial(call, *arguments))
        graphs[call]()

    return provider
