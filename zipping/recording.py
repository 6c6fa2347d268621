"""Calls whose ops torch records as a graph, to replay them on other images, whose tokens halt elsewhere.

Recorders that run the model get the masked mode, whose ops are the same for all images. torch.fx and TorchScript, which
read the code with symbols instead of images, are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

TRACING_UNSUPPORTED = (
    "{} is not supported: the shapes in an adaptive vision transformer depend on the images. "
    "Use torch.compile in masked mode (zip_tokens=False), or export_onnx.py."
)


def is_recorded(x: Tensor) -> bool:
    """Return whether torch records the ops of this call.

    Recorders are torch.jit.trace, torch.export, the ONNX exporters, make_fx, AOTAutograd and CUDA graphs.
    Some pass tensors without values, such as FakeTensor, whose ops Python intercepts.
    """
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_exporting()
        or get_proxy_mode() is not None
        or torch._C._dispatch_keys(x).has(torch._C.DispatchKey.Python)
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def refuse_symbols(x: Tensor) -> None:
    """Raise NotImplementedError if `x` is a symbol of torch.fx instead of images."""
    if isinstance(x, torch.fx.Proxy):
        raise NotImplementedError(TRACING_UNSUPPORTED.format("torch.fx"))
