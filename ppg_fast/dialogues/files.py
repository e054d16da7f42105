"""The bytes of a file of dialogues as UTF-8 text, however they are packed and coded; and what a file looks like that is
none."""

import bz2
import csv
import gzip
import importlib
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPES = "docs/data.md, 'Files of others', has the recipe"
PACKED: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
CHUNK = 1 << 16
CODINGS = {  # by the first bytes; the longer marks first
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    **{bytes([first, 0]): "utf-16-le" for first in b"[{"},
    **{bytes([0, first]): "utf-16-be" for first in b"[{"},
}
PARQUET = b"PAR1"
BINARY = {  # first bytes of what is no text
    b"PK\x03\x04": "a zip archive (or a spreadsheet): extract it",
    b"\x28\xb5\x2f\xfd": "a zstandard archive: extract it with zstd -d",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: extract it",
    b"ARROW1": "an Arrow file: write it with datasets.Dataset.from_file(...).to_json(...)",
    b"\xff\xff\xff\xff": "an Arrow stream: write it with datasets.Dataset.from_file(...).to_json(...)",
    b"SQLite format 3": "an SQLite database: export its rows as JSON lines",
    b"%PDF": "a PDF",
    b"\x93NUMPY": "a NumPy array",
    b"\x80": "a Python pickle: load it where you trust it, and write JSON lines",
    b"\x89HDF": "an HDF5 file",
}
TEXT = {  # beginnings of texts that are no JSON, in lower case
    r"version https://git-lfs": "a Git LFS pointer, not the file itself: git lfs pull fetches it",
    r"(\.\./)*\.git/annex/|/annex/objects/": "a git-annex pointer, not the file itself: git annex get fetches it",
    r"<!doctype html|<html": "an HTML page, perhaps an error page in place of the file: download it again",
    r"<\?xml|<[a-z]+[ >]": "XML: write its messages as JSON lines",
    r"---\s|- [\w-]+:\s": "YAML: write json.dumps(yaml.safe_load(...))",
    r"[\[{]\s*[{\[]*\s*u?'": "Python's own notation, not JSON: read with ast.literal_eval, write with json.dumps",
}


def unpacked(path: Path, told: Callable[[str], None]) -> bytes:
    """The bytes of the file, decompressed; one that is cut short is ``told`` of and gives what could be read."""
    if path.is_dir():
        rule = f"is a folder; give one file of dialogues (a dataset of `datasets`: load_from_disk, to_json; {RECIPES})"
        raise IsADirectoryError(f"{str(path)!r} {rule}")
    raw = path.read_bytes()
    opening = next((open_ for mark, open_ in PACKED.items() if raw.startswith(mark)), None)
    if opening is None:
        return raw
    parts: list[bytes] = []
    try:
        with opening(io.BytesIO(raw)) as file:
            while part := file.read1(CHUNK):
                parts.append(part)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        told(f"{path}, line {1 + sum(part.count(10) for part in parts)}: the archive is cut short or damaged: {error}")
    return b"".join(parts)


def as_utf8(raw: bytes, path: Path) -> bytes:
    """The same text in UTF-8, without a byte order mark. ValueError where it is not what its first bytes say."""
    coding = next((coding for mark, coding in CODINGS.items() if raw.startswith(mark)), None)
    if coding is None:
        return raw.removeprefix(b"\xef\xbb\xbf")
    try:
        return raw.decode(coding).encode("utf-8")
    except UnicodeError as error:
        place = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(
            f"{path} begins as {coding.upper()} and is not: {getattr(error, 'reason', error)}{place}"
        ) from None


def is_parquet(raw: bytes) -> bool:
    """Whether these are the bytes of a parquet file."""
    return raw.startswith(PARQUET) and raw.endswith(PARQUET) and len(raw) > 2 * len(PARQUET)


def parquet_rows(raw: bytes, path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file as JSON has them: a date is its text. ValueError without pyarrow, which comes with
    `datasets`, and for a file that it cannot read."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        rule = "looks like parquet, which pyarrow reads: pip install pyarrow (or datasets)"
        raise ValueError(f"{path} {rule}, or write it as JSON lines ({RECIPES})") from None
    try:
        rows = parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (OSError, ValueError, ImportError) as error:  # pyarrow's own are among these
        raise ValueError(f"{path} is parquet that cannot be read: {str(error).splitlines()[0][:200]}") from None
    return [_without_missing(json.loads(json.dumps(row, default=str))) for row in rows]


def _without_missing(value: Any) -> Any:
    """Without the keys that parquet gives every object because another has them."""
    if isinstance(value, dict):
        return {key: _without_missing(inner) for key, inner in value.items() if inner is not None}
    return [_without_missing(inner) for inner in value] if isinstance(value, list) else value


def looks_like(raw: bytes) -> str:
    """What a file is that holds no JSON, and what to do; "" where it begins as JSON does."""
    binary = next((what for mark, what in BINARY.items() if raw.startswith(mark)), "")
    if binary:
        return binary
    if raw.startswith(PARQUET):
        return "parquet that is cut short: download it again"
    beginning = raw[:4096].decode("utf-8", "replace").lstrip()
    known = next((what for form, what in TEXT.items() if re.match(form, beginning.lower())), "")
    if known or beginning[:1] in ("{", "["):
        return known
    if "\x00" in beginning or beginning.count("\ufffd") > len(beginning) // 10:
        return "a binary file"
    delimiter = _delimiter(beginning)
    if delimiter:
        name = {",": "CSV", "\t": "TSV (tab-separated)"}.get(delimiter, f"CSV separated by {delimiter!r}")
        table = f"pandas.read_csv(..., sep={delimiter!r}).to_json(..., orient='records', lines=True)"
        return f"{name}: write its rows as JSON lines, {table}"
    return "plain text: write each dialogue as one JSON object a line"


def _delimiter(beginning: str) -> str:
    """What separates the columns of a table; "" where it is none."""
    for delimiter in ",\t;|":
        names, *rows = itertools.islice(csv.reader(beginning.splitlines(True), delimiter=delimiter), 2)
        titles = len(names) > 1 and all(re.fullmatch(r"\s*[\w .-]{1,40}\s*", name) for name in names)
        if titles and [len(row) for row in rows] == [len(names)]:
            return delimiter
    return ""
