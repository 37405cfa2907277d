"""bitsandbytes' 4-bit weights: read in either of the layouts they have on a CPU, kept in the one with a gradient.

On a CPU with AVX-512 bf16, a ``Linear4bit`` repacks its weight in the first forward in ``eval()`` whose input takes no
gradient, and multiplies by a kernel of its own from then on, in ``train()`` too. That layout (bitsandbytes 0.50)

* has no gradient: nothing that comes before the layer learns, with a warning of autograd, or with a bias an error;
* has its scales rounded to bfloat16 for good;
* is unknown to ``dequantize_4bit``, and so to PEFT, which read other numbers out of it without an error;
* is undone by ``state_dict()`` (PEFT's ``save_pretrained`` calls it), with the scales in a wrong order, or quantised
  anew where they had been (``compress_statistics``);
* takes only out features that 32 divides and in features that the block size divides: the forward fails with others.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["dequantize_four_bit", "is_four_bit", "keep_differentiable", "was_repacked"]


def is_four_bit(weight: object) -> bool:
    """Whether the weight is of bitsandbytes' ``Linear4bit``, and quantised already."""
    return type(weight).__name__ == "Params4bit" and getattr(weight, "quant_state", None) is not None


def dequantize_four_bit(weight: Any, *, rounded_scales: bool = False) -> Tensor:
    """The weight ``[out, in]`` in float32.

    Args:
        weight: A ``Params4bit``, repacked or not.
        rounded_scales: With scales in bfloat16. This is bitwise the same before a weight is repacked and after it.
    """
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

    data, state = _unpacked("dequantize_four_bit", "weight", weight)
    state.dtype = torch.float32
    if rounded_scales:
        scales = state.absmax
        if state.nested:
            scales = dequantize_blockwise(scales, state.state2) + state.offset
            state.nested = False
        state.absmax = scales.to(torch.bfloat16).float()
    dense: Tensor = dequantize_4bit(data, state)
    return dense


def keep_differentiable(function: str, model: nn.Module) -> None:
    """Undo the repacking of every 4-bit layer of ``model``, and switch it off for those on a CPU.

    ``layer.support_avx512bf16_for_cpu = True`` switches it on again, for inference when nothing is trained any more.

    Args:
        function: For messages.

    Raises:
        RuntimeError: a weight is in a layout that cannot be read.
    """
    for path, module in model.named_modules():
        weight: Any = module._parameters.get("weight")
        if not is_four_bit(weight):
            continue
        if not _as_quantised(weight):
            data, state = _unpacked(function, f"{path}.weight".lstrip("."), weight)
            weight.data = data
            vars(weight.quant_state).update(vars(state))  # in place: the layer has it too
        if weight.device.type == "cpu" and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def was_repacked(weight: Any) -> bool:
    """Whether bitsandbytes has repacked the weight at some time, so that ``state_dict()`` may have changed it."""
    return is_four_bit(weight) and hasattr(weight.quant_state, "original_qshape")


def _is_repacked(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _as_quantised(weight: Any) -> bool:
    """Whether bytes and scales lie as they did after quantisation; ``state_dict()`` puts back the bytes alone."""
    return not _is_repacked(weight.quant_state) and weight.quant_state.absmax.dim() == 1


def _unpacked(function: str, name: str, weight: Any) -> tuple[Tensor, Any]:
    """Bytes and state as before the repacking, but for the rounded scales; the weight itself stays as it is."""
    data, state = weight.data, copy(weight.quant_state)
    if _as_quantised(weight):
        return data, state
    rows, columns = state.shape
    if tuple(state.absmax.shape) != (columns // state.blocksize, rows):
        raise _unknown_layout(function, name, f"scales of shape {tuple(state.absmax.shape)}")
    scales = state.absmax.T.reshape(-1).float()
    if _is_repacked(state):
        try:
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse
        except ImportError as error:
            raise _unknown_layout(function, name, "one that this version of bitsandbytes cannot undo") from error
        data, state = _convert_weight_packed_for_cpu_inverse(data, state)
    # Its own scales are in a wrong order, or were quantised anew.
    state.absmax, state.nested, state.offset, state.state2 = scales, False, None, None
    return data, state


def _unknown_layout(function: str, name: str, got: str) -> RuntimeError:
    return RuntimeError(
        f"{function}: 4-bit weights must lie as bitsandbytes quantised them or as 0.50 repacks them on a CPU, got "
        f"{got} [{name}]. Load the model again, and set support_avx512bf16_for_cpu = False on its Linear4bit layers "
        "before their first forward in eval()."
    )
