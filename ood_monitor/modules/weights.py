"""What a module's parameters say: where it is, in which precision it computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["device_of", "dtype_of", "leaf_parameters", "precision_of", "stored_weights"]


def device_of(module: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a module without any.

    Of weights that accelerate's hooks bring layer by layer, where they are brought to.
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    brought_to = (hook.execution_device for m in module.modules() for hook in _offloading(m))
    return torch.device(next((found for found in brought_to if found is not None), device))


def stored_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by name, each once, those that accelerate keeps elsewhere from there."""
    owners, known = dict(module.named_modules()), set()
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            yield name, parameter
            continue
        path, _, own = name.rpartition(".")
        maps = (hook.weights_map for hook in _offloading(owners[path]))
        weights = next((found for found in maps if found is not None), None)
        kept = parameter if weights is None else weights[own]
        place = (kept.data_ptr(), kept.shape)  # tied ones are two where they were freed
        if weights is None or place not in known:
            yield name, kept
        known.add(place)


def _offloading(module: nn.Module) -> list[Any]:
    """Hooks of accelerate that bring a module's own weights when it is called."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return [each for each in hooks if getattr(each, "offload", False)]


def dtype_of(module: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """The type of the first floating-point parameter; the default for a module without any.

    Weights of 8 bits are stored so and cast by layer: what the module computes in is another's.
    """
    floating = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next((dtype for dtype in floating if dtype.itemsize > 1), default)


def precision_of(tensor: Tensor) -> torch.dtype:
    """The type that has the bits of a tensor's products, which may be fewer than its own.

    CUDA convolves float32 as TF32, of float16's ten bits, unless told otherwise, and both it and
    the CPU may be told to multiply so, or as bfloat16.
    """
    if tensor.dtype != torch.float32:
        return tensor.dtype
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        return _precision_before_2_9(tensor)
    settings = {
        "cuda": (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul),
        "cpu": (backends.mkldnn.conv, backends.mkldnn.rnn, backends.mkldnn.matmul),
    }
    chosen = {setting.fp32_precision for setting in settings.get(tensor.device.type, ())}
    if "bf16" in chosen:
        return torch.bfloat16
    return torch.float16 if "tf32" in chosen else torch.float32


def _precision_before_2_9(tensor: Tensor) -> torch.dtype:
    """The same of PyTorch before 2.9, which has a setting for both and one for CUDA."""
    if torch.get_float32_matmul_precision() == "medium":
        return torch.bfloat16
    backends: Any = torch.backends
    cuda = (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32)
    return torch.float16 if tensor.device.type == "cuda" and any(cuda) else torch.float32


@contextmanager
def leaf_parameters(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The parameters as leaves that require gradients, by name, in module order.

    The floating-point and the complex ones, that is.
    """
    parameters = module.named_parameters()
    named = {name: p for name, p in parameters if p.is_floating_point() or p.is_complex()}
    flags = {name: p.requires_grad for name, p in named.items()}
    try:
        for parameter in named.values():
            parameter.requires_grad_(True)
        yield dict(named)
    finally:
        for name, flag in flags.items():
            named[name].requires_grad_(flag)
