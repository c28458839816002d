"""Where models are put and in which dtype: what is asked for, checked to be there and to have kernels."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from specextend.errors import ConfigError, DeviceError

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp64": torch.float64,
    "float64": torch.float64,
}
HALF_NEEDS = (8, 0)  # compute capability of FlashAttention's kernels (Ampere)


def choose_device(device: str) -> torch.device:
    """The device asked for, checked to be there; "auto" is the first GPU, else the CPU."""
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    wanted = "cuda:0" if device == "cuda" else device
    if wanted not in there:
        why = "has no kernels here" if device == "mps" else "is not there"
        raise DeviceError(f"device {device!r} {why}; this machine has {', '.join(there)}", setting="device")
    return torch.device(wanted)


def choose_dtype(dtype: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype asked for; "auto" is fp32 on a CPU and elsewhere the checkpoint's own, if the device has kernels."""
    if dtype == "auto":
        own = config.dtype or torch.float32
        return own if device.type != "cpu" and not _fault(own, device) else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose one of auto, {', '.join(DTYPES)}", setting="dtype")
    check_placement(DTYPES[dtype], device)
    return DTYPES[dtype]


def check_placement(dtype: torch.dtype, device: torch.device) -> None:
    """DeviceError for a dtype without attention kernels on this device, and for devices other than CPU and CUDA."""
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {device.type!r} has no kernels here; use a CPU or a CUDA GPU", setting="device")
    fault = _fault(dtype, device)
    if fault:
        raise DeviceError(fault, setting="dtype")


def _fault(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why attention in `dtype` does not run on `device`, None where it does."""
    name = str(dtype).removeprefix("torch.")
    if device.type != "cuda":
        return None
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{name} has no attention kernels on a GPU; choose float32 there, or the CPU"
    if dtype != torch.float32 and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < HALF_NEEDS:
            found, needed = (f"{major}.{minor}" for major, minor in (capability, HALF_NEEDS))
            return f"{name} needs a GPU of compute capability {needed}, {device} has {found}; choose float32"
    return None
