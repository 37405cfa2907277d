"""B10's fits: exponents of known growth, and a plot of what bench.run writes."""

import pytest

from bench.bench_scaling import CPU, count
from bench.plot_scaling import curves, plot


def row(axis, value, provider="keeplora"):
    """A row whose time follows the counted arithmetic, and whose memory does not grow."""
    seconds = count(axis, value, "cpu", cores=4).flops / 1e10
    case = f"scaling / something, width 256 / {axis} = {value}"
    return {"id": "B10", "case": case, "provider": provider, "median_s": seconds, "peak_bytes": 4096}


@pytest.fixture
def measured():
    rows = [row(axis, value) for axis, values in CPU.items() for value in values]
    others = [{**row("tokens", 1024, "ceiling"), "median_s": 99.0}, {**row("width", 64), "id": "B2"}]
    return curves({"machine": {"cpu": "any", "cores": 4}, "rows": [*others, *rows]})


def test_exponents_are_those_of_the_growth(measured):
    found = {curve.axis: curve.exponents() for curve in measured}
    assert set(found) == {"layers", "width", "tokens", "processes"}
    for axis, slopes in found.items():
        assert slopes["time"] == pytest.approx(slopes["flops"]), axis
        assert slopes["memory"] == pytest.approx(0.0, abs=1e-12), axis
    assert found["layers"]["flops"] == pytest.approx(1.0)
    assert found["tokens"]["flops"] == pytest.approx(1.0)
    assert found["tokens"]["bytes"] == pytest.approx(0.0, abs=1e-12)
    assert 1.5 < found["width"]["flops"] < 3  # cubic where eigenvectors are exact, quadratic above
    assert -1 < found["processes"]["flops"] < -0.5  # a half, a quarter, and no less on four cores


def test_the_curves_are_plotted(measured, tmp_path):
    plot(tmp_path / "scaling.png", measured)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
