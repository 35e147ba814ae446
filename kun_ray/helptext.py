"""What the fields of a configuration are, read from its dataclasses: the text of every job's `--help`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from typing import Any


def describe(schema: type, prefix: str = "") -> str:
    """Every field of a configuration with its type, default and sentence: the text of `--help`."""
    sentences = _field_sentences(schema)
    lines: list[str] = []
    for field, hint in fields(schema):
        name = f"{prefix}{field.name}"
        nested = dataclass_in(hint)
        if nested is not None:
            below = name + {dict: ".<name>.", list: "[i]."}.get(typing.get_origin(hint), ".")  # type: ignore[call-overload]
            lines += [f"{name}: {sentences.get(field.name, nested.__doc__ or '')}", describe(nested, below)]
            continue
        default = _default_text(field)
        type_name = (
            hint.__name__
            if isinstance(hint, type) and typing.get_origin(hint) is None
            else str(hint).replace("typing.", "")
        )
        lines.append(f"{name} ({type_name}{default})")
        lines.append(textwrap.indent(textwrap.fill(sentences.get(field.name, ""), 110), "    "))
    return "\n".join(line for line in lines if line.strip())


def fields(schema: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a dataclass, each with its resolved type."""
    hints = typing.get_type_hints(schema)
    return [(field, hints[field.name]) for field in dataclasses.fields(schema)]


def dataclass_in(hint: Any) -> type | None:
    """The dataclass that a type is, or holds: of `list[X]`, `dict[str, X]` and `X | None` it is X."""
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f" = {field.default_factory()!r}"
    if field.default is dataclasses.MISSING or field.default == "???":
        return ", required"
    return f" = {field.default!r}"


def _field_sentences(schema: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, by field name (PEP 257 attribute docstrings)."""
    sentences: dict[str, str] = {}
    for base in schema.__bases__:
        if dataclasses.is_dataclass(base):
            sentences |= _field_sentences(base)
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    for node, following in zip(body.body, body.body[1:], strict=False):
        match node, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(sentence))):
                sentences[name] = " ".join(sentence.split())
    return sentences
