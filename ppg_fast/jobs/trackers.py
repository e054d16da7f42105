"""Where a run reports to besides its own folder: tensorboard, wandb and trackio, each through accelerate's tracker of
that name."""

import math
import secrets
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ppg_fast.config import TrainConfig

FOLDER = "trackers"  # of the run: what they keep on disk


def require_trackers(names: Sequence[str]) -> None:
    """ValueError, one line, where a package of the named trackers is missing."""
    missing = [name for name in ("accelerate", *names) if names and find_spec(name) is None]
    if missing:
        raise ValueError(f"report_to {','.join(names)} needs {', '.join(missing)}: pip install ppg_fast[trackers]")


class Trackers:
    """The trackers that a config names; none of them is the rule. One that fails later is a warning and left out: the
    run goes on.

    Training metrics are named <phase>/<metric>, evaluations keep their own eval/ names. ``resume``: report to the same
    wandb and trackio run again. ValueError, naming the tracker, where one cannot start.
    """

    def __init__(self, config: TrainConfig, path: Path, resume: bool = False) -> None:
        self.active: list[Any] = []
        names = config.trackers
        if not names:
            return
        require_trackers(names)
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # its trackers ask it who is the main process
        (path / FOLDER).mkdir(parents=True, exist_ok=True)
        run_name = config.run_name or path.resolve().name
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"run_name": "tensorboard", "logging_dir": str(path / FOLDER)},
            "wandb": {
                "run_name": config.project,
                "name": run_name,
                "dir": str(path / FOLDER),
                "id": _run_id(path / FOLDER / "run_id"),
                "resume": "allow",
                "mode": "offline" if config.report_offline else None,
                "settings": {"console": "off", "quiet": True},
            },
            "trackio": {
                "run_name": config.project,
                "name": run_name,
                "resume": "allow" if resume else "never",
                "embed": False,
            },
        }
        for name in names:
            try:
                tracker = LOGGER_TYPE_TO_CLASS[name](**options[name])
                tracker.start()
                if not resume:
                    tracker.store_init_configuration({k: "" if v is None else v for k, v in asdict(config).items()})
            except Exception as error:  # each library has errors of its own
                raise ValueError(f"report_to {name} cannot start: {_first_line(error)}") from error
            self.active.append(tracker)

    def log(self, phase: str, metrics: dict[str, Any], step: int) -> None:
        """The finite numbers of one logged row; ``step`` counts the training steps of all phases."""
        prefix = "" if phase == "eval" else f"{phase}/"
        numbers = {
            k: v
            for k, v in metrics.items()
            if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
        }
        named = {
            name if name.startswith("eval/") else prefix + name: v
            for name, v in numbers.items()
            if phase != "eval" or name != "step"
        }
        self._each("log", lambda tracker: tracker.log(named, step=step))

    def log_table(self, name: str, rows: Sequence[dict[str, Any]], step: int) -> None:
        """A table where the tracker has tables (wandb, trackio), Markdown where it has text (tensorboard)."""
        if rows:
            self._each("log a table", lambda tracker: _log_table(tracker, name, rows, step))

    def finish(self) -> None:
        """Send what is left."""
        self._each("finish", lambda tracker: tracker.finish())
        self.active = []

    def _each(self, what: str, call: Any) -> None:
        for tracker in list(self.active):
            try:
                call(tracker)
            except Exception as error:  # noqa: PERF203 (a lost connection must not end a run of a week)
                self.active.remove(tracker)
                reason = _first_line(error)
                warnings.warn(
                    f"report_to {tracker.name} could not {what} and is left out from here on: {reason}", stacklevel=3
                )


def _log_table(tracker: Any, name: str, rows: Sequence[dict[str, Any]], step: int) -> None:
    columns = list(rows[0])
    if tracker.name == "wandb":
        tracker.log_table(name, columns=columns, data=[[row[c] for c in columns] for row in rows], step=step)
    elif tracker.name == "trackio":
        import pandas
        import trackio

        tracker.log({name: trackio.Table(dataframe=pandas.DataFrame(list(rows)))}, step=step)
    else:
        cells = [
            columns,
            ["---"] * len(columns),
            *([str(row[c]).replace("|", "\\|").replace("\n", " ") for c in columns] for row in rows),
        ]
        tracker.log({name: "\n".join(f"| {' | '.join(line)} |" for line in cells)}, step=step)


def _run_id(path: Path) -> str:
    """The name under which a service knows this run: drawn once, kept in the folder."""
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
