"""Stands in for transformer_engine_torch, Transformer Engine's compiled module, where there is no GPU.

Every function that a layer calls answers with tensors of the right sizes by one op of torch, as one call of
the real one starts one kernel; a grouped product by one op for each expert, as it starts a product for each.
"""

import contextlib
import importlib
import importlib.metadata
import itertools
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

BYTES = ("kByte", "kFloat8E4M3", "kFloat8E5M2", "kFloat4E2M1")
DTYPES: dict[str, Any] = dict.fromkeys(BYTES, torch.uint8) | {
    "kInt32": torch.int32, "kFloat32": torch.float32, "kFloat16": torch.half, "kBFloat16": torch.bfloat16,
}  # fmt: skip
MANY = ("adam", "adam_param_remainder", "l2norm", "scale")
"""Kernels of many tensors."""
NOISE = torch.randn(1 << 16)
HERE = {
    '"cuda"': '"cpu"',
    "'cuda'": "'cpu'",
    ".is_cuda": ".is_cpu",
    '("cpu", torch.cuda.current_device())': '("cpu")',
}
"""What is read instead of words of the sources."""


class _Names(type):
    """A class whose attributes are numbers of their own, as those of an enum that is not known."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        value = next(_numbers)
        setattr(cls, name, value)
        return value


_numbers = itertools.count()


class Tensors(metaclass=_Names):
    INPUT, WEIGHT, OUTPUT = 0, 1, 2
    GEMM1_INPUT, GEMM1_WEIGHT, GEMM1_OUTPUT, GEMM2_INPUT, GEMM2_WEIGHT, GEMM2_OUTPUT = range(6)
    GEMM3_INPUT, GEMM3_WEIGHT, GEMM3_OUTPUT = 6, 7, 8


class Grads(metaclass=_Names):
    GRAD_OUTPUT1, GRAD_INPUT1, GRAD_OUTPUT2, GRAD_INPUT2, GRAD_OUTPUT3, GRAD_INPUT3 = range(6)


def _rows(tensor: Any) -> torch.Tensor:
    if isinstance(tensor, torch.Tensor):
        return tensor
    return tensor._columnwise_data if tensor._rowwise_data is None else tensor._rowwise_data


def _product(a: Any, turned_a: bool, b: Any, turned_b: bool) -> list[int]:
    """Sizes of a product: A and B are as cuBLAS names them, in columns."""
    first, second = _rows(a).size(), _rows(b).size()
    if turned_b:
        return [second[-1], first[-1]]
    return [*second[:-1], first[0] if turned_a else first[-1]]


def generic_gemm(a: Any, turned_a: bool, b: Any, turned_b: bool, out: Any, quantizer: Any, dtype: Any,
                 bias: Any = None, *more: Any, **__: object) -> tuple[Any, Any, None, None]:  # fmt: skip
    back = bias is not None and len(more) > 3 and more[3]  # bias dtype, gelu, its input, whether backward
    summed = torch.empty_like(bias) if back else None
    if out is not None:
        return out.zero_(), summed, None, None
    sizes = _product(a, turned_a, b, turned_b)
    if dtype == torch.float32:  # logits of a router, which have to tell experts apart
        return NOISE[: math.prod(sizes)].view(sizes).clone(), summed, None, None
    return torch.zeros(sizes, dtype=torch.bfloat16), summed, None, None


def te_general_grouped_gemm(a: Sequence[Any], turned_a: bool, b: Sequence[Any], turned_b: bool,
                            out: list[torch.Tensor], dtype: Any, splits: Any, bias: Any,
                            *_: object) -> Any:  # fmt: skip
    for place in range(len(a)):
        out[place % len(out)].zero_()
    return bias


def rmsnorm_fwd(rows: Any, weight: Any, eps: float, out: Any, quantizer: Any, *_: object) -> Any:
    done = rows.clone()
    if quantizer is not None:
        done = quantize(done, quantizer)
    return done, None, rows.new_empty(rows.size(0), dtype=torch.float32)


def rmsnorm_bwd(grad: Any, rows: Any, sigma: Any, weight: Any, *_: object) -> tuple[Any, Any]:
    return torch.zeros_like(rows), torch.empty_like(weight)


def quantize(tensor: Any, quantizer: Any, out: Any = None, *_: object) -> Any:
    """One op; what of the sizes of scales the real one reckons in C++ is not of Python's time."""
    if out is None:
        out = _made(quantizer, tuple(tensor.shape), tensor.dtype)
    return out


def split_quantize(tensor: Any, splits: Sequence[int], quantizers: Sequence[Any], **_: object) -> list[Any]:
    return [
        _made(one, (rows, tensor.shape[-1]), tensor.dtype)
        for rows, one in zip(splits, quantizers, strict=True)
    ]


def _made(quantizer: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor as blocks
    from transformer_engine.pytorch.tensor import mxfp8_tensor as mx

    data = torch.zeros(shape, dtype=torch.uint8)
    parts = {
        "rowwise_data": data, "rowwise_scale_inv": data, "fp8_dtype": quantizer.dtype, "quantizer": quantizer,
        "columnwise_data": data if quantizer.columnwise_usage else None,
        "columnwise_scale_inv": data if quantizer.columnwise_usage else None,
    }  # fmt: skip
    whole, bare = mx.MXFP8Tensor, mx.MXFP8TensorBase
    if isinstance(quantizer, blocks.Float8BlockQuantizer):
        whole, bare = blocks.Float8BlockwiseQTensor, blocks.Float8BlockwiseQTensorBase
        parts |= {"is_2D_scaled": quantizer.block_scaling_dim == 2, "data_format": 0}
    return bare(**parts) if quantizer.internal else whole(shape=shape, dtype=dtype, **parts)


def fused_attn_fwd(*args: Any, **_: object) -> list[torch.Tensor]:
    query = _halves(args)[0]  # [tokens, sequences, heads, width]
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    tokens, sequences, heads = query.shape[:3]
    return [out, torch.zeros(sequences, heads, tokens, 1), query.new_empty(1)]


def fused_attn_bwd(*args: Any, **_: object) -> list[Any]:
    query, key, value = _halves(args)[:3]
    return [torch.zeros_like(query), torch.empty_like(key), torch.empty_like(value), None]


def _halves(args: Sequence[Any]) -> list[torch.Tensor]:
    return [one for one in args if isinstance(one, torch.Tensor) and one.dtype == torch.bfloat16]


def _padded(rows: Any, out: Any, *_: object) -> None:
    out.zero_()


def _rope(rows: Any, *_: object) -> torch.Tensor:
    return torch.zeros_like(rows)


def multi_tensor(size: int, flag: Any, lists: Sequence[Sequence[torch.Tensor]], *_: object) -> Any:
    """A kernel of many tensors, of which a norm is the answer."""
    return torch.ones(1), None


def module() -> ModuleType:
    """The compiled module's stand-in, known to imports."""
    made = ModuleType("transformer_engine_torch")
    made.__spec__ = ModuleSpec(made.__name__, None)
    functions = (
        generic_gemm, te_general_grouped_gemm, rmsnorm_fwd, rmsnorm_bwd, quantize, split_quantize,
        fused_attn_fwd, fused_attn_bwd,
    )  # fmt: skip
    known: dict[str, Any] = {one.__name__: one for one in functions}
    known |= {
        "DType": _Names("DType", (), dict(DTYPES)), "FP8FwdTensors": Tensors, "FP8BwdTensors": Grads,
        "fused_multi_row_padding": _padded, "fused_multi_row_unpadding": _padded,
        "fused_rope_forward": _rope, "fused_rope_backward": _rope,
        "layernorm_fwd": None, "layernorm_bwd": None,
        **{f"multi_tensor_{name}": multi_tensor for name in MANY},
        "get_num_cublas_streams": lambda: 4, "get_cublasLt_version": lambda: 130000,
        "get_cudnn_version": lambda: 91400,
    }  # fmt: skip
    vars(made).update(known)

    def other(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Names(name, (), {})
        setattr(made, name, found)
        return found

    made.get_fused_attn_backend = lambda *_: made.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    made.__getattr__ = other  # type: ignore[method-assign]
    sys.modules[made.__name__] = made
    return made


class Device:
    """An H100's, where modules ask."""

    major, minor, multi_processor_count = 9, 0, 132
    name = gcnArchName = "H100"  # noqa: N815


class Anything(ModuleType):
    """Triton, of which nothing runs: its kernels answer a launch with nothing."""

    __path__ = ()
    __version__ = "3.4.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name)

    def __call__(self, *args: Any, **names: object) -> Any:
        return self

    def __getitem__(self, place: object) -> Any:
        return self


def install(sources: Sequence[Path], version: str) -> None:
    """Python sources of Transformer Engine and Megatron-Core, importable with "cuda" read as "cpu"."""
    target = Path(tempfile.mkdtemp(prefix="te-"))
    for source in sources:
        shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for path in target.rglob("*.py"):
        text = path.read_text()
        for given, taken in HERE.items():
            text = text.replace(given, taken)
        path.write_text(text)
    with (target / "transformer_engine/common/__init__.py").open("a") as common:
        common.write("\nload_framework_extension = lambda name: None\n")
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no libraries are loaded
    sys.path.insert(0, str(target))
    real = importlib.metadata.version
    importlib.metadata.version = lambda name: version if "engine" in name else real(name)
    importlib.import_module("torch._inductor.compile_fx")  # before, as it asks for Triton
    names = ("triton", "triton.language", "triton.language.core", "triton.language.standard")
    triton = {name: Anything(name) for name in names}
    for name, one in triton.items():
        one.__spec__ = ModuleSpec(name, None)
        one.cdiv, one.next_power_of_2 = lambda a, b: -(-a // b), lambda a: 1 << (a - 1).bit_length()
    sys.modules.update(triton)
    module()
    torch.cuda.get_device_properties = lambda *_: Device
    torch.cuda.get_device_capability = lambda *_: (Device.major, Device.minor)
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.nvtx._nvtx = SimpleNamespace(rangePushA=lambda _: 0, rangePop=lambda: 0)
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.Tensor.cuda = lambda self, *_, **__: self
    importlib.import_module("transformer_engine.pytorch")
    for name in triton:
        del sys.modules[name]


def eight_bits() -> None:
    """Says that the device has what 8 bits need."""
    fp8 = importlib.import_module("transformer_engine.pytorch.fp8")
    for name in ("is_fp8_available", "is_mxfp8_available", "is_fp8_block_scaling_available"):
        setattr(fp8.FP8GlobalStateManager, name, classmethod(lambda _: (True, "")))
    for name in ("check_fp8_support", "check_mxfp8_support", "check_fp8_block_scaling_support"):
        setattr(fp8, name, lambda: (True, ""))
