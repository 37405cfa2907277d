import pytest
import torch
from close import assert_rounded
from precision import FASTER
from torch import nn
from torch.utils.checkpoint import checkpoint

from keeplora.lora import linear_targets, wrap
from keeplora.math import reorthogonalize
from keeplora.math.lowrank import directions_within
from keeplora.ops import random_signs
from keeplora.statistics import first_batches, mean_gradients, sketch_widths

WIDTH = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.fc = nn.Linear(WIDTH, 5)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        y = self.drop(self.fc(self.attn(x, x, x, need_weights=False)[0]))
        return self.norm(y.transpose(1, 2))


def loss_fn(model, batch):
    return model(batch).square().mean()


@pytest.fixture
def wrapped():
    model = Block().train()
    return model, wrap(model, linear_targets(model))


def batches(n=3, tokens=6):
    return [torch.randn(2, tokens, WIDTH) for _ in range(n)]


def test_mean_gradients_match_a_float64_copy(wrapped):
    model, slots = wrapped
    data = batches()
    got = mean_gradients(model, slots, data, loss_fn)
    copy = Block().double().eval()
    copy.load_state_dict(model.state_dict())
    for batch in data:
        (loss_fn(copy, batch.double()) / len(data)).backward()
    exact = [*copy.attn.in_proj_weight.grad.split(WIDTH), copy.attn.out_proj.weight.grad, copy.fc.weight.grad]
    for slot, gradient, expected in zip(slots, got, exact, strict=True):
        assert gradient.dtype == torch.float32
        # float32 backpropagation through five layers: a few hundred roundings of the largest entry
        assert_rounded(gradient, expected, terms=1000**2, what=slot.name)


def test_mean_gradients_leave_the_model_as_it_was(wrapped):
    model, slots = wrapped
    model.fc.bias.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    model.drop.eval()
    modes = [m.training for m in model.modules()]
    mean_gradients(model, slots, batches(), loss_fn)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


SKETCHED = {"q_proj": 4, "k_proj": None, "v_proj": 3, "out_proj": 8, "fc": 2}


def test_sketches_are_random_signs_times_the_gradient(wrapped):
    model, slots = wrapped
    data, widths = batches(), list(SKETCHED.values())
    exact = mean_gradients(model, slots, data, loss_fn)
    sketched = mean_gradients(model, slots, data, loss_fn, keep=widths, seed=3)
    for slot, gradient, sketch, width in zip(slots, exact, sketched, widths, strict=True):
        expected = gradient.double()
        if width is not None:
            expected = random_signs(width, len(gradient), seed=3, dtype=torch.float64) @ expected / width**0.5
        assert_rounded(sketch, expected, terms=1000**2, what=slot.name)


def test_a_layer_called_twice_gathers_both_calls():
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    slots = wrap(layer, linear_targets(layer))
    x = torch.randn(6, WIDTH)
    (got,) = mean_gradients(layer, slots, [x], lambda model, batch: model(model(batch)).square().sum())
    copy = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()
    copy.load_state_dict(layer.state_dict())
    copy(copy(x.double())).square().sum().backward()
    assert_rounded(got, copy[0].weight.grad, terms=1000, what="twice")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(wrapped, reentrant):
    model, slots = wrapped
    data = [x.requires_grad_(reentrant) for x in batches()]  # reentrant checkpoints want an input with a gradient

    def checkpointed(model, batch):
        return checkpoint(model, batch, use_reentrant=reentrant).square().mean()

    for widths in (None, list(SKETCHED.values())):
        plain = mean_gradients(model, slots, data, loss_fn, keep=widths)
        again = mean_gradients(model, slots, data, checkpointed, keep=widths)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_autocast_and_float_accumulation(wrapped):
    model, slots = wrapped

    def half(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fn(model, batch)

    data = batches()
    exact, got = mean_gradients(model, slots, data, loss_fn), mean_gradients(model, slots, data, half)
    for a, b in zip(exact, got, strict=True):
        assert b.dtype == torch.float32
        assert (a - b).norm() <= 0.05 * a.norm()


def test_sketching_never_forms_a_gradient():
    model = nn.Sequential(nn.Linear(64, 512, bias=False), nn.Linear(512, 64, bias=False))
    slots = wrap(model, linear_targets(model))
    data = [torch.randn(4, 64)]
    with torch.profiler.profile(profile_memory=True) as profile:
        mean_gradients(model, slots, data, loss_fn, keep=[8, 8])
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(sizes) < 4 * 64 * 512 / 2  # bytes of a gradient


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [None, None]),
        ({"kind": "sketch"}, [16, None]),
        ({"memory_budget": 4 * (64 * 32 + 12 * 64)}, [None, None]),
        ({"memory_budget": 4 * (64 * 32 + 12 * 64) - 1}, [16, None]),
        ({"kind": "exact", "memory_budget": 0}, [None, None]),
    ],
)
def test_what_is_sketched(options, expected):
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 12))  # the second has fewer rows than a sketch
    assert sketch_widths(wrap(model, linear_targets(model)), 2, **options) == expected


def test_sketch_widths_refuse():
    slots = wrap(model := nn.Sequential(nn.Linear(3, 3)), linear_targets(model))
    with pytest.raises(ValueError, match="kind must be 'auto', 'exact' or 'sketch', got 'fast'"):
        sketch_widths(slots, 2, kind="fast")
    with pytest.raises(ValueError, match=r"memory_budget must .*got -1"):
        sketch_widths(slots, 2, memory_budget=-1)


def test_first_batches():
    half = first_batches([1, 2, 3, 4], 0.5)
    assert len(half) == 2
    assert list(half) == list(half) == [1, 2]
    assert list(first_batches([1, 2, 3, 4], 0.01)) == [1]
    generator = iter([1, 2])
    assert first_batches(generator, 1.0) is generator
    with pytest.raises(TypeError, match=r"must have a length for data_fraction = 0\.5"):
        first_batches(generator, 0.5)


def _broken(value):
    data = batches()
    data[1][0, 0, 0] = value
    return data


@pytest.mark.parametrize(
    ("data", "loss", "error", "message"),
    [
        ([], loss_fn, ValueError, "at least one batch, got none"),
        (_broken(float("nan")), loss_fn, ValueError, r"loss must be finite, got nan \[batch 1\]"),
        (batches(), lambda m, b: m(b), ValueError, r"scalar tensor, got shape .* \[batch 0\]"),
        (batches(), lambda m, b: 1.0, ValueError, "scalar tensor, got float"),
        (batches(), lambda m, b: loss_fn(m, b).detach(), RuntimeError, "got no gradient to any of them"),
        (batches(), lambda m, b: b.requires_grad_().sum(), RuntimeError, "got no gradient to any of them"),
    ],
    ids=["empty", "nan", "vector", "float", "detached", "other"],
)
def test_mean_gradients_refuse(wrapped, data, loss, error, message):
    model, slots = wrapped
    with pytest.raises(error, match=message):
        mean_gradients(model, slots, data, loss)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_images_are_the_gradient_in_a_frame(wrapped):
    model, slots = wrapped
    data = batches()
    exact = mean_gradients(model, slots, data, loss_fn)
    frames = [torch.linalg.qr(torch.randn(WIDTH, n)).Q if n else torch.zeros(WIDTH, 0) for n in (3, 8, 1, 0, 2)]
    for gradient, frame, image in zip(
        exact, frames, mean_gradients(model, slots, data, loss_fn, keep=frames), strict=True
    ):
        assert_rounded(image, gradient.double() @ frame.double(), terms=1000**2, what="image")


def test_gradients_of_an_accumulation_under_way_are_left_alone(wrapped):
    model, slots = wrapped
    loss_fn(model, batches(1)[0]).backward()
    before = [p.grad.clone() for p in model.parameters()]
    mean_gradients(model, slots, batches(), loss_fn)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True))


def test_a_gradient_that_is_not_finite_names_its_layer():
    model = nn.Sequential(nn.Linear(WIDTH, 2, bias=False))
    slots = wrap(model, linear_targets(model))
    with pytest.raises(ValueError, match=r"gradients must be finite, got NaN or Inf \[0\]"):
        # The root of zero: a finite loss with an infinite slope.
        mean_gradients(model, slots, [torch.zeros(3, WIDTH)], lambda m, x: (m(x) + 0 * x.sum()).square().sum().sqrt())


@pytest.mark.parametrize("faster", sorted(FASTER.keys() - {"autocast"}))
@pytest.mark.parametrize("keep", [None, 4, "frame"])
def test_sums_are_exact_whatever_the_caller_switched_on(keep, faster):
    """Under autocast the layer's own product, and so the gradient of its output, is of 16 bits."""
    slots = wrap(model := nn.Sequential(nn.Linear(96, 64)), linear_targets(model))
    keep = torch.linalg.qr(torch.randn(96, 32)).Q if keep == "frame" else keep
    data, weights = [torch.randn(48, 96) for _ in range(3)], torch.randn(64)

    def sums():
        return mean_gradients(model, slots, data, lambda m, x: (m(x) * weights).mean(), keep=[keep])[0]

    expected = sums()
    with FASTER[faster]():
        assert torch.equal(sums(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_frame_is_not_rounded_to_the_layers_dtype(dtype):
    """Directions found in the span of a rounded V would be taken for directions in that of V."""
    model = nn.Sequential(nn.Linear(96, 64, bias=False)).to(dtype)
    slots = wrap(model, linear_targets(model))
    frame = torch.linalg.qr(torch.randn(96, 16, dtype=torch.float64)).Q.float()
    data, weights = [torch.randn(48, 96).to(dtype) for _ in range(3)], torch.randn(48, 64).to(dtype)
    (image,) = mean_gradients(model, slots, data, lambda m, x: (m(x) * weights).float().sum() / 8, keep=[frame])
    delta = weights.double() / 8  # exact in 16 bits, as all of the inputs are
    exact = sum(delta.T @ x.double() @ frame.double() for x in data) / len(data)
    assert_rounded(image, exact, terms=48 * 96, what="image")


def test_a_sketch_wider_than_a_gradients_rank_gives_its_directions_in_any_order_of_batches():
    """Of a 16-bit model: the second pass knows the frame as exactly as the first one found it."""
    model = nn.Sequential(nn.Linear(64, 48, bias=False)).bfloat16()
    slots = wrap(model, linear_targets(model))
    left, right = torch.randn(16, 8, 3).bfloat16(), torch.randn(3, 64).bfloat16()
    data = [(x, torch.randn(8, 48).bfloat16()) for x in (left.float() @ right.float()).bfloat16()]

    def directions(batches):
        def pass_over(keep):
            return mean_gradients(model, slots, batches, lambda m, b: (m(b[0]) * b[1]).float().sum(), keep=keep)

        (sketch,) = pass_over([40])
        (frame,) = reorthogonalize([sketch.T.contiguous()])
        return directions_within(pass_over([frame]), [frame], 3)[0].a.double()

    exact = sum(y.double().T @ x.double() for x, y in data)
    v = torch.linalg.svd(exact, full_matrices=False).Vh[:3]
    for batches in (data, data[::-1]):
        found = directions(batches) @ v.T
        assert (found.abs() - torch.eye(3)).abs().max() < 2e-5  # rounded, the frame turned them by 2e-3
