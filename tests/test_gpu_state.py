"""Clocks and power are read from the driver's library, and what it does not tell is said."""

import subprocess

import pytest
from ppg_fast.bench import gpu_state

DRIVER = r"""
#include <stdint.h>
#include <string.h>
typedef struct device* Device;
#define HANDLE ((Device)0x7f1234567890)  /* needs more than 32 bits */
int nvmlInit_v2(void) { return STARTS; }
const char* nvmlErrorString(int code) { return code == 3 ? "Not Supported" : "Not Found"; }
int nvmlDeviceGetHandleByUUID(const char* uuid, Device* device) {
  *device = HANDLE;
  return strcmp(uuid, "GPU-0a1b") ? 6 : 0;
}
int nvmlDeviceGetClockInfo(Device device, int clock, unsigned* mhz) {
  *mhz = clock == 1 ? 1980 : 3201;
  return device == HANDLE && (clock == 1 || clock == 2) ? 0 : 6;
}
int nvmlDeviceGetPowerUsage(Device device, unsigned* milliwatts) { *milliwatts = 612345; return device != HANDLE; }
int nvmlDeviceGetEnforcedPowerLimit(Device device, unsigned* milliwatts) { return 3; }
int nvmlDeviceGetTemperature(Device device, int sensor, unsigned* celsius) { *celsius = 41; return sensor; }
#if !OLD
int nvmlDeviceGetCurrentClocksThrottleReasons(Device device, uint64_t* bits) { *bits = 0x100000024; return 0; }
#endif
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A library with NVML's functions, built here."""
    source = tmp_path_factory.mktemp("driver") / "driver.c"
    source.write_text(DRIVER)

    def build(starts=0, old=0):
        built = source.with_name(f"starts{starts}{old}.so")
        flags = "-shared", "-fPIC", f"-DSTARTS={starts}", f"-DOLD={old}"
        subprocess.run(["cc", *flags, source, "-o", built], check=True)
        return str(built)

    return build


def test_what_the_driver_tells(driver):
    assert gpu_state.state("0a1b", driver()) == {
        "sm_mhz": 1980,
        "memory_mhz": 3201,
        "watts": 612.345,
        "celsius": 41,
        "slowed_by": ["power cap", "software thermal slowdown", "0x100000000"],
        "missing": {"most_watts": "Not Supported"},
    }


def test_a_driver_that_tells_nothing(driver):
    assert gpu_state.state("ffff", driver()) == {"missing": {"state": "GPU-ffff: Not Found"}}
    assert gpu_state.state("0a1b", driver(3)) == {"missing": {"state": "nvmlInit: Not Supported"}}
    (said,) = gpu_state.state("0a1b", "libno-such-library.so")["missing"].values()
    assert "libno-such-library.so" in said


def test_a_driver_without_a_function(driver):
    found = gpu_state.state("0a1b", driver(old=1))
    assert found["missing"]["slowed_by"] == "the driver has no nvmlDeviceGetCurrentClocksThrottleReasons"
    assert found["sm_mhz"] == 1980
