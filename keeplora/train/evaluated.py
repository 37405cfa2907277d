"""Evaluations that were made before, of the same weights on the same data: looked up, not computed again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keeplora._files import write_json
from keeplora._made_of import version
from keeplora._untrusted import MOST_JSON, fault, parse_json, read_bytes
from keeplora.methods.method import Method
from keeplora.tasks.workload import ItemWorkload, Workload
from keeplora.train.config import RunConfig
from keeplora.train.items import packed, unpacked

__all__ = ["Evaluations", "evaluations_folder"]

_PACKAGES = ("keeplora", "torch", "open_clip_torch", "transformers")
"""What computes an evaluation."""


def evaluations_folder(config: RunConfig) -> Path | None:
    """Where the runs of ``config`` keep their evaluations, all in one folder; None where they do not."""
    return Path(config.out) / "evaluations" if config.reuse_evaluations else None


class Evaluations:
    """Evaluates one model of one run, and keeps what it finds in a folder that other runs read, too.

    An evaluation is found again where all of this is the same: every value of the model and of its method's state, the
    data of the split with texts and labels in their order, precision, batch size, device, versions. A file that cannot
    be used is told and written anew.

    Args:
        folder: Where evaluations are kept; None: nowhere.
        tell: Is told of files that cannot be used.
    """

    def __init__(
        self, config: RunConfig, workload: Workload, folder: Path | None, tell: Callable[[str], None] = print
    ) -> None:
        self.config, self.workload, self._folder, self._tell = config, workload, folder, tell
        self.reused = 0
        """How many were looked up since ``begin``."""
        self._method: Method
        self._known: dict[str, Any] = {}

    def begin(self, method: Method) -> None:
        """From now on the model is the one this method holds, as it is."""
        self._method, self.reused = method, 0
        quantised = any(hasattr(parameter, "quant_state") for parameter in method.model.parameters())
        self._known = {}
        if self._folder is not None and not quantised:  # what scales 4-bit weights is no value of them
            self._known = {
                "weights": method.digest(),
                "model": hashlib.sha256(repr(method.model).encode()).hexdigest(),
                "precision": self.config.computes_in,
                "threads": self.config.threads,
                "device": _device(self.config.device),
                "batch_size": self.config.evaluation_batch_size,
                "versions": {name: version(name) for name in _PACKAGES},
            }

    def accuracy(self, task: int | None, split: str) -> float:
        """As ``Workload.accuracy`` of the model."""
        size = self.config.evaluation_batch_size
        found = self._found(
            "accuracy", task, split, lambda: self.workload.accuracy(self._method.model, task, split, size), _share
        )
        return float(found)

    def correct(self, task: int | None, split: str) -> Tensor:
        """As ``ItemWorkload.correct`` of the model, on the CPU."""
        workload, size = self.workload, self.config.evaluation_batch_size
        assert isinstance(workload, ItemWorkload)  # checked before anything runs

        def compute() -> dict[str, Any]:
            right = workload.correct(self._method.model, task, split, size).cpu()
            return {"items": len(right), "right": packed(right)}

        found = self._found("correct", task, split, compute, _items)
        return torch.from_numpy(unpacked(found["right"], found["items"]))

    def _found(
        self, kind: str, task: int | None, split: str, compute: Callable[[], Any], check: Callable[[Any], Any]
    ) -> Any:
        if not self._known or self._folder is None:
            return compute()
        name = self.workload.witness if task is None else self.workload.tasks[task]
        key = {**self._known, "kind": kind, "task": name, "split": split, "data": self._data(task, split)}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        file = self._folder / digest[:2] / f"{digest}.json"
        if os.path.lexists(file):
            try:
                entry = parse_json(read_bytes(file, most=MOST_JSON))
                if not isinstance(entry, dict) or entry.get("key") != key:
                    raise ValueError("of this evaluation, got another")
                value = check(entry.get("value"))
            except (OSError, ValueError) as error:
                self._tell(f"{file} must {fault(error)}: the evaluation is made again")
            else:
                self.reused += 1
                return value
        started = time.perf_counter()
        value = compute()
        write_json(file, {"key": key, "value": value, "seconds": time.perf_counter() - started})
        return value

    def _data(self, task: int | None, split: str) -> str:
        """Hash of what is evaluated on; of all data where the workload does not tell it apart."""
        contents: Callable[[int | None, str], str] | None = getattr(self.workload, "contents", None)
        return self.workload.fingerprint() if contents is None else contents(task, split)


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"a share from 0 to 1, got {value!r}")
    return float(value)


def _items(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != {"items", "right"} or not isinstance(value["items"], int):
        raise ValueError(f"of items and which are right, got {value!r}")
    unpacked(value["right"], value["items"])
    return value


def _device(name: str) -> str:
    return torch.cuda.get_device_name() if name == "cuda" else torch.backends.cpu.get_cpu_capability()
