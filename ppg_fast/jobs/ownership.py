"""Which files of a folder a run of ours may remove: those that it listed before it wrote them, and nothing else.

The list is `MANIFEST`, in the folder itself, so that a killed run has one too. ``--overwrite`` moves the listed files
into `ASIDE` until the new run has taken its first step; one that ends before gets the old one back.
"""

import glob
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

MANIFEST, ASIDE = ".ppg_fast.json", ".previous_run"
Recognise = Callable[[Path], list[str]]


class OwnedFolder:
    """A folder that holds a run's files beside others.

    ``entries``: what the run may write, files or glob patterns; one that means a folder (checkpoints/step-*) means all
    that is in it. ``recognise``: which of them are in a folder that has no list, by their content. ``keep_last`` is
    moved last, so that no half of a run is taken for one.
    """

    def __init__(self, path: Path, entries: Sequence[str], recognise: Recognise, keep_last: str) -> None:
        self.path, self.entries, self.recognise, self.keep_last = path, tuple(entries), recognise, keep_last

    def listed(self) -> list[str]:
        """The entries of the run in the folder; empty where there is none."""
        file = self.path / MANIFEST
        if not file.exists():
            return self.recognise(self.path)
        try:
            names = json.loads(file.read_text(encoding="utf-8"))["files"]
            if not all(isinstance(name, str) and _is_inside(name) for name in names):
                raise ValueError(f"it names {names}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} must list the files of a run, and cannot be read: {error}") from error
        return names

    def held(self) -> list[Path]:
        """What of the list is there, the file that says it is a run at the end."""
        found = {path for name in self.listed() for path in self.path.glob(name) if self._is_within(path)}
        return sorted(found, key=lambda path: (path == self.path / self.keep_last, path))

    def begin(self, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
        """Make the folder ready for a new run, the old one aside.

        FileExistsError where it holds a run and ``overwrite`` is off, or a file of another under a name that the run
        writes; ValueError where one of ``inputs`` is a file of the run that would go.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if overwrite:
            self.restore()  # a run that was killed before its first step left the one before it aside
        held = self.held()
        if (held or (self.path / ASIDE).exists()) and not overwrite:
            name = held[0].relative_to(self.path) if held else ASIDE
            wanted = "give another --output-dir, --resume to go on with it, or --overwrite to replace it"
            raise FileExistsError(f"{self.path} already holds a run ({name}): {wanted}")
        self._require_no_other(held)
        for given in inputs:
            if any(self._would_lose(given.resolve(), path.resolve()) for path in held):
                rule = "is of the run that --overwrite would remove, and an input of the new one"
                raise ValueError(f"{given} {rule}: copy it elsewhere, or give another --output-dir")
        if held:
            self.own()  # a run of before there were lists gets one
            self._move(self.path, self.path / ASIDE, held)
        self.own(*self.entries, fresh=True)

    def own(self, *names: str, fresh: bool = False) -> None:
        """List further files, before they are written."""
        names = tuple(dict.fromkeys([*([] if fresh else self.listed()), *names]))
        text = json.dumps({"about": "what ppg-fast may remove with --overwrite", "files": names}, indent=1) + "\n"
        new = self.path / f"{MANIFEST}.new"
        new.write_text(text, encoding="utf-8")
        new.replace(self.path / MANIFEST)

    def others(self, folder: Path) -> list[Path]:
        """Files of ``folder``, one of those in this one, that are not listed, relative to it."""
        held = self.held()
        files = [file for file in folder.rglob("*") if not file.is_dir() or file.is_symlink()]
        return [file.relative_to(folder) for file in files if file not in held]

    def discard(self) -> None:
        """The new run has begun: what was aside goes."""
        shutil.rmtree(self.path / ASIDE, ignore_errors=True)

    def restore(self) -> bool:
        """The old run comes back in place of the new one, where it is still aside; whether it was."""
        aside = self.path / ASIDE
        if not aside.exists():
            return False
        for path in self.held() if self._has_begun() else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            _remove_empty(path.parent, self.path)
        # in whole folders where these are gone, file by file where some of them stayed
        self._move(aside, self.path, [p for p in aside.rglob("*") if not p.is_dir() or p.is_symlink()])
        shutil.rmtree(aside)
        return True

    def recover(self) -> None:
        """Undo a move that was cut short: the old run is whole again, and no new one had begun."""
        if (self.path / ASIDE).exists() and not self._has_begun():
            self.restore()

    def _has_begun(self) -> bool:
        """Whether the run in the folder is the new one: its list is written once the old one is aside."""
        return (self.path / ASIDE / MANIFEST).exists() and (self.path / MANIFEST).exists()

    def _would_lose(self, given: Path, path: Path) -> bool:
        """Whether moving ``path`` takes ``given``, or a part of it, away."""
        inner = given in path.parents and self.path.resolve() in given.parents
        return given == path or path in given.parents or inner

    def _move(self, source: Path, target: Path, paths: Sequence[Path]) -> None:
        """Move files or folders, the list of them last."""
        target.mkdir(exist_ok=True)
        for path in [*paths, source / MANIFEST]:
            if not os.path.lexists(path):
                continue
            new = target / path.relative_to(source)
            new.parent.mkdir(parents=True, exist_ok=True)
            path.rename(new)
            _remove_empty(path.parent, source)

    def _require_no_other(self, held: Sequence[Path]) -> None:
        """FileExistsError where something stands under a name that the run writes and no run listed it."""
        for name in dict.fromkeys(PurePosixPath(entry).parts[0] for entry in self.entries):
            for path in self.path.glob(name):
                folder = path.is_dir() and not path.is_symlink()  # of a run's folder, the rest is left alone
                if (not held and any(path.iterdir())) if folder else path not in held:
                    rule = "which no run of ours listed as its own, and a run would write it"
                    raise FileExistsError(f"{path} exists, {rule}: move it away, or give another --output-dir")

    def _is_within(self, path: Path) -> bool:
        """Whether it lies in this folder by its true name: a link in its way leads elsewhere."""
        return self.path.resolve() in (path.parent.resolve() / path.name).parents


def escaped(name: str) -> str:
    """A file's name as an entry that means it alone."""
    return glob.escape(name)


def require_folder(path: str) -> Path:
    """A folder that may take a run. ValueError for an empty name, the root and the home folder."""
    if not path.strip():
        raise ValueError(f"output_dir must name a folder, got {path!r}")
    whole = Path(path).resolve()
    if whole in (Path(whole.anchor), Path.home().resolve()):
        raise ValueError(f"output_dir must be a folder of the run's own, not the root or the home folder, got {path!r}")
    return Path(path)


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts


def _remove_empty(folder: Path, root: Path) -> None:
    """Remove ``folder`` and those above it, below ``root``, as long as nothing is in them."""
    while folder != root and root in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
