"""GPUs as their makers and users publish them, for the model."""

from .model import Device

# The clock is the one at which the maker's peak of dense bfloat16 products holds: 989, 989, 2,250 and 1,307 TFLOP/s.
DEVICES = (
    Device("H100", 132, 1.83e9, 3.0e12, 740e12, {1: 132, 2: 66, 4: 32, 8: 16}, 50 << 20),
    Device("H200", 132, 1.83e9, 4.3e12, 740e12, {1: 132, 2: 66, 4: 32, 8: 16}, 50 << 20),
    Device("B200", 148, 1.86e9, 7.2e12, 1420e12, {1: 148, 2: 74, 4: 36, 8: 16}, 126 << 20),
    Device("MI300X", 304, 2.1e9, 4.3e12, 600e12, {1: 304}, 256 << 20, lanes=64),
)
SOURCES = {
    "H100": "3.35 TB/s in the datasheet, of which users reach 0.90; GEMMs from reports of 730 to 790 TFLOP/s",
    "H200": "4.8 TB/s in the datasheet, 4.3 in a reported copy; GEMMs as on an H100",
    "B200": "8 TB/s in the datasheet, 0.90 of it as on an H200; GEMMs from a report of an average of 1,420 TFLOP/s",
    "MI300X": "5.3 TB/s in the datasheet, of which users reach 0.81; its GEMMs matter nowhere here",
}


def named(name: str) -> Device:
    return next(device for device in DEVICES if device.name == name)
