"""EVA's components and ranks, against float64 from the definition."""

import pytest
import torch
from torch import nn

from keeplora.methods import create
from keeplora.methods.peers import eva
from tests.methods.contract import Net, task
from tests.methods.contract import loss_fn as net_loss
from tests.methods.peers.test_against_peft import loss_fn, made, net
from tests.methods.peers.test_against_peft import task as rows_of


def components(rows, count):
    """Leading right singular vectors of the centred rows, and each one's share of the variance."""
    rows = rows.double()
    _, s, v = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return v[:count], s[:count].square() / s.square().sum()


@pytest.mark.parametrize("sizes", [[48], [16, 16, 16], [1] * 46, [40, 5], [3, 45], [2]])
def test_components_do_not_depend_on_the_pieces_they_come_in(sizes):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(sizes), 9, generator=g) * 3.0 ** -torch.arange(9) + 2
    rows[-1, 8] += 5  # the last one counts
    inputs = eva._Inputs(4, 9)
    for piece in rows.split(sizes):
        inputs.add(piece)
    result = inputs.result()
    count = min(len(rows) - 1, 3)  # of n rows, n − 1 directions
    v, shares = components(rows, count)
    torch.testing.assert_close(result.shares[:count].double(), shares, rtol=2e-2, atol=1e-5)
    torch.testing.assert_close(
        (result.rows[:count].double() @ v.T).abs().diagonal(), torch.ones(count).double(), rtol=0, atol=1e-2
    )


def test_ranks_go_where_they_explain_most():
    assert eva.ranks_by_variance([[0.5, 0.3, 0.1], [0.9, 0.02]], 2) == [3, 1]
    assert eva.ranks_by_variance([[0.5], []], 3) == [1, 0]
    assert eva.ranks_by_variance([[0.5, 0.0], [1e-12]], 2) == [1, 0]


def test_a_layer_that_explains_little_gets_no_adapter_and_learns_nothing():
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 7))
    with torch.no_grad():  # a direction that nearly all of the second layer's inputs lie along
        model[0].weight.copy_(torch.outer(torch.randn(9), torch.randn(9)))
    method = made("eva", model, rho=2.0)
    before = method.slots[0].weight.detach().clone(), method.slots[1].weight.detach().clone()
    method.before_task(rows_of(0), loss_fn)
    ranks = [0 if slot.adapter is None else slot.adapter.rank for slot in method.slots]
    assert ranks == [3, 1]
    method.after_task(rows_of(0))
    assert all(torch.equal(slot.weight, old) for slot, old in zip(method.slots, before, strict=True))


def test_whitened_rows_are_shorter_where_inputs_are_longer():
    plain, white = made("eva", net(1)), made("eva", net(1), whiten=True)
    for method in (plain, white):
        method.before_task(rows_of(0), loss_fn)
    a, w = plain.slots[0].adapter.A, white.slots[0].adapter.A
    ratio = (a / w).mean(1)
    rows = torch.cat([x for x, _ in rows_of(0)])
    _, s, _ = torch.linalg.svd((rows - rows.mean(0)).double(), full_matrices=False)
    torch.testing.assert_close(ratio.double(), s[:2].sqrt(), rtol=0.05, atol=0)


def test_slots_that_read_one_tensor_share_their_components_and_masked_tokens_do_not_count():
    method = create("eva", Net(), {"r": 2, "rho": 1.0})
    method.token_mask = lambda slot, x: torch.arange(x.shape[1]).lt(2).expand(x.shape[:-1]) if x.dim() == 3 else None
    data = task(0)[:1]
    method.before_task(data, net_loss)
    by_name = {slot.name.rsplit(".", 1)[-1]: slot.adapter for slot in method.slots}
    rows = data[0].images[:, :2].reshape(-1, 8)
    v, _ = components(rows, 2)
    for name in ("q_proj", "k_proj", "v_proj"):
        a = by_name[name].A.detach()
        assert torch.equal(a, by_name["q_proj"].A)
        torch.testing.assert_close((a.double() @ v.T).abs(), torch.eye(2).double(), rtol=0, atol=2e-2)


def test_what_cannot_be_started_is_refused_before_anything_changes(monkeypatch):
    method = made("eva", net())
    with pytest.raises(ValueError, match="at least one batch, got none"):
        method.before_task([], loss_fn)
    same = [(torch.ones(16, 9), torch.zeros(16, dtype=torch.long))]
    with pytest.raises(ValueError, match="features must vary"):
        method.before_task(same, loss_fn)
    with pytest.raises(ValueError, match=r"features must be finite, got NaN or Inf \[0\]"):
        method.before_task([(torch.full((4, 9), float("nan")), torch.zeros(4, dtype=torch.long))], loss_fn)
    monkeypatch.setattr(eva, "processes", lambda: type("Peers", (), {"size": 2}))
    with pytest.raises(RuntimeError, match="in one process, got 2"):
        method.before_task(rows_of(0), loss_fn)
    assert not method.training_task
    assert all(slot.adapter is None for slot in method.slots)
