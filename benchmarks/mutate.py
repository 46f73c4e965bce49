"""Ways to damage a checkpoint or a recipe: blind (bytes, lines) and knowing the format (signed again)."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from typing import Any

from secateur.header import KEY, canonical

Draw = random.Random
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 1e308, float("nan"), float("inf"), 0.5,
    "", "\0", "\ud800", "é", "\u202e", "x" * 5000, "../../etc/passwd", "os:system", "__class__", [], {},
    [[]], {"": {}}, [0] * 300, {"__class__": 1}, "timm:hf-hub:a/b", "torchvision:vgg11", "mlp",
]  # fmt: skip
STRANGE_YAML = [
    "~", "yes", "1e400", "-1", "0", ".nan", "9" * 5000, "[" * 500, "{a: " * 60 + "}" * 60, "!!int x", "*a",
    "!!python/object/apply:os.system [true]", "&a [*a]", "2001-99-99", '"\\ud800"', "x" * 10**5, "0x", "|",
]  # fmt: skip


def flip(draw: Draw, raw: bytes) -> bytes:
    """One to eight bits of the file, half the time near its start."""
    out = bytearray(raw)
    for _ in range(draw.randint(1, 8)):
        out[draw.randrange(min(len(out), 4096) if draw.random() < 0.5 else len(out))] ^= 1 << draw.randrange(
            8
        )
    return bytes(out)


def cut(draw: Draw, raw: bytes) -> bytes:
    """The first part of the file only."""
    return raw[: draw.randrange(len(raw))]


def splice(draw: Draw, raw: bytes) -> bytes:
    """A block removed, doubled, zeroed, or replaced by noise."""
    start, size = draw.randrange(len(raw)), draw.choice([1, 8, 100, 5000])
    block = raw[start : start + size]
    new = draw.choice([b"", block * 2, b"\0" * len(block), draw.randbytes(len(block)), draw.randbytes(size)])
    return raw[:start] + new + raw[start + size :]


def lie_about_length(draw: Draw, raw: bytes) -> bytes:
    """The eight bytes that say how long the header is."""
    true = struct.unpack("<Q", raw[:8])[0]
    return (
        struct.pack("<Q", draw.choice([0, 1, true - 1, true + 1, len(raw), 10**8, 2**40, 2**64 - 1]))
        + raw[8:]
    )


def outer(draw: Draw, raw: bytes) -> bytes:
    """The tensor index of the file: names, shapes, dtypes, offsets."""
    head, data = unpack(raw)
    return pack(damaged(draw, head), data)


def inner(draw: Draw, raw: bytes) -> bytes:
    """The secateur header, not signed again."""
    return _with_header(raw, lambda fields: damaged(draw, fields), sign=False)


def signed(draw: Draw, raw: bytes) -> bytes:
    """The secateur header, one to three fields damaged and signed again."""
    return _with_header(raw, lambda fields: damaged(draw, fields, draw.randint(1, 3)), sign=True)


def deep(draw: Draw, raw: bytes) -> bytes:
    """A header nested hundreds or many thousands of levels deep, signed where that is possible."""
    levels = draw.choice([200, 900, 5000, 100_000])
    text = draw.choice(["[" * levels, "[" * levels + "]" * levels, '{"a":' * levels + "1" + "}" * levels])
    head, data = unpack(raw)
    head["__metadata__"] = {KEY: text}
    return pack(head, data)


FILES: list[Callable[[Draw, bytes], bytes]] = [
    flip,
    cut,
    splice,
    lie_about_length,
    outer,
    inner,
    signed,
    signed,
    deep,
]


def unpack(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the JSON header of a safetensors file and the bytes after it."""
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def pack(head: Any, data: bytes) -> bytes:
    """The reverse of ``unpack``; the text of the header may be anything."""
    text = json.dumps(head).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _with_header(raw: bytes, change: Callable[[dict[str, Any]], Any], sign: bool) -> bytes:
    head, data = unpack(raw)
    fields = json.loads(head["__metadata__"][KEY])
    digest = fields.pop("digest")
    fields = change(fields)
    if isinstance(fields, dict):
        text = canonical(fields)
        fields = {"digest": hashlib.sha256(text.encode()).hexdigest() if sign else digest, **fields}
    head["__metadata__"][KEY] = json.dumps(fields)
    return pack(head, data)


def damaged(draw: Draw, tree: Any, times: int = 1) -> Any:
    """Return a copy of a JSON tree with random places replaced, removed, renamed, wrapped or swapped."""
    tree = json.loads(json.dumps(tree))
    for _ in range(times):
        places = list(_places(tree))
        if not places:
            return draw.choice(STRANGE)
        # choose the depth first: else one large list would get every blow
        depth = draw.choice(sorted({p[0] for p in places}))
        _, parent, key = draw.choice([p for p in places if p[0] == depth])
        _blow(draw, parent, key, draw.choice(places))
    return tree


def _blow(draw: Draw, parent: Any, key: Any, other: tuple[int, Any, Any]) -> None:
    kind = draw.randrange(6)
    value = parent[key]
    if kind == 0 and isinstance(value, int | float) and not isinstance(value, bool):
        parent[key] = draw.choice([-value, value + 1, value * 10**6, value / 3, float(value), str(value)])
    elif kind <= 1:
        parent[key] = draw.choice(STRANGE)
    elif kind == 2:
        del parent[key]
    elif kind == 3 and isinstance(parent, dict):
        parent[draw.choice(["", key[:-1], key + "s", key.upper(), "x" * 300, "\u0000"])] = parent.pop(key)
    elif kind == 4:
        parent[key] = [value] if draw.random() < 0.5 else {"a": value}
    else:
        parent[key] = json.loads(json.dumps(other[1][other[2]]))


def _places(tree: Any, depth: int = 0) -> Any:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield depth, tree, key
        yield from _places(value, depth + 1)


def recipe_lines(draw: Draw, text: str) -> str:
    """Lines of a recipe removed, doubled, swapped, indented or joined."""
    lines = text.splitlines()
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(lines))
        line = lines[at]
        lines[at] = draw.choice(
            ["", f"{line}\n{line}", "  " + line, line.lstrip(), "\t" + line, line + " x", "- " + line]
        )
        other = draw.randrange(len(lines))
        if draw.random() < 0.3:
            lines[at], lines[other] = lines[other], lines[at]
    return "\n".join(lines)


def recipe_letters(draw: Draw, text: str) -> str:
    """Characters of a recipe replaced, removed or put in."""
    letters = list(text)
    for _ in range(draw.randint(1, 6)):
        new = draw.choice(
            [chr(draw.randrange(1, 0x300)), chr(draw.randrange(0x10FFFF)), *":-[]{},&*!|>'\"%@`#?\n\t 0"]
        )
        at = draw.randrange(len(letters))
        letters[at : at + draw.randint(0, 2)] = [new]
    return "".join(letters)


def recipe_values(draw: Draw, text: str) -> str:
    """One value of a recipe replaced by something strange, huge, nested, tagged or aliased."""
    lines = text.splitlines()
    spots = [i for i, line in enumerate(lines) if ":" in line]
    at = draw.choice(spots)
    lines[at] = lines[at].split(":")[0] + ": " + draw.choice(STRANGE_YAML)
    return "\n".join(lines)


TEXTS: list[Callable[[Draw, str], str]] = [recipe_lines, recipe_letters, recipe_values]
