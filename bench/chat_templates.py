"""The table of chat templates: which dialogue each writes exactly, and why it is refused where it does not."""

from .tables import NOT_MEASURED, Results, of

MARKS = {"one": "=", "own": "b", "several": "t", "offline": "o", "refuses": "R", "loses": "L", "no end": "E"}


def chat_templates_section(results: Results) -> str:
    """One row a template, one column a dialogue; below it how many cells have each mark."""
    text = ""
    for _, file in of(results, "chat_templates"):
        rows = file["chat_templates"]
        shapes = list(next(iter(rows.values())))
        lines = [["template", *shapes], ["---", *[":---:"] * len(shapes)]]
        lines += [[f"`{name}`", *(MARKS[cells[shape]] for shape in shapes)] for name, cells in rows.items()]
        text += "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
        every = [outcome for cells in rows.values() for outcome in cells.values()]
        counts = ", ".join(f"{every.count(outcome)} `{mark}`" for outcome, mark in MARKS.items())
        versions = ", ".join(f"{package} {version}" for package, version in file["ppg_fast"]["versions"].items())
        text += f"\n{len(every)} cells of {len(rows)} templates: {counts}. {versions}.\n"
    return text or NOT_MEASURED
