"""The contract every declared op keeps. A new op is covered the moment it is declared."""

import pytest
import torch

import keeplora.ops
from keeplora.ops.declare import OPS

EVERY_OP = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)


def clone(args):
    if isinstance(args, torch.Tensor):
        return args.detach().clone()
    return type(args)(clone(arg) for arg in args) if isinstance(args, list | tuple) else args


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [t for item in tree for t in tensors(item)] if isinstance(tree, list | tuple) else []


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
    assert all(part in function.__doc__ for part in (".. math::", "Args:", "Returns:", "Raises:", "Source:", ">>>"))
    assert (request.path.parent / f"test_{op.name}.py").exists()
