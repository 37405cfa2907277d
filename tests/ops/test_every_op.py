"""The contract every declared op keeps. A new op is covered the moment it is declared."""

from pathlib import Path

import pytest
import torch
from ops.calls import CALLS, clone, overwrite, tensors

import keeplora.ops
from keeplora.ops.declare import OPS

KERNELS = {path.stem for path in (Path(__file__).parents[2] / "csrc" / "bind" / "cuda").glob("*.cpp")}
EVERY_OP = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids=str)
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; bench/gpu.sh runs it on one")


def run(call, args):
    """Everything a call produces: its outputs and, for ops that write in place, its arguments afterwards."""
    args = clone(args)
    return tensors([call(*args), args])


@EVERY_OP
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_registration(op, dtype, device):
    for args in op.samples(device, dtype):
        torch.library.opcheck(op.call, args)


@EVERY_OP
def test_compiled_kernel_agrees_with_reference(op, device):
    for args in op.samples(device, torch.float64):
        for actual, expected in zip(run(op.call, args), run(op.reference, args), strict=True):
            torch.testing.assert_close(actual, expected)


@EVERY_OP
def test_same_bits_every_time(op, device):
    for args in op.samples(device, torch.float32):
        first = run(op.call, args)
        assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(first, run(op.call, args), strict=True))


@EVERY_OP
def test_compiles_in_one_graph(op, device):
    compiled = torch.compile(lambda *args: op.call(*args), fullgraph=True, backend="aot_eager")
    for args in op.samples(device, torch.float32):
        torch._dynamo.reset()
        assert all(torch.equal(a, b) for a, b in zip(run(compiled, args), run(op.call, args), strict=True))


@EVERY_OP
def test_writes_in_place_only_where_declared(op, device):
    declared = [bool(arg.alias_info and arg.alias_info.is_write) for arg in op.call._schema.arguments]
    for args in op.samples(device, torch.float32):
        versions = [[t._version for t in tensors([arg])] for arg in args]
        with torch.no_grad():
            op.call(*args)
        for arg, before, writes in zip(args, versions, declared, strict=True):
            if not writes:
                assert [t._version for t in tensors([arg])] == before
            else:  # autograd must be able to notice
                assert all(t._version > version for t, version in zip(tensors([arg]), before, strict=True))


@EVERY_OP
def test_is_public_and_has_its_own_test_file(op, request):
    function = getattr(keeplora.ops, op.name)
    assert all(part in function.__doc__ for part in ("$$", "Args:", "Returns:", "Raises:", "Source:", ">>>"))
    assert (request.path.parent / f"test_{op.name}.py").exists()


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_calls_of_every_kernel_are_there():
    assert {call.op for call in CALLS} == KERNELS


@EVERY_CALL
def test_calls_tell_their_seeds_apart(call, device):
    """What the tests on streams and graphs rely on, on every device."""
    arguments, others = call.arguments(device), call.arguments(device, seed=1)
    inputs = len(tensors(others))
    first, expected = call.run(clone(arguments)), call.run(clone(others))
    assert not equal(first[:-inputs], expected[:-inputs])
    overwrite(arguments, others)
    assert equal(call.run(arguments), expected)


@ON_A_GPU
@EVERY_CALL
def test_cuda_kernel_follows_the_current_stream_and_does_not_wait(call):
    arguments, others = call.arguments("cuda"), call.arguments("cuda", seed=1)
    expected = call.run(clone(others))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            # In another stream the kernel would not wait for these, and read the old numbers.
            torch.cuda._sleep(50_000_000)
            overwrite(arguments, others)
            results = call.run(arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert equal(results, expected)


@ON_A_GPU
@EVERY_CALL
def test_cuda_kernel_replays_in_a_graph(call):
    arguments, others = call.arguments("cuda"), call.arguments("cuda", seed=1)
    call.run(clone(arguments))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.run(arguments)
    overwrite(arguments, others)
    for _ in range(3):  # an op that writes in place goes on from where it was
        graph.replay()
        expected = call.run(others)
    torch.cuda.synchronize()
    assert equal(results, expected)
