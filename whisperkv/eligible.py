"""Whether a decoder can be ours: what patch() refuses, and what is left to transformers when a decode begins."""

import torch
from torch import nn

from . import ops
from .attention import CrossAttention, SelfAttention
from .weights import FastLinear

ATTENTIONS = {"self_attn": SelfAttention, "encoder_attn": CrossAttention}
LINEARS = (nn.Linear, FastLinear)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(decoder, given, cross):
    """Why this decode is left to transformers; "" if it is ours."""
    dtype = decoder.embed_tokens.weight.dtype
    hidden = next((name for name, module in _attentions(decoder) if _hides_ours(module)), None)
    if decoder.training:
        reason = "the model is in training mode (call model.eval())"
    elif torch.is_grad_enabled() and needs_grad(decoder, given):
        reason = "gradients are on (decode under torch.no_grad())"
    elif dtype not in DTYPES:
        reason = f"the model is in {_name(dtype)} (whisperkv takes {_name(*DTYPES)})"
    elif hidden:
        reason = f"{hidden} has a forward of its own, which hides whisperkv's (remove it)"
    elif _is_spread(decoder):
        reason = "accelerate has spread the decoder over several devices"
    elif cross.is_latent and any(weight.is_meta for weight in _latent_weights(decoder)):
        reason = f"accelerate has offloaded the weights that CrossConfig.format={cross.format!r} reads ('model' works)"
    else:
        return ""
    return f"left to transformers: {reason}"


def needs_grad(decoder, given):
    inputs = (given.get("encoder_hidden_states"), given.get("inputs_embeds"))
    return any(x is not None and x.requires_grad for x in inputs) or any(p.requires_grad for p in decoder.parameters())


def _attentions(decoder):
    for index, layer in enumerate(decoder.layers):
        for name in ATTENTIONS:
            yield f"{name} of decoder layer {index}", getattr(layer, name)


def _hides_ours(module):
    """Whether the instance has a forward that does not lead to its class's: accelerate's hooks keep the old one."""
    own = vars(module).get("_old_forward", vars(module).get("forward"))
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _hook_device(module):
    """Where accelerate lets a module run; None if it leaves it alone."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device("cuda", device) if isinstance(device, int) else device and torch.device(device)


def _is_spread(decoder):
    return len({_hook_device(module) for module in decoder.modules() if hasattr(module, "_hf_hook")} - {None}) > 1


def device_of(decoder):
    """Where it computes: offloaded weights are elsewhere between two passes."""
    weight = decoder.embed_tokens.weight
    return (weight.is_meta and _hook_device(decoder.embed_tokens)) or weight.device


def check_device(decoder):
    device = device_of(decoder)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"the model is on {device}: whisperkv has kernels for cpu and cuda (model.to('cpu'))")
    reason = ops.cuda_reason(device.index) if device.type == "cuda" else ""
    if reason:
        raise ValueError(
            f"the model is on {device}, and whisperkv has no CUDA kernels for it ({reason}): "
            "move it with model.to('cpu')"
        )


def check_calibrated(decoder, setting):
    """What a calibration is about must be as plain as it was then."""
    for name, attention in _attentions(decoder):
        for project in (attention.k_proj, attention.v_proj):
            if type(project) not in LINEARS or type(project.weight) not in (torch.Tensor, nn.Parameter):
                kind = type(project) if type(project) not in LINEARS else type(project.weight)
                raise ValueError(
                    f"{setting} needs the plain weights of all k_proj and v_proj, and {name} has a {kind.__module__}."
                    f"{kind.__name__}: merge the adapter (merge_and_unload()), or leave the decoder out of the "
                    "quantization"
                )


def _latent_weights(decoder):
    return [
        getattr(layer.encoder_attn, name).weight
        for layer in decoder.layers
        for name in ("k_proj", "v_proj")
        if type(getattr(layer.encoder_attn, name)) in LINEARS
    ]


def check_projections(decoder, cross):
    """The latent formats read the weights themselves."""
    if not cross.is_latent:
        return
    dtype = decoder.embed_tokens.weight.dtype
    for index, layer in enumerate(decoder.layers):
        for name in ("k_proj", "v_proj"):
            module = getattr(layer.encoder_attn, name)
            weight = getattr(module, "weight", None)
            is_plain = type(module) in LINEARS and type(weight) in (torch.Tensor, nn.Parameter)
            if is_plain and weight.dtype == dtype:
                continue
            is_linear = type(module) in LINEARS
            kind = type(weight) if is_linear else type(module)
            what = f"has a {_name(weight.dtype)} weight of" if is_linear else "is a"
            raise ValueError(
                f"CrossConfig.format={cross.format!r} needs the plain weights of k_proj and v_proj in {_name(dtype)}, "
                f"and {name} of decoder layer {index} {what} {kind.__module__}.{kind.__name__}: merge the adapter "
                "(merge_and_unload()), leave the decoder out of the quantization, or use a format that calls it "
                "('model', 'int8', 'int4')"
            )


def _name(*dtypes):
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
