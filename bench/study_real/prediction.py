"""What is predicted before training: the window and the weights of the lags, by `ppg-fast compare --env` on rollouts of
the untrained model, and the line that registers them."""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ppg_fast.spec import require

from ..real import command
from .cells import SETTINGS
from .dialogue import JUDGE, PARTNERS

ROLLOUTS = 512
SEED = 1000  # of sampling; its openings are those from seed 0 on, which no cell has
LOG = Path("docs/log.md")
SHARED = ("num_prompts", "num_generations", "max_new_tokens", "temperature", "dtype", "threads", "device")


def environment(judge: Path) -> dict[str, str]:
    """Of a process: one thread, no network, and where the partner finds its judge."""
    own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return {**own, JUDGE: str(judge.resolve())}


def predict(delay: int, model: Path, judge: Path, work: Path) -> dict[str, Any]:
    """What the command finds for the partner who settles after ``delay`` turns."""
    folder, log = work / f"window-{delay}", work / f"window-{delay}.log"
    log.unlink(missing_ok=True)
    given = {**{name: SETTINGS[name] for name in SHARED}, "rollouts": ROLLOUTS, "seed": SEED}
    given |= {"env": f"{__package__}.dialogue:{PARTNERS[delay].__name__}", "model": str(model)}
    flags = command.flags({**given, "output_dir": str(folder)})
    ran = command.run(["ppg_fast", "compare", "--overwrite", *flags], environment(judge), log)
    found = json.loads((folder / "window.json").read_text())
    kept = ("rollouts", "groups", "mean_return", "lags", "last_clear_lag", "window", "weights")
    return {
        **{name: found[name] for name in kept},
        "classes": found["classes"],
        "cpu_seconds": round(ran.cpu_seconds, 1),
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def line(delay: int, prediction: dict[str, Any], digest: str) -> str:
    """What has to stand in the log before a cell of this delay is trained."""
    window, weights = prediction["window"], prediction["weights"]
    return f"delay {delay}: window {window}, weights {weights} ({prediction['rollouts']} rollouts, judge {digest})"


def require_registered(root: Path, wanted: str) -> None:
    """ValueError where the log does not hold the line."""
    text = " ".join((root / LOG).read_text().split())
    require(wanted in text, f"{LOG} must hold the prediction before a cell is trained; add and commit it", wanted)
