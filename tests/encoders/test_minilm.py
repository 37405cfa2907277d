"""The statistics and the subspaces on a real pretrained encoder, all-MiniLM-L6-v2, and real text."""

import os
from dataclasses import dataclass

import pytest
import torch
from packages import pretrained_encoder
from torch import Tensor, nn

from keeplora import KeepLoraConfig
from keeplora.lora import linear_targets, wrap
from keeplora.math.lowrank import extend_basis, weight_basis
from keeplora.methods.keeplora.directions import TaskGradients
from keeplora.statistics import feature_statistics
from tests.encoders.texts import titles_and_bodies

RANK = 16
WEIGHT_ENERGY = 0.6  # the published setting for language models
PAIRS, BATCHES, TOKENS = 16, 3, 48


@dataclass
class Encoder:
    """The model, its task, and what plain PyTorch finds for it."""

    model: nn.Module
    slots: list
    data: list
    gradients: list[Tensor]  # float64 means of .grad
    moments: list[Tensor]  # float64 second moments of the inputs, text by text without padding
    bases: list[Tensor]
    statistics: list


def loss_fn(model, batch):
    """Titles find their bodies: the contrastive loss the encoder was pretrained with."""
    titles, bodies = (mean_of_tokens(model, texts) for texts in batch)
    return nn.functional.cross_entropy(20 * titles @ bodies.T, torch.arange(len(titles)))


def mean_of_tokens(model, texts):
    keep = texts["attention_mask"].unsqueeze(-1)
    hidden = model(**texts).last_hidden_state
    return nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)


def without_padding(texts):
    for ids, keep in zip(texts["input_ids"], texts["attention_mask"].bool(), strict=True):
        yield {"input_ids": ids[keep][None], "attention_mask": torch.ones(1, int(keep.sum()), dtype=torch.long)}


def plain_gradients(model, names, data):
    model.zero_grad()
    for batch in data:
        loss_fn(model, batch).backward()
    gradients = [model.get_parameter(f"{name}.weight").grad.double() / len(data) for name in names]
    model.zero_grad()
    return gradients


@torch.no_grad()
def plain_moments(model, names, data):
    sums = dict.fromkeys(names, 0.0)

    def add(name, x):
        rows = x.flatten(0, -2).double()
        sums[name] = sums[name] + rows.T @ rows

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name in names
    ]
    for batch in data:
        for texts in batch:
            for text in without_padding(texts):
                model(**text)
    for handle in handles:
        handle.remove()
    return [sums[name] for name in names]


@pytest.fixture(scope="module")
def encoder():
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import BertModel, BertTokenizerFast  # seconds to import: not for those who run other tests

    folder = pretrained_encoder()
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    pairs = titles_and_bodies()
    chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[: PAIRS * BATCHES].tolist()
    data = []
    for start in range(0, len(chosen), PAIRS):
        sides = zip(*(pairs[i] for i in chosen[start : start + PAIRS]), strict=True)
        data.append(
            [
                tokenizer(list(side), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
                for side in sides
            ]
        )
    targets = linear_targets(model)
    names = [target.name for target in targets]
    gradients, moments = plain_gradients(model, names, data), plain_moments(model, names, data)
    slots = wrap(model, targets)
    bases = weight_basis([slot.weight.detach() for slot in slots], WEIGHT_ENERGY)
    forward, mask = attention_mask()
    statistics = feature_statistics(model, slots, data, forward, token_mask=mask)
    return Encoder(model, slots, data, gradients, moments, bases, statistics)


def attention_mask():
    """A forward function, and the token mask that goes with what it runs."""
    current = []

    def forward(model, batch):
        for texts in batch:
            current[:] = [texts["attention_mask"].bool()]
            model(**texts)

    return forward, lambda slot, x: current[0]


@pytest.mark.parametrize(("kind", "share"), [("exact", 0.9995), ("sketch", 0.98)])
def test_directions_capture_nearly_all_the_gradient_energy_that_rank_r_can(encoder, kind, share):
    config = KeepLoraConfig(r=RANK, gradient_statistic=kind, balance=False)  # directions alone, whatever their length
    gradients = TaskGradients(encoder.model, encoder.slots, encoder.data, loss_fn, config, shown=False)
    assert set(gradients.widths) == {None if kind == "exact" else 8 * RANK}
    found = gradients.directions(encoder.bases)
    captured = {}
    for slot, gradient, q, top in zip(encoder.slots, encoder.gradients, encoder.bases, found, strict=True):
        assert top.a.shape[0] == RANK, slot.name
        assert q.shape[1] > 0, slot.name
        frame = torch.linalg.qr(q.double()).Q
        free = gradient - gradient @ frame @ frame.T
        best = torch.linalg.svdvals(free)[:RANK].square().sum()
        captured[slot.name] = ((free @ top.a.double().T).square().sum() / best).item()
    worst = min(captured, key=captured.get)
    assert len(captured) == 36
    assert captured[worst] >= share, f"{worst}: {captured[worst]:.5f}"


@pytest.mark.parametrize(("threshold", "widest"), [(0.9, 384), (0.95, 1536), (0.99, 384)])
def test_ranks_and_captured_energy_of_real_features_are_those_of_float64(encoder, threshold, widest):
    chosen = [i for i, c in enumerate(encoder.moments) if len(c) <= widest]  # each of 1536 takes seconds
    assert len(chosen) == (36 if widest == 1536 else 30)
    slots, exact, bases = ([them[i] for i in chosen] for them in (encoder.slots, encoder.moments, encoder.bases))
    extensions = extend_basis(bases, [encoder.statistics[i].moment for i in chosen], threshold)
    for slot, c, q, new in zip(slots, exact, bases, extensions, strict=True):
        frame = torch.linalg.qr(q.double()).Q
        free = torch.eye(len(c), dtype=torch.float64) - frame @ frame.T
        energies = torch.linalg.eigvalsh(free @ c @ free).flip(0).clamp_min(0)
        reach = torch.cat([torch.zeros(1, dtype=torch.float64), energies.cumsum(0)]) + (frame.T @ c @ frame).trace()
        wanted = int((reach < threshold * c.trace()).sum())
        assert abs(new.added - wanted) <= 1, f"{slot.name}: {new.added} directions, float64 wants {wanted}"
        held = new.q.double()
        captured = ((held.T @ c @ held).trace() / c.trace()).item()
        assert captured >= threshold - 1e-5, f"{slot.name}: {captured:.7f}"


def test_padding_does_not_count_and_query_key_and_value_share_one_statistic(encoder):
    tokens = sum(int(texts["attention_mask"].sum()) for batch in encoder.data for texts in batch)
    assert tokens < sum(texts["attention_mask"].numel() for batch in encoder.data for texts in batch)
    by_name = dict(zip([slot.name for slot in encoder.slots], encoder.statistics, strict=True))
    for block in range(6):
        attention = f"encoder.layer.{block}.attention.self."
        assert by_name[attention + "query"] is by_name[attention + "key"] is by_name[attention + "value"]
    assert len({id(statistic) for statistic in encoder.statistics}) == 6 * 4
    for slot, statistic, exact in zip(encoder.slots, encoder.statistics, encoder.moments, strict=True):
        assert statistic.tokens == tokens, slot.name
        # Padded and single texts run through different products, so hidden states differ by float32 rounding.
        assert (statistic.moment - exact).norm() <= 1e-5 * exact.norm(), slot.name
