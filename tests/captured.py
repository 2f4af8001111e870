"""A call as a captured CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor


def captured(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Capture a call that was made before, and once more on the stream to capture: the graph, and its results."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        found = run()
    return graph, found
