"""What is no number never makes a plausible one: every op, called as users do, shows it in what it returns or writes.

Kernels and references alike: on a GPU these are the kernels.
"""

import pytest
import torch
from ops.calls import clone, tensors

from keeplora.ops import (
    gram,
    lora_grad_b,
    merge_weights,
    orthonormalize,
    project_rows,
    projected_adamw,
    sketch_rows,
    thin_matmul,
)
from keeplora.ops.declare import OPS


def every_fourth(place, *which):
    """The numbers of each adapter in an op's ``place``."""
    return list(zip(*(place[i::4] for i in which), strict=True))


# From the dispatcher's arguments, which every op has samples of.
PUBLIC = {
    "gram": lambda out, energy, x: gram(x, out=out, energy=energy),
    "lora_grad_b": lambda dy, t, place, scale: lora_grad_b(
        dy, t, columns=every_fourth(place, 0, 1), rows=every_fourth(place, 2, 3), scale=scale
    ),
    "merge_weights": lambda w, a, b, origin, place, scale, stack, dtype: merge_weights(
        w,
        a,
        b,
        scale=scale,
        dtype=dtype,
        places=every_fourth(place, 0, 1, 2),
        origin=[None if i < 0 else origin[i] for i in place[3::4]],
    ),
    "orthonormalize": orthonormalize,
    "project_rows": lambda g, q, scale, passes: project_rows(g, q, scale=scale, passes=passes),
    "projected_adamw": lambda a, grad, m, v, q, step, lr, beta1, beta2, eps, decay: projected_adamw(
        a, grad, m, v, q, step=step, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay
    ),
    "sketch_rows": lambda out, x, delta, seed: sketch_rows(x, delta, width=len(out), seed=seed, out=out),
    "thin_matmul": lambda x, a, scale: thin_matmul(x, a, scale=scale),
}
STEPS = [(0, 5), (1, 15), (1, 16), (1, 17)]
# Where nothing depends on the number.
UNUSED = {
    ("project_rows", 1, 7): "q of a matrix without rows",
    ("orthonormalize", 1, 5): "q of a matrix without columns",
    ("thin_matmul", 2, 1): "a of an x without rows",
    **{("projected_adamw", which, i): "a step, so late that no bias is left to correct" for which, i in STEPS},
}


def test_every_op_is_here():
    assert PUBLIC.keys() == OPS.keys()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_no_number_in_no_number_out(op, value, device):
    torch.manual_seed(0)
    written = [i for i, arg in enumerate(op.call._schema.arguments) if arg.alias_info and arg.alias_info.is_write]
    tried = 0
    for which, sample in enumerate(op.samples(device, torch.float32)):
        for i, tensor in enumerate(tensors(sample)):
            if not tensor.numel() or (op.name, which, i) in UNUSED:
                continue
            for place in (0, tensor.numel() - 1):
                args = clone(sample)
                spoiled = tensors(args)[i]
                at = torch.unravel_index(torch.tensor(place), spoiled.shape)
                spoiled[at] = value
                results = tensors([PUBLIC[op.name](*args), [args[w] for w in written]])
                shown = any(not result.isfinite().all() for result in results)
                assert shown, f"sample {which}, tensor {i}, number {place}"
                tried += 1
    assert tried


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("spoil", ["y", "q"])
def test_only_the_problem_with_it_is_lost_and_all_of_that(spoil, value, device):
    shapes = [(9, 3, 2), (7, 5, 0), (9, 4, 3), (6, 0, 2), (5, 1, 1)]
    y = [torch.randn(d, width, device=device) for d, width, _ in shapes]
    q = [torch.linalg.qr(torch.randn(d, d, device=device)).Q[:, :k] for d, _, k in shapes]
    expected, ranks = orthonormalize(y, q)
    {"y": y, "q": q}[spoil][2][1, 1] = value
    z, rank = orthonormalize(y, q)
    assert z[2].isnan().all()
    assert rank[2] == 4
    for i in (0, 1, 3, 4):
        assert torch.equal(z[i], expected[i])
        assert rank[i] == ranks[i]


def test_a_large_number_is_one(device):
    y = torch.tensor([[3e38, 0.0], [3e38, 1e38], [0.0, 0.0]], device=device)
    (z,), rank = orthonormalize([y])
    assert rank.tolist() == [2]
    assert z.isfinite().all()
