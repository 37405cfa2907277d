"""CorDA, knowledge-preserved: adapters start at the components that the tasks' inputs use least."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.statistics import FeatureStatistic

from ..lora import LoraConfig
from ..method import LossFn
from ..reading import stored
from ..settings import check_whole
from ..state import State
from .peer import Factors, SubtractedStart
from .stand_in import LAYER

__all__ = ["Corda", "CordaConfig"]


@dataclass(frozen=True)
class CordaConfig(LoraConfig):
    """Settings of [`Corda`][]: those of plain LoRA, and one more.

    Args:
        memory_budget: Bytes on the device for the features of a pass, beside those that are kept; 20 % of what is free
            if None. Where they need more, they are gathered in several passes over the data.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    memory_budget: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "memory_budget", "[0, inf)", optional=True, remedy="It counts bytes.")


class Corda(SubtractedStart):
    r"""Context-oriented decomposition in its knowledge-preserved mode, anew in every task.

    $$
    W C = U \Sigma V^\top, \qquad B_0 A_0 = \tfrac{1}{s} \sum_{i > n - r} \sigma_i u_i v_i^\top C^{-1}, \qquad
    W \leftarrow W + s\,(B A - B_0 A_0)
    $$

    with C the second moment of a layer's inputs in all tasks so far, each weighing the same: of earlier tasks as they
    were after learning it, of the new one before. The components that these inputs use least are taken out of the
    weight and trained. One pass over the data before a task and one after it; ``4 in²`` bytes per distinct input are
    kept, and a singular value decomposition and an inverse are made per weight and task.

    Raises:
        ImportError: PEFT is not installed, or too old.
        ValueError: r is larger than the smaller side of a weight; what [`LoraMethod.from_features`][] raises.

    Source: Yang et al., "CorDA", NeurIPS 2024, arXiv:2406.05223, as PEFT has it (``preprocess_corda``,
    ``corda_method="kpm"``; C is damped by 0.01 of its mean diagonal). There C is of data whose knowledge is to be kept,
    which the user collects once. Ours: which data that is, in a sequence of tasks; A₀ and B₀ of one norm, where PEFT's
    share of each depends on the number of tokens in a batch.

    Examples:
        >>> from torch import nn
        >>> model, data = nn.Sequential(nn.Linear(8, 6)), [torch.randn(16, 8)]
        >>> method = Corda(model, CordaConfig(r=2, target_modules="all-linear"))
        >>> before = model(data[0])
        >>> method.before_task(data, lambda model, batch: model(batch).sum())
        >>> torch.equal(model(data[0]), before)
        True
    """

    name: ClassVar[str] = "corda"
    config_type: ClassVar[type] = CordaConfig
    whole_spectra: ClassVar[bool] = True
    config: CordaConfig

    def __init__(self, model: nn.Module, config: CordaConfig | None = None, **options: Any):
        super().__init__(model, config, **options)
        self.moments: list[Tensor | None] = [None] * len(self.slots)  # of earlier tasks; None before the first

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        def start(i: int, statistic: FeatureStatistic) -> Factors | None:
            if not statistic.tokens:
                return None
            root = _root(_sum(self.moments[i], statistic))

            def prepare(model: Any, config: Any) -> None:
                preprocess_corda(model, config, run_model=lambda: model[LAYER](root))

            settings = {"init_lora_weights": "corda", "corda_config": PeftCordaConfig(corda_method="kpm")}
            return self.subtracted(_balanced(self.peft_factors(i, prepare, **settings)))

        def starts(group: list[int], statistics: Mapping[int, FeatureStatistic]) -> list[Factors | None]:
            with self.seeded():
                return [start(i, statistics[i]) for i in group]

        made, _ = self.from_features(loader, loss_fn, starts, "starts", self.slots)
        self.attach_all(made)

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        moments, _ = self.from_features(
            loader, loss_fn, lambda group, found: [_sum(self.moments[i], found[i]) for i in group], "memory",
            self.moments,
        )  # fmt: skip
        self.merge_adapters()
        self.moments = list(moments)

    def memory_state(self) -> State:
        pairs = zip(self.slots, self.moments, strict=True)
        return State({f"{slot.name}.moment": moment for slot, moment in pairs if moment is not None})

    def recall(self, state: State) -> list[Tensor | None]:
        if not state.meta["tasks_learned"]:
            return [None] * len(self.slots)
        shapes = [(slot, slot.weight.shape[1]) for slot in self.slots]
        return [stored(state, f"{slot.name}.moment", (n, n)).to(slot.weight.device) for slot, n in shapes]

    def remember(self, memory: list[Tensor | None]) -> None:
        self.moments = memory


def _balanced(factors: Factors) -> Factors:
    """The same product of an A and a B of one norm; PEFT's depend on how many tokens the covariance is of."""
    a, b = (torch.linalg.vector_norm(factors[key]) for key in "AB")
    ratio = (b / a).sqrt() if a > 0 and b > 0 else torch.ones_like(a)
    return {"A": factors["A"] * ratio, "B": factors["B"] / ratio}


def _root(moment: Tensor) -> Tensor:
    """Inputs with this second moment, up to a factor: its symmetric root ``[in, in]``, float32; I where it is 0."""
    values, vectors = torch.linalg.eigh(moment.double())
    if not values[-1] > 0:
        return torch.eye(len(moment), device=moment.device)
    root: Tensor = (vectors * (values / values[-1]).clamp_min(0).sqrt()) @ vectors.T
    return root.float()


def _sum(old: Tensor | None, new: FeatureStatistic) -> Tensor:
    """With the second moment of a token of one more task."""
    moment = new.moment
    assert isinstance(moment, Tensor)
    mean = moment / max(new.tokens, 1)
    return mean if old is None else old + mean
