"""Clocks, power, temperature and what slows a GPU down, from the library of its driver (NVML), which is there wherever
the driver is."""

import ctypes
from functools import cache
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
FIELDS: dict[str, tuple[Any, ...]] = {  # function, and what stands between the GPU and the answer
    "sm_mhz": ("nvmlDeviceGetClockInfo", 1),
    "memory_mhz": ("nvmlDeviceGetClockInfo", 2),
    "watts": ("nvmlDeviceGetPowerUsage",),  # in mW until it is returned, as the next
    "most_watts": ("nvmlDeviceGetEnforcedPowerLimit",),
    "celsius": ("nvmlDeviceGetTemperature", 0),
    "slowed_by": ("nvmlDeviceGetCurrentClocksThrottleReasons",),
}
REASONS = {
    0x1: "idle", 0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
    0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown", 0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip


@cache
def library(name: str) -> ctypes.CDLL:
    """NVML, ready; OSError where there is none."""
    found = ctypes.CDLL(name)
    found.nvmlErrorString.restype = ctypes.c_char_p
    if code := found.nvmlInit_v2():
        raise OSError(f"nvmlInit: {_words(found, code)}")
    return found


def state(uuid: str, name: str = LIBRARY) -> dict[str, Any]:
    """MHz, W and degrees Celsius of now, and the reasons why the clocks are not higher; ``missing`` says what the
    driver does not tell, and why. ``uuid``: as torch.cuda.get_device_properties has it."""
    try:
        return _told_by(library(name), f"GPU-{uuid}")
    except (OSError, AttributeError) as error:
        return {"missing": {"state": str(error)}}


def _told_by(nvml: Any, gpu: str) -> dict[str, Any]:
    device = ctypes.c_void_p()
    if code := nvml.nvmlDeviceGetHandleByUUID(gpu.encode(), ctypes.byref(device)):
        return {"missing": {"state": f"{gpu}: {_words(nvml, code)}"}}
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for field, (function, *arguments) in FIELDS.items():
        value = ctypes.c_ulonglong() if field == "slowed_by" else ctypes.c_uint()
        ask = getattr(nvml, function, None)
        if ask is None:
            missing[field] = f"the driver has no {function}"
        elif code := ask(device, *arguments, ctypes.byref(value)):
            missing[field] = _words(nvml, code)
        else:
            found[field] = value.value
    found |= {field: found[field] / 1e3 for field in ("watts", "most_watts") if field in found}
    if "slowed_by" in found:
        found["slowed_by"] = _reasons(found["slowed_by"])
    return {**found, "missing": missing} if missing else found


def _reasons(bits: int) -> list[str]:
    rest = bits & ~sum(REASONS)
    return [reason for bit, reason in REASONS.items() if bits & bit] + ([f"{rest:#x}"] if rest else [])


def _words(nvml: Any, code: int) -> str:
    return nvml.nvmlErrorString(code).decode()
