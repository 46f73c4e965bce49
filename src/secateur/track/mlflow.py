"""A run folder into an MLflow store: parameters, metrics, figures and files.  Pushing again adds what is missing.

The run itself never talks to a server; its folder stays the one truth, and this copies it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.report.arms import flat
from secateur.report.figures import standalone
from secateur.report.view import charts
from secateur.track.local import read
from secateur.types import Record, SecateurError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

RECORDS = "records.jsonl"
PRIVATE = ("state.safetensors",)  # of an unfinished run; gone at its end
KEY, DIGESTS = "secateur.run", "secateur.files"
COMMIT, NAME = "mlflow.source.git.commit", "mlflow.runName"
LONGEST = 500  # characters of a parameter, the limit of the oldest stores
BATCH = {"metrics": 500, "params": 100}  # what one request may hold
QUIET = {  # no telemetry, short waits for a server that is down, no lines of its own on stdout
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
EPOCH = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "rate")


class TrackError(SecateurError):
    """A tracking store that is missing, does not answer, or refuses."""


@dataclass(frozen=True)
class Metric:
    """One value of a metric: at ``step`` (epochs or cuts so far), taken at ``time`` (seconds since 1970)."""

    name: str
    value: float
    step: int
    time: float


@dataclass(frozen=True)
class Pushed:
    """What a push added, and to which run of which experiment."""

    run: str
    experiment: str
    params: int
    metrics: int
    files: tuple[str, ...]


def push(folder: Path, uri: str | None = None, experiment: str | None = None) -> Pushed:
    """Copy the run in ``folder`` to the store at ``uri`` (None: what MLflow is set to), and say what was new.

    The MLflow run is found again by a tag made of recipe hash and start, so that nothing is there twice.
    ``experiment`` defaults to the name of the recipe.  Raises ``TrackError`` when MLflow is missing or the store
    does not answer; what had arrived stays, and the next push adds the rest.
    """
    records = read(folder / RECORDS)
    first = next((record for record in records if record.stage == "run"), None)
    if first is None:
        raise TrackError(f"{folder / RECORDS} has no record of a start; is this the folder of a run?")
    recipe = first.data["recipe"]
    with _answering(folder, uri):
        client = _client(uri)
        number = _experiment(client, experiment or str(recipe["name"]))
        run = _run(client, number, first, folder)
        added = _add_values(client, run, recipe, records)
        files = _add_files(client, run, folder, records)
        if any(record.stage == "end" for record in records) and run.info.status != "FINISHED":
            client.set_terminated(run.info.run_id, "FINISHED", round(records[-1].time * 1000))
    return Pushed(run.info.run_id, experiment or str(recipe["name"]), *added, files)


@contextmanager
def _answering(folder: Path, uri: str | None) -> Iterator[None]:
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
        why = str(error).strip().splitlines()[0][:300]
        raise TrackError(
            f"the MLflow store {store} did not take the run: {why}. Nothing in {folder} was changed; push again "
            "when the store answers, what had arrived is not sent twice."
        ) from error


def _client(uri: str | None) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _experiment(client: MlflowClient, name: str) -> str:
    """Return the id of the experiment ``name``, made when it is not there."""
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name)


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
    commit = revision(folder)
    if commit:
        tags[COMMIT] = commit
    return client.create_run(experiment, round(first.time * 1000), tags)


def revision(folder: Path) -> str | None:
    """Return the git commit of the repository that ``folder`` is in, None where there is none."""
    words = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _add_values(client: MlflowClient, run: Run, recipe: Any, records: Sequence[Record]) -> tuple[int, int]:
    """Add the parameters and metric values that are not there; return how many of each."""
    from mlflow.entities import Metric as Entry
    from mlflow.entities import Param

    name = run.info.run_id
    params = [Param(key, str(value)[:LONGEST]) for key, value in flat(recipe).items() if key not in run.data.params]
    found = metrics(records)
    have = {key: {row.step for row in client.get_metric_history(name, key)} for key in run.data.metrics}
    missing = [row for row in found if row.step not in have.get(row.name, ())]
    entries = [Entry(row.name, row.value, round(row.time * 1000), row.step) for row in missing]
    for start in range(0, len(params), BATCH["params"]):
        client.log_batch(name, params=params[start : start + BATCH["params"]])
    for start in range(0, len(entries), BATCH["metrics"]):
        client.log_batch(name, metrics=entries[start : start + BATCH["metrics"]])
    return len(params), len(entries)


def metrics(records: Sequence[Record]) -> list[Metric]:
    """Return the metrics of a run: per epoch, per cut, and the measurements at the end with their spreads.

    The step of an epoch counts the epochs of all phases; that of a cut is its number.
    """
    rows: list[tuple[str, Any, int, float]] = []
    epochs = 0
    for record in records:
        data, time = record.data, record.time
        if record.stage == "epoch":
            epochs += 1
            rows += [(name, data[name], epochs, time) for name in EPOCH]
        elif record.stage == "cut":
            step = int(data["step"])
            rows += [(f"keep/{name}", value, step, time) for name, value in data["achieved"].items()]
            for moment in ("before", "after"):
                rows += [(f"cut/{moment}_{name}", data[moment][name], step, time) for name in ("loss", "top1", "top5")]
        elif record.stage == "recovered":
            rows += [
                (f"cut/recovered_{name}", data[name], int(data["step"]), time) for name in ("loss", "top1", "top5")
            ]
        elif record.stage == "measure":
            for model, found in data["measurements"].items():
                for row in found:
                    name = f"{model}/{re.sub(r'[^A-Za-z0-9_.-]+', '_', row['name'])}"
                    rows += [(name, row["value"], 0, time), (f"{name}.spread", row["spread"], 0, time)]
    return [Metric(name, float(value), step, time) for name, value, step, time in rows if value is not None]


def _add_files(client: MlflowClient, run: Run, folder: Path, records: Sequence[Record]) -> tuple[str, ...]:
    """Add the files of the run and its figures, those that are new or changed; return their names.

    A tag holds the digest of each file that arrived, written after the file.
    """
    name = run.info.run_id
    present = set(_present(client, name))
    digests: dict[str, str] = json.loads(run.data.tags.get(DIGESTS, "{}"))
    digests = {where: digest for where, digest in digests.items() if where in present}
    sent = []
    with tempfile.TemporaryDirectory() as scratch:
        for path, where in [*_files(folder), *_figures(records, Path(scratch))]:
            digest = _digest(path)
            if digests.get(where) != digest:
                client.log_artifact(name, str(path), str(Path(where).parent) if "/" in where else None)
                digests[where] = digest
                client.set_tag(name, DIGESTS, json.dumps(digests))
                sent.append(where)
    return tuple(sent)


def _present(client: MlflowClient, name: str, path: str | None = None) -> Iterator[str]:
    """Yield the names of the files that the store holds of a run."""
    for entry in client.list_artifacts(name, path):
        if entry.is_dir:
            yield from _present(client, name, entry.path)
        else:
            yield entry.path


def _files(folder: Path) -> list[tuple[Path, str]]:
    """Return (file, name in the store) of everything in a run folder that is not private."""
    found = [(path, path.relative_to(folder).as_posix()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [(path, name) for path, name in found if name not in PRIVATE and not path.name.startswith(".")]


def _figures(records: Sequence[Record], scratch: Path) -> list[tuple[Path, str]]:
    """Write the curves of a run as pictures; return (file, name in the store)."""
    stages: dict[str, list[Any]] = {}
    for record in records:
        stages.setdefault(record.stage, []).append(record.data)
    found = []
    for title, svg in charts(stages):
        if svg:
            path = scratch / f"{title.lower()}.svg"
            path.write_text(standalone(svg))
            found.append((path, f"figures/{path.name}"))
    return found


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
