"""One hash of every value: of any dtype, layout and device, in blocks, remembered where that is safe."""

import copy
import gc

import pytest
import torch
from torch import nn

from keeplora.math import digest as module
from keeplora.math.digest import BLOCK, digest, sums, sums_of_rows

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8,
          torch.bool, torch.complex64)  # fmt: skip
SIZES = 0, 1, 3, 5, 4 * BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7


def drawn(size, dtype):
    g = torch.Generator().manual_seed(size)
    return (torch.randn(size, generator=g).abs() * 100).to(torch.uint8 if dtype is torch.bool else dtype).to(dtype)


def of(tensor, **options):
    return digest([("x", tensor)], **options)


def flipped(tensor, place, bit):
    """With one bit of one byte another."""
    changed = tensor.clone()
    changed.view(torch.uint8)[place] ^= 1 << bit
    return changed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_counts_wherever_it_is(dtype):
    for size in SIZES:
        tensor = drawn(size, dtype)
        before = of(tensor)
        assert of(tensor.clone()) == of(tensor, remembered=True) == before
        number = tensor.numel() * tensor.element_size()
        for place in {0, number // 2, number - 1} & set(range(number)):
            for bit in (0, 7) if dtype is not torch.bool else ():
                assert of(flipped(tensor, place, bit)) != before


def test_signs_rows_and_pairs_that_cancel_count():
    tensor = drawn(4 * BLOCK, torch.float32).view(-1, 64)
    before = of(tensor)
    for rows in ([1, 0], [0, 2]):
        swapped = tensor.clone()
        swapped[: len(rows)] = tensor[rows]
        assert of(swapped) != before
    signs = tensor.clone()
    signs[5, 3].neg_()
    signs[900, 1].neg_()
    assert of(signs) != before
    pair = tensor.clone().view(torch.int32)
    pair[0, 0] += 1
    pair[0, 1] -= 1
    assert of(pair.view(torch.float32)) != before


def test_names_shapes_and_dtypes_count():
    tensor = torch.zeros(4, 6)
    others = [("y", tensor), ("x", tensor.view(6, 4)), ("x", tensor.view(torch.int32)), ("x", tensor.flatten())]
    assert len({digest([pair]) for pair in [("x", tensor), *others]}) == 5


def test_layouts_do_not():
    tensor = drawn(6 * 40, torch.float32).view(6, 40)
    wide = torch.zeros(6, 41)
    wide[:, 1:] = tensor
    assert of(tensor.T.contiguous().T) == of(wide[:, 1:]) == of(wide[:, 1:], remembered=True) == of(tensor)
    assert of(nn.Parameter(tensor)) == of(tensor)
    odd = torch.zeros(33, dtype=torch.uint8)
    odd[1:] = torch.arange(32)
    assert of(odd[1:]) == of(torch.arange(32, dtype=torch.uint8)) == of(odd[1:], remembered=True)


def test_it_is_the_same_in_every_way_of_computing_it(monkeypatch):
    tensor = drawn(3 * BLOCK + 5, torch.float32)
    before = of(tensor)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert of(tensor) == before
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert of(tensor) == before
    words, total = tensor.view(torch.int32).tolist(), []
    factors = module._factors(torch.device("cpu")).tolist()
    for start in range(0, len(words), BLOCK):
        part = sum(v * m for v, m in zip(words[start : start + BLOCK], factors, strict=False)) % 2**64
        total.append(part)
    got = torch.frombuffer(bytearray(module._sums(tensor)), dtype=torch.int64)
    assert [value % 2**64 for value in got.tolist()] == total


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_is_the_same_on_a_gpu():
    for dtype in DTYPES:
        tensor = drawn(2 * BLOCK + 7, dtype)
        assert of(tensor.cuda()) == of(tensor)


def test_meta_tensors_have_no_values():
    assert of(torch.empty(3, device="meta")) == of(torch.empty(3, device="meta"))


def test_what_is_remembered_is_computed_once_and_never_stale(monkeypatch):
    calls, own = [], module._sums
    monkeypatch.setattr(module, "_sums", lambda weight: (calls.append(1), own(weight))[1])
    weight = nn.Parameter(drawn(BLOCK, torch.float32))
    first = of(weight, remembered=True)
    assert of(weight, remembered=True) == first
    assert len(calls) == 1
    weight.data[7] += 1  # no version counter sees it
    assert of(weight, remembered=True) == of(weight) != first
    weight.data[7] -= 1
    weight.data = weight.data.clone()
    assert of(weight, remembered=True) == of(weight)
    assert of(copy.deepcopy(weight), remembered=True) == of(weight)


def test_what_is_remembered_goes_with_its_tensor():
    gc.collect()
    count = len(module._hashed)
    weight = nn.Parameter(torch.zeros(8))
    of(weight, remembered=True)
    assert len(module._hashed) == count + 1
    del weight
    gc.collect()
    assert len(module._hashed) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(7, 3), (300, 333), (4, 2**15), (5,), (0, 4)])
@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_sums_of_rows_add_up_to_those_of_the_whole(dtype, shape, processes):
    """Shares that end inside of a block, or of a word; some are empty."""
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    each = -(-shape[0] // processes)
    places = [min(rank * each, shape[0]) for rank in range(processes)]
    parts = [sums_of_rows(whole[first : first + each].clone(), first, shape) for first in places]
    assert sum(parts).numpy().tobytes() == sums(whole)
