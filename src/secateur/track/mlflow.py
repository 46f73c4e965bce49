"""A run folder into an MLflow store: parameters, metrics, figures and files.  Pushing again adds what is missing.

The folder stays the one truth; this copies it.  A record is copied once no resume can take it back, so that a
store, from which nothing can be removed, never holds what did not happen.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.track.artefacts import PRIVATE, RECORDS, artefacts, digest
from secateur.track.local import read, settled
from secateur.track.values import Metric, metrics, params
from secateur.types import Record, SecateurError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

KEY, FILE = "secateur.run", "secateur.file."  # tags: which run it is; digest of a file that arrived
COMMIT, NAME = "mlflow.source.git.commit", "mlflow.runName"
BATCH = {"metrics": 500, "params": 100}  # what one request may hold
TURN = 60.0  # seconds that a push waits while another one copies the same run
QUIET = {  # no telemetry, short waits for a server that is down, no lines of its own on stdout
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class TrackError(SecateurError):
    """A tracking store that is missing, does not answer, or refuses."""


@dataclass(frozen=True)
class Pushed:
    """What a push added, and to which run of which experiment."""

    run: str
    experiment: str
    params: int
    metrics: int
    files: tuple[str, ...]


@dataclass(eq=False)
class Copy:
    """A run in a store, and what the store is known to hold of it: names, steps of each metric, file digests."""

    client: MlflowClient
    run: str
    experiment: str
    status: str
    params: set[str] = field(default_factory=set)
    steps: dict[str, set[int]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


def push(folder: Path, uri: str | None = None, experiment: str | None = None) -> Pushed:
    """Copy the run in ``folder`` to the store at ``uri`` (None: what MLflow is set to), and say what was new.

    The MLflow run is found again by a tag made of recipe hash and start, so that nothing is there twice.
    ``experiment`` defaults to the name of the recipe.  Raises ``TrackError`` when MLflow is missing or the store
    does not answer; what had arrived stays, and the next push adds the rest.
    """
    if not any(record.stage == "run" for record in read(folder / RECORDS)):
        raise TrackError(f"{folder / RECORDS} has no record of a start; is this the folder of a run?")
    if not (records := settled(folder / RECORDS, folder / PRIVATE[0])):
        raise TrackError(f"the run in {folder} has saved no state yet; push again after its first epoch.")
    with answering(folder, uri), alone(folder):
        return bring(find(folder, records, uri, experiment), folder, records)


@contextmanager
def answering(folder: Path, uri: str | None) -> Iterator[None]:
    """Turn what MLflow raises into one message; keep its telemetry off, its waits short and its warnings quiet."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mlflow
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise TrackError(
            f"pushing needs MLflow, which cannot be imported ({error}); install the extra `track`: "
            "pip install 'secateur[track]'."
        ) from error
    store = uri or mlflow.get_tracking_uri()
    place = Path(store.removeprefix("sqlite:///"))
    if store.startswith("sqlite:///") and not place.parent.is_dir():  # MLflow would try for more than a minute
        raise TrackError(f"the MLflow store {store} cannot be made: {place.parent} is no folder; make it first.")
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:  # errors of HTTP are OSErrors
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        text = f"the MLflow store {store} did not take the run: {why}. Nothing in {folder} was changed; push again "
        raise TrackError(bare(f"{text}when the store answers, what had arrived is not sent twice.")) from error


def bare(text: str) -> str:
    """Return ``text`` without the names and passwords in its addresses.

    >>> bare("http://me:secret@host:5000 is down")
    'http://host:5000 is down'
    """
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder, so that a run that copies itself and a push do not both start the copy.

    The lock is on the folder itself: no file is added.  Raises ``TrackError`` when another one keeps it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + TURN
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise TrackError(f"{folder} is being copied by another process; push again later.") from error
                time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def find(folder: Path, records: Sequence[Record], uri: str | None, experiment: str | None) -> Copy:
    """Return the copy of a run in a store, begun when it is not there, with what is in it already."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    first = next(record for record in records if record.stage == "run")
    name = experiment or str(first.data["recipe"]["name"])
    run = _run(client, _experiment(client, name), first, folder)
    number = run.info.run_id
    steps = {key: {row.step for row in client.get_metric_history(number, key)} for key in run.data.metrics}
    there = set(_present(client, number))
    tags = {key.removeprefix(FILE): value for key, value in run.data.tags.items() if key.startswith(FILE)}
    digests = {where: value for where, value in tags.items() if where in there}
    return Copy(client, number, name, run.info.status, set(run.data.params), steps, digests)


def _experiment(client: MlflowClient, name: str) -> str:
    """Return the id of the experiment ``name``, made when it is not there."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    try:
        return client.create_experiment(name)
    except MlflowException:
        if found := client.get_experiment_by_name(name):  # another run made it at this moment
            return found.experiment_id
        raise


def _run(client: MlflowClient, experiment: str, first: Record, folder: Path) -> Run:
    """Return the MLflow run of this run, made when it is not there, with what identifies it as tags."""
    data = first.data
    key = f"{data['hash']}-{first.time:.6f}"
    for run in client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1):
        return run
    tags = {
        KEY: key,
        NAME: folder.resolve().name,
        "secateur.recipe": data["hash"],
        "secateur.folder": str(folder.resolve()),
        "secateur.device": data["device"],
        "secateur.platform": data["platform"],
        **{f"secateur.version.{name}": version for name, version in data["versions"].items()},
    }
    if revision := data.get("revision"):
        tags |= {COMMIT: revision["commit"], "secateur.git.dirty": str(revision["dirty"])}
    return client.create_run(experiment, round(first.time * 1000), tags)


def bring(copy: Copy, folder: Path, records: Sequence[Record], *, files: bool = True) -> Pushed:
    """Add to ``copy`` what it lacks of ``records`` and (with ``files``) of the folder; say what that was."""
    recipe = next(record for record in records if record.stage == "run").data["recipe"]
    given = {name: value for name, value in params(recipe).items() if name not in copy.params}
    rows = [row for row in metrics(records) if row.step not in copy.steps.get(row.name, ())]
    _send(copy, given, rows)
    sent = tuple(_send_files(copy, folder, records)) if files else ()
    ended = any(record.stage == "end" for record in records)
    if ended and files and copy.status != "FINISHED":
        copy.client.set_terminated(copy.run, "FINISHED", round(records[-1].time * 1000))
        copy.status = "FINISHED"
    return Pushed(copy.run, copy.experiment, len(given), len(rows), sent)


def _send(copy: Copy, given: dict[str, str], rows: Sequence[Metric]) -> None:
    from mlflow.entities import Metric as Entry
    from mlflow.entities import Param

    for start in range(0, len(given), BATCH["params"]):
        part = list(given.items())[start : start + BATCH["params"]]
        copy.client.log_batch(copy.run, params=[Param(name, value) for name, value in part])
        copy.params |= {name for name, _ in part}
    for start in range(0, len(rows), BATCH["metrics"]):
        some = rows[start : start + BATCH["metrics"]]
        entries = [Entry(row.name, row.value, round(row.time * 1000), row.step) for row in some]
        copy.client.log_batch(copy.run, metrics=entries)
        for row in some:
            copy.steps.setdefault(row.name, set()).add(row.step)


def _send_files(copy: Copy, folder: Path, records: Sequence[Record]) -> Iterator[str]:
    """Add the files that are new or changed; yield their names.  A tag with the digest follows each file."""
    with tempfile.TemporaryDirectory() as scratch:
        for path, where in artefacts(folder, records, Path(scratch)):
            found = digest(path)
            if copy.digests.get(where) != found:
                copy.client.log_artifact(copy.run, str(path), str(Path(where).parent) if "/" in where else None)
                copy.client.set_tag(copy.run, FILE + where, found)
                copy.digests[where] = found
                yield where


def mark(copy: Copy, status: str) -> None:
    """Set the status of an unfinished run: RUNNING, or KILLED for one that ended before its end."""
    if copy.status not in (status, "FINISHED"):
        copy.client.update_run(copy.run, status=status)
        copy.status = status


def _present(client: MlflowClient, name: str, path: str | None = None) -> Iterator[str]:
    """Yield the names of the files that the store holds of a run."""
    for entry in client.list_artifacts(name, path):
        if entry.is_dir:
            yield from _present(client, name, entry.path)
        else:
            yield entry.path
