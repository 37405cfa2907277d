"""Every op, in every circumstance it may be called in, within its bound of float64; and gradients through ops."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import torch
from every_op import narrowed, tensors, widened
from ops.calls import clone
from ops.test_every_op import EVERY_OP
from ops.test_precision import LARGE, moved
from precision import FASTER

from keeplora.ops import merge_weights, project_rows, thin_matmul

THREADS = 3


def compiled(call):
    torch._dynamo.reset()
    return torch.compile(lambda *args: call(*args), backend="aot_eager")


def together(call):
    """The call in several threads at once, each with tensors of its own and in a mode of its own."""
    ready = threading.Barrier(THREADS)

    def one(args, mode):
        with mode():
            ready.wait(30)
            for _ in range(4):
                mine = clone(args)
                result = call(*mine)
        return result, mine

    def run(*args):
        modes = [FASTER["autocast"], torch.inference_mode, torch.no_grad]
        with ThreadPoolExecutor(THREADS) as pool:
            running = [pool.submit(one, args, mode) for mode in modes]
            *others, (result, mine) = [future.result() for future in running]
        for other in others:
            assert all(map(torch.equal, tensors(other), tensors((result, mine))))
        for given, written in zip(tensors(args), tensors(mine), strict=True):
            given.copy_(written)
        return result

    return run


@contextmanager
def half():
    with torch.autocast("cpu", torch.float16):
        yield


# What is around the call, and how it is called.
WAYS = {
    **{name: ((faster,), None) for name, faster in FASTER.items()},
    "autocast to float16": ((half,), None),
    "inference mode": ((torch.inference_mode,), None),
    "no gradients": ((torch.no_grad,), None),
    "inference mode in autocast": ((FASTER["autocast"], torch.inference_mode), None),
    "compiled": ((), compiled),
    "compiled in autocast": ((FASTER["autocast"],), compiled),
    "threads": ((), together),
    "threads with a faster setting": ((FASTER["older"],), together),
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


def bound(truth, terms):
    """Rounded inputs are shared; what remains are the roundings of sums of so many terms, and a dozen steps."""
    size = max(1.0, truth.abs().max().item() if truth.numel() else 0.0)
    return 12 * (terms**0.5 + 2) * torch.finfo(torch.float32).eps * size


@EVERY_OP
@EVERY_WAY
def test_within_its_bound_of_float64(op, way, device):
    around, made = WAYS[way]
    call = op.call if made is None else made(op.call)
    samples = op.samples(device, torch.float32)[:1] if made is compiled else op.samples(device, torch.float32)
    for sample in [*samples, moved(LARGE[op.name](), device)]:
        exact = widened(sample)
        inputs = narrowed(exact, sample)
        terms = max(max(tensor.shape, default=1) for tensor in tensors(exact))
        with ExitStack() as stack:
            for context in around:
                stack.enter_context(context())
            outputs = call(*inputs)
        expected = op.reference(*exact)
        pairs = list(zip(tensors([outputs, inputs]), tensors([expected, exact]), strict=True))
        assert pairs
        for actual, truth in pairs:
            assert actual.shape == truth.shape
            difference = (actual.double() - truth.double()).abs().max().item() if truth.numel() else 0.0
            assert difference <= bound(truth, terms), way


def basis(d, k):
    return torch.linalg.qr(torch.randn(d, k, dtype=torch.float64)).Q


GRADIENTS = {
    "thin_matmul": (lambda x, a: thin_matmul(x, a, scale=0.5), (256, 96), (48, 96)),
    "merge_weights": (lambda w, a, b: merge_weights([w], [a], [b], scale=0.5)[0], (64, 96), (48, 96), (64, 48)),
    "project_rows": (lambda g: project_rows([g], [BASIS.to(g)], scale=0.5)[0][0], (64, 96)),
}
BASIS = basis(96, 40)


NO_GRADIENTS = {"inference mode", "no gradients", "inference mode in autocast"}
ONE_THREAD = [name for name, (_, made) in WAYS.items() if made is not together and name not in NO_GRADIENTS]


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize(
    ("order", "way"), [(order, way) for order in (1, 2) for way in ONE_THREAD if order == 1 or "compiled" not in way]
)
def test_gradients_are_within_their_bound_of_float64(name, order, way):
    """Those that are asked for inside of autocast too, as where the whole loop stands in it."""
    around, made = WAYS[way]
    function, *shapes = GRADIENTS[name]
    values = [torch.randn(shape) for shape in shapes]
    result = function(*values)
    weights, pulls = torch.randn_like(result), [torch.randn(shape) for shape in shapes]

    def gradients(dtype, call):
        leaves = [value.to(dtype).requires_grad_() for value in values]
        loss = (call(*leaves) * weights.to(dtype)).sum()
        found = torch.autograd.grad(loss, leaves, create_graph=order == 2)
        if order == 1:
            return found
        again = sum((g * pull.to(dtype)).sum() for g, pull in zip(found, pulls, strict=True))
        if not again.requires_grad:  # linear
            return [torch.zeros(1)]
        return torch.autograd.grad(again, leaves, allow_unused=True)

    exact = gradients(torch.float64, function)
    with ExitStack() as stack:
        for context in around:
            stack.enter_context(context())
        got = gradients(torch.float32, function if made is None else made(function))
    for actual, truth in zip(got, exact, strict=True):
        assert (actual is None) == (truth is None)
        if truth is not None:
            assert (actual.double() - truth).abs().max() <= bound(truth, 256)
