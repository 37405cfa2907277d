"""The library's one tolerance rule: computed from the arithmetic, never chosen by hand."""

import torch


def assert_rounded(actual, exact, *, terms, what, size=None, more=0.0):
    """Check that ``actual`` is ``exact`` up to the rounding its arithmetic must commit.

    Allowed error, relative to ``max |exact|``: half an eps of the output dtype for the final rounding, plus
    ``sqrt(terms) + 2`` eps of the accumulator dtype for a sum of ``terms`` addends (float64 for float64 output,
    else float32); ``more`` besides, relative to the same size.
    """
    assert exact.dtype == torch.float64, f"{what}: the reference must be float64, got {exact.dtype}"
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    actual, exact = actual.detach().cpu(), exact.detach().cpu()
    acc = torch.float64 if actual.dtype == torch.float64 else torch.float32
    allowed = torch.finfo(actual.dtype).eps / 2 + (terms**0.5 + 2) * torch.finfo(acc).eps + more
    size = exact.abs().max() if size is None else torch.as_tensor(size, dtype=torch.float64)
    error = (actual.double() - exact).abs() / size.clamp_min(1e-300)
    worst = error.max().item()
    where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert worst <= allowed, (  # also false for nan
        f"{what}{list(where)}: got {actual[where].item():.9g}, exact {exact[where].item():.9g}; "
        f"relative error {worst:.2e}, allowed {allowed:.2e} ({actual.dtype}, {terms} terms)"
    )
