"""How torch's CPU threads wait for each other where other processes want the cores too; imported before torch is."""

import os
import sys

# of some 10 to 40 ns each. libgomp's 300,000 keep a core from the very thread that is waited for, which then stands
# behind another process until the system's next turn, in every parallel region
SPINS = 10_000
SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def wait_briefly() -> None:
    """Let a thread of libgomp sleep after `SPINS` turns of waiting; the user's own setting, and a torch that is there
    already, stay as they are. No result depends on it."""
    if "torch" not in sys.modules and not set(SETTINGS) & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def waits() -> str:
    """What torch's OpenMP was told, in words."""
    found = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return ", ".join(found) or "spin for milliseconds (no GOMP_SPINCOUNT; torch was imported before ppg_fast)"


wait_briefly()
