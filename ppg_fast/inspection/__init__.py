"""Dialogues as a model reads them in training: which tokens train, in which turn, with which weight."""

from ppg_fast.inspection.command import inspect_file, settings_of
from ppg_fast.inspection.inspector import Inspector
from ppg_fast.inspection.openings import OpeningInspector
from ppg_fast.inspection.view import Piece, TurnRow, View

__all__ = ["Inspector", "OpeningInspector", "Piece", "TurnRow", "View", "inspect_file", "settings_of"]
