"""Run by test_packaging.py under other versions of torch: python every_op.py VERSION KERNEL ..."""

import sys
from pathlib import Path

import torch

import keeplora
from keeplora.ops import build_info, project_rows
from keeplora.ops.declare import OPS

# Samples are small: a dozen roundings of sums of tens of numbers, and rounded float32 inputs that both sides share.
TOLERANCE = 2e-5


def widened(tree):
    if isinstance(tree, torch.Tensor):
        copy = tree.detach().clone()
        return copy.double() if copy.is_floating_point() else copy
    return type(tree)(map(widened, tree)) if isinstance(tree, list | tuple) else tree


def narrowed(tree, like):
    if isinstance(tree, torch.Tensor):
        return tree.to(like.dtype)
    return type(tree)(map(narrowed, tree, like)) if isinstance(tree, list | tuple) else tree


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [t for item in tree for t in tensors(item)] if isinstance(tree, list | tuple) else []


def main(version, kernels):
    assert torch.__version__.split("+")[0] == version, f"got torch {torch.__version__} from {torch.__file__}"
    assert Path(keeplora.__file__).parent.parent.name == "unpacked", keeplora.__file__
    assert torch.version.cuda is None or set(kernels) <= set(build_info()["kernels"])
    torch.manual_seed(0)
    for name, op in OPS.items():
        for sample in op.samples(torch.device("cpu"), torch.float32):
            exact = widened(sample)
            inputs = narrowed(exact, sample)
            outputs, expected = op.call(*inputs), op.reference(*exact)
            pairs = list(zip(tensors([outputs, inputs]), tensors([expected, exact]), strict=True))
            assert pairs
            for actual, truth in pairs:
                difference = (actual.double() - truth.double()).abs().max().item() if truth.numel() else 0.0
                assert difference <= TOLERANCE * max(1.0, truth.abs().max().item() if truth.numel() else 0.0), name
        if torch.version.cuda is not None and name in kernels:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"keeplora::{name}", "CUDA"), name
    assert not torch.cuda.is_initialized()

    g = torch.randn(2, 5, requires_grad=True)
    rows, _ = project_rows([g], [torch.eye(5)[:, :2]], scale=0.5)
    rows[0].sum().backward()
    assert torch.equal(g.grad, torch.tensor([0, 0, 0.5, 0.5, 0.5]).expand(2, 5))
    print(f"torch {torch.__version__}: {len(OPS)} ops")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
