"""The JSON header of a checkpoint: its fields, how it is signed, and how strictly it is read.

A checkpoint is one ``.safetensors`` file.  Its metadata holds one entry, ``secateur``: this header as JSON,
with ``digest``, the SHA-256 of all other fields, and ``data``, the SHA-256 of all tensors.  The digests find
damage; they do not prove who wrote the file, so every field is checked as if a stranger had written it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue, PlainSerializer, ValidationError

from secateur.types import CheckpointError, Measurement, Plan, Proof, SecateurError

FORMAT = 1
KEY = "secateur"


def _plan(value: Any) -> Any:
    try:
        return Plan.from_json(json.dumps(value)) if isinstance(value, dict) else value
    except SecateurError as error:
        raise ValueError(str(error)) from error


class Header(BaseModel):
    """What a checkpoint says about itself.

    ``spec`` and ``kwargs`` build the dense model, ``surgery`` makes it small, ``gates`` and ``steering`` (the sizes
    of a controller) let it choose at run time; ``modules`` is what the result must look like (path -> class and its
    settings).  ``aliases`` maps each further name of a tied tensor to
    the stored one; ``frozen``, ``temporary`` (non-persistent buffers), ``pairs`` (complex, stored as pairs of
    reals) and ``channels_last`` list tensor names.

    >>> Header(data="0" * 64, class_name="torch.nn:Linear").format
    1
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format: Literal[1] = 1
    class_name: str
    spec: str | None = None
    kwargs: dict[str, JsonValue] = {}
    modules: dict[str, str] = {}
    aliases: dict[str, str] = {}
    frozen: tuple[str, ...] = ()
    temporary: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    channels_last: tuple[str, ...] = ()
    surgery: dict[str, JsonValue] | None = None
    gates: tuple[dict[str, JsonValue], ...] = ()
    steering: dict[str, int] | None = None
    plan: Annotated[
        Plan | None,
        BeforeValidator(_plan),
        PlainSerializer(lambda plan: json.loads(plan.to_json()) if plan else None),
    ] = None
    proof: Proof | None = None
    measurements: tuple[Measurement, ...] = ()
    recipe: str | None = None
    extra: dict[str, JsonValue] = {}
    versions: dict[str, str] = {}
    data: str

    def to_text(self) -> str:
        """Return the signed JSON text."""
        fields = self.model_dump(mode="json")
        return canonical({"digest": _sha256(canonical(fields)), **fields})

    @staticmethod
    def from_text(text: str) -> Header:
        """Return the header written by ``to_text``; raises ``CheckpointError`` on anything else."""
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict):
                raise CheckpointError("its header is not a JSON object; it is damaged or was not written by secateur.")
            _check_format(fields)
            digest = fields.pop("digest", None)
            if digest != _sha256(canonical(fields)):
                raise CheckpointError("its header was changed after it was saved (digest differs); get a fresh copy.")
            return Header.model_validate_json(json.dumps(fields))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"header field {where!r}: {first['msg']}; get a fresh copy.") from error
        except (SecateurError, ValueError, RecursionError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"its header cannot be read ({error}); get a fresh copy.") from error


def _check_format(fields: dict[str, Any]) -> None:
    found = fields.get("format")
    if isinstance(found, int) and found > FORMAT:
        raise CheckpointError(f"it has format {found}, this secateur reads up to {FORMAT}; install a newer one.")


def canonical(fields: Any) -> str:
    """Return the one JSON text of ``fields``: sorted keys, no spaces, ASCII."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def data_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 over name, dtype, shape and bytes of contiguous CPU tensors, ordered by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        total.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
