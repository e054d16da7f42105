"""Chat templates that take the place of a tokenizer's own: a file, one that ships with ppg_fast, one of its others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppg_fast.rules import did_you_mean
from ppg_fast.spec import require

FOLDER = Path(__file__).parent / "templates"
GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
ASKS = ("defined", "undefined", "default", "d")  # whether somebody has said it
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # marks that transformers alone knows
MARKUP = re.compile(r"<[|\uff5c][^<>\s]+?[|\uff5c]>|<(?:start|end)_of_turn>|</?s>")


def shipped() -> list[str]:
    """Names of the training templates that ship: they only append, and write tools and thoughts."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def template_text(name: str, tokenizer: Any = None) -> str:
    """The template that ``name`` names: a file, one that ships, or one of several that ``tokenizer`` has; "" for "".

    ValueError where it is none of them, or cannot be read.
    """
    own = getattr(tokenizer, "chat_template", None)
    if not name:
        return ""
    if isinstance(own, dict) and name in own:
        return str(own[name])
    path = Path(name) if Path(name).is_file() else FOLDER / f"{name}.jinja"
    if path.parent != FOLDER or name in shipped():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"chat_template {name!r} cannot be read: {' '.join(str(error).split())}") from error
    known = [*shipped(), *(own if isinstance(own, dict) else ())]
    rule = f"chat_template must be a file or one of {', '.join(known)}"
    raise ValueError(f"{rule}, got {name[:200]!r}{did_you_mean(name, known)}")


def names_read(template: str) -> list[str]:
    """What a template reads beside messages, tools and special tokens: what template_kwargs may hold."""
    from jinja2 import Environment, TemplateError, meta, nodes

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(GENERATION.sub("", template))
    except TemplateError:  # what is wrong with it is said where it is rendered
        return []
    own, parameters = ({n.name for n in tree.find_all(nodes.Name) if n.ctx == kind} for kind in ("store", "param"))
    asked = [*tree.find_all(nodes.Test), *tree.find_all(nodes.Filter)]  # x is defined, x | default(y)
    own -= {node.node.name for node in asked if node.name in ASKS and isinstance(node.node, nodes.Name)}
    read = meta.find_undeclared_variables(tree) - own - parameters - {*GIVEN, *environment.globals}
    return sorted(name for name in read if not name.endswith("_token"))


def require_read(template: str, template_kwargs: Mapping[str, Any]) -> None:
    """ValueError for a name among ``template_kwargs`` that the template never reads."""
    if not template_kwargs:
        return
    read = names_read(template)
    unread = sorted(set(template_kwargs) - set(read))
    what = f"names that the chat template reads ({', '.join(read) or 'it reads none'})"
    require(not unread, f"chat_template_kwargs must hold {what}", ", ".join(unread)[:200])


def require_tokens(text: str, added: Mapping[str, int]) -> None:
    """ValueError for markup in ``text``, of a template, that the tokenizer would split like any other text."""
    missing = sorted({token for token in MARKUP.findall(text) if token not in added})
    rule = "the tokenizer must have the tokens that the chat template writes"
    require(not missing, f"{rule}; missing", ", ".join(missing)[:200])
