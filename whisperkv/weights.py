"""How a model's matrices are read on the CPU: its own numbers in a faster order, or bfloat16 or 8 bit codes of them.

A matrix is read where it is or, in the other formats, from a packed copy that follows it: one that was written to or
moved since is packed again. Weights, names and what is saved stay the model's.
"""

import threading
from typing import NamedTuple

import torch
from torch import nn

from . import ops
from .compat import become

FORMATS = {"model": ops.AS_FLOAT32, "bfloat16": ops.AS_BFLOAT16, "int8": ops.AS_INT8}
FINE = FORMATS | {"int8": ops.AS_FINE_INT8}  # where a few large numbers would cost the text something
UNEVEN = (".out_proj", ".fc2")  # no layer norm has evened out what these are given
NONE = torch.empty(0)  # what an op is given for what there is none of


class Matrix(NamedTuple):
    """What the ops read of a linear layer."""

    weight: torch.Tensor  # float32 [outputs, inputs], the model's own; or panels
    bias: torch.Tensor
    format: int
    outputs: int


class FastLinear(nn.Linear):
    """A linear layer that patch() has turned into ours by its class alone."""

    def forward(self, x):
        if not is_ours_to_multiply(x) or not is_readable(self) or needs_grad(x, self.weight, self.bias):
            return super().forward(x)
        return multiply(x.reshape(-1, x.shape[-1]), matrix_of(self)).view(*x.shape[:-1], -1)


class Packed:
    """A weight in another format, or laid out otherwise: made when it is first read, and again whenever the weight has
    changed. `layout` makes a matrix [outputs, inputs] of it."""

    def __init__(self, format, layout=None):
        self.format, self.layout = format, layout
        self._of, self._panels, self._lock = None, None, threading.Lock()

    def __reduce__(self):
        return Packed, (self.format, self.layout)  # a copy of the model packs its own

    def of(self, weight):
        if self.format == ops.AS_FLOAT32 and self.layout is None:
            return weight.detach()
        found = (weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.shape)
        if self._of != found:
            with self._lock, torch.no_grad():
                matrix = weight.detach() if self.layout is None else self.layout(weight.detach())
                if self.format != ops.AS_FLOAT32:
                    matrix = ops.pack_matrix(matrix.contiguous(), self.format)
                self._panels, self._of = matrix.contiguous(), found
        return self._panels

    @property
    def nbytes(self):
        return 0 if self._panels is None else self._panels.nbytes


def check(model, format):
    """What patch() refuses."""
    if format not in FORMATS:
        raise ValueError(f"weights must be one of {', '.join(map(repr, FORMATS))}; got {format!r}")
    if format == "model":
        return
    reasons = [why_not(module) for module in model.modules() if isinstance(module, nn.Linear)]
    if all(reasons):
        raise ValueError(
            f"weights={format!r} is for float32 models on the CPU, and no matrix of this one can be read so (the first "
            f"is {reasons[0]}): model.float() and model.to('cpu'), or weights='model'"
        )


def note_of(others, format):
    """What stats() says of the linear layers that stay as they are."""
    if not others or format == "model":
        return ""
    name, reason = next(iter(others.items()))
    return f"weights={format!r}: {len(others)} linear layers stay as they are ({name}: {reason})"


def install(model, format):
    """Let all linear layers that can be ours be so; why the others cannot, by name."""
    others = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            reason = why_not(module)
            if reason:
                others[name] = reason
            else:
                become(module, FastLinear)
                is_coarse = "encoder." in name and not name.endswith(UNEVEN)
                module.packed = Packed((FORMATS if is_coarse else FINE)[format])
    return others


def uninstall(model):
    for module in model.modules():
        if type(module) is FastLinear:
            become(module, nn.Linear)
            for name in ("packed", "by_head"):
                vars(module).pop(name, None)


def why_not(linear):
    """Why a linear layer stays as it is; "" if it can be ours."""
    weight = linear.weight
    if type(linear) not in (nn.Linear, FastLinear):
        return f"a {type(linear).__module__}.{type(linear).__name__}"
    if type(weight) not in (torch.Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__module__}.{type(weight).__name__}"
    if not ops.ON_CPU:
        return "this build has no kernels for it"
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return f"in {str(weight.dtype).removeprefix('torch.')} on {weight.device}"
    if linear.in_features > ops.MOST_INPUTS:
        return "too wide"
    return "it has a forward of its own" if "forward" in vars(linear) else ""


def is_readable(linear):
    """Whether the layer is ours, and still what it was when it became so."""
    return (
        "packed" in vars(linear)
        and type(linear.weight) in (torch.Tensor, nn.Parameter)
        and all(
            tensor is None or (tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous())
            for tensor in (linear.weight, linear.bias)
        )
    )


def matrix_of(linear, packed=None):
    """Of a layer that is readable, or of another packed copy of its weight."""
    weight, bias, packed = linear.weight, linear.bias, packed or linear.packed
    return Matrix(packed.of(weight), NONE if bias is None else bias.detach(), packed.format, len(weight))


def is_ours_to_multiply(x):
    return (
        ops.ON_CPU
        and x.is_cpu
        and x.dtype == torch.float32
        and x.dim() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
    )


def transpose_heads(heads, weight):
    """[heads * head_dim, width] as [heads * width, head_dim]."""
    return weight.unflatten(0, (heads, -1)).transpose(1, 2).flatten(0, 1)


def needs_grad(*tensors):
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def multiply(x, matrix, norm=None, activation=ops.NO_ACTIVATION, residual=NONE):
    """activation(norm(x) weight^T + bias) + residual, of x [rows, inputs] and a residual of as many rows or fewer."""
    weight, bias, epsilon = (NONE, NONE, 0.0) if norm is None else (norm.weight.detach(), norm.bias.detach(), norm.eps)
    return ops.linear(
        x, weight, bias, matrix.weight, matrix.bias, residual, matrix.format, matrix.outputs, epsilon, activation
    )


def bytes_of(model):
    """What packed copies take beside the model's own weights."""
    packed = [vars(module).get(name) for module in model.modules() for name in ("packed", "by_head")]
    return sum(each.nbytes for each in packed if each is not None)
