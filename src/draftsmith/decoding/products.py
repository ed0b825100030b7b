"""Matrix products on a CPU, whose time goes into reading weights where rows are few.

FBGEMM keeps weights packed in fp16 and multiplies and sums in fp32: half the bytes of fp32, and quicker than MKL's
products up to hundreds of rows. fp16 holds nearly every bf16 number of a weight's size as it is, so a checkpoint in
bf16 (or quantised) loses nothing by it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def pack(*linears: nn.Linear) -> Callable[[Tensor], Tensor] | None:
    """The products of one input with all of them, side by side; None where this CPU has no such product, or fp16 would
    change the weights by more than fp32 rounds."""
    weights = [linear.weight for linear in linears]
    if any(weight.device.type != "cpu" or weight.dtype != torch.float32 for weight in weights):
        return None
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    weight = torch.cat(weights)
    change = torch.linalg.vector_norm(weight.half() - weight)
    if not change <= torch.finfo(torch.float32).eps * torch.linalg.vector_norm(weight):
        return None
    biases: list[Tensor] = [x.weight.new_zeros(x.out_features) if x.bias is None else x.bias for x in linears]
    bias = None if all(linear.bias is None for linear in linears) else torch.cat(biases)
    packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    return partial(torch.ops.quantized.linear_dynamic_fp16.default, W_prepack=packed)


def pack_weights(module: nn.Module) -> None:
    """Have the `nn.Linear`s of `module`, itself included, multiply with packed weights where nothing is lost by it.
    For inference: there is no gradient, and a weight that changes afterwards is not seen."""
    for linear in module.modules():
        if type(linear) is nn.Linear and (product := pack(linear)) is not None:
            linear.forward = product  # type: ignore[method-assign, assignment]
