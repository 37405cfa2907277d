"""The family of docs/add-a-family.md, as printed there: it is found, and so are its targets, towers and padding."""

import pages
import pytest
import torch

import keeplora
from keeplora.families import FAMILIES, find_targets, token_mask
from keeplora.lora import wrap
from keeplora.statistics import feature_statistics

PAGE = pages.ROOT / "docs" / "add-a-family.md"


@pytest.fixture
def page(tmp_path):
    """The names of the page's blocks; the family is known while the test runs."""
    before = [family.__name__ for family in FAMILIES]
    assert before == ["keeplora.families.open_clip", "keeplora.families.transformers"]
    with pages.running(PAGE, tmp_path) as names:
        yield names
    assert [family.__name__ for family in FAMILIES] == before


def test_the_file_is_found_and_the_order_is_that_of_the_names(page):
    assert [family.__name__.rpartition(".")[2] for family in FAMILIES] == ["acme", "open_clip", "transformers"]


def test_targets_have_their_towers_and_depths(page):
    model = page["TwoTowers"]()
    found = [(t.name, t.tower, t.depth) for t in find_targets(model)]
    assert found == [
        (f"{name}.layers.{depth}.{layer}", tower, depth)
        for name, tower, blocks in (("image", "vision", 3), ("text", "text", 2))
        for depth in range(blocks)
        for layer in ("fc1", "fc2")
    ]
    inside = find_targets(torch.nn.ModuleDict({"inner": model}), ["text"])  # a known model in another module
    assert [t.name for t in inside] == [f"inner.{name}" for name, tower, _ in found if tower == "text"]
    with pytest.raises(ValueError, match=r"got 'audio'. It has text, vision"):
        find_targets(model, ["audio"])


def test_padding_is_not_counted(page):
    model, (patches, words) = page["TwoTowers"](), page["batches"][0]
    slots = wrap(model, find_targets(model))
    with token_mask(model) as mask:
        statistics = feature_statistics(model, slots, [(patches, words)], page["loss_fn"], token_mask=mask)
    counted = {slot.target.tower: statistic.tokens for slot, statistic in zip(slots, statistics, strict=True)}
    assert counted == {"vision": 8 * 9, "text": 8 * 4}
    assert not model.words._forward_hooks


def test_a_family_of_ones_own_may_be_appended(page):
    class Whole:
        """Owns nothing but what it was made for."""

        def __init__(self, kind):
            self.kind = kind

        def owns(self, model):
            return type(model) is self.kind

        def find_targets(self, model, towers=None):
            return [t for t in keeplora.lora.linear_targets(model) if towers is None or t.tower in towers]

    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    assert len(find_targets(model)) == 1
    FAMILIES.append(Whole(page["TwoTowers"]))
    assert len(find_targets(page["TwoTowers"]())) == 10, "acme comes first"
    FAMILIES.insert(0, FAMILIES.pop())
    assert len(find_targets(page["TwoTowers"]())) == 12, "heads too"
