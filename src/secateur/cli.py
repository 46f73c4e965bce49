"""The command line: prints, decides nothing.

Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="secateur",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Prune neural networks: train, cut, prove, measure, ship. Start with: secateur init",
    epilog="A first run on embedded data, half a minute: secateur run recipes/quickstart.yaml",
)

track = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Copy runs to a tracking store.")
app.add_typer(track, name="track")

Trust = Annotated[
    list[str] | None,
    typer.Option("--trust", metavar="MODULE", help="A module of yours that the checkpoint may import; repeatable."),
]
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A .safetensors file that a run wrote.")]


LATER = 2.0  # seconds before a process that is not the first of its run tells its error


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the mistakes of a user, a full disk and Ctrl-C into one message and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            code = 143 if isinstance(stop, Terminated) else 130
            if os.environ.get("RANK", "0") != "0":
                raise typer.Exit(code) from None
            _fail(f"interrupted. {' '.join(map(str, stop.args))}".strip(), code)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
            raise typer.Exit(141) from None
        except Exception as error:
            text = _explained(error)
            if text is None or os.environ.get("SECATEUR_TRACEBACK"):
                raise
            _fail(text, 1)

    return wrapped


def _explained(error: Exception) -> str | None:
    """Return the message for an error that is no bug, else None."""
    from secateur.types import SecateurError

    if isinstance(error, SecateurError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        todo = "; free some space and continue with --resume" if error.errno == errno.ENOSPC else ""
        return f"{where}{error.strerror or error}{todo}."
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return f"out of memory ({str(error).splitlines()[0] if str(error) else 'host'}); lower the batch size."
    return None


def _fail(text: str, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    if rank != "0":  # one of several processes: what happens to all of them is told by the first
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(LATER)  # torchrun ends the others meanwhile
        text = f"process {rank}: {text}"
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(code)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(version("secateur"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
@guarded
def run(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe, e.g. recipes/quickstart.yaml, or what several begin with: recipes/s1 asks for the dataset.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values put on top of the recipe, e.g. train.lr=0.01."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the run. [default: runs/NAME]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of this recipe.")] = False,
    shared: Annotated[
        Path | None,
        typer.Option("--shared", metavar="DIR", help="Take the dense training from here, or leave it here for others."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--source", metavar="DIR", help="Record the git revision of this. [default: the recipe's folder]"),
    ] = None,
) -> None:
    """Train, prune, recover, measure and report, as a recipe says."""
    from secateur.choice import chosen as one_of
    from secateur.folder import RECORDS, REPORT, choose
    from secateur.pipeline import run as carry_out
    from secateur.recipe import load
    from secateur.resolve import device
    from secateur.terminal import screen, summary
    from secateur.track.local import read
    from secateur.train.devices import joined

    recipe = one_of(recipe, overrides or (), typer.prompt if sys.stdin.isatty() else None)
    chosen = load(recipe, [*(overrides or ()), *([f"out={json.dumps(str(out))}"] if out else ())])
    with joined(device(chosen)) as team:
        folder = Path(team.decided(lambda: str(choose(chosen, resume))))
        try:
            with screen() if team.lead else nullcontext() as shown:
                carry_out(chosen, folder, resume=resume, screen=shown, shared=shared, source=source or recipe.parent)
        except KeyboardInterrupt as stop:
            again = ["--shared", str(shared)] if shared else []
            words = shlex.join([str(recipe), *(overrides or ()), "--out", str(folder), *again, "--resume"])
            start = "torchrun (options as before) -m secateur" if team.several else "secateur"
            told = f"Continue with: {start} run {words}"
            raise type(stop)(told if folder.exists() else "Nothing was written.") from None
    if team.lead:
        typer.echo(summary(read(folder / RECORDS)))
        typer.echo(f"report: {folder / REPORT}")


@app.command()
@guarded
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="s3, torchvision:NAME, timm:NAME, transformers:CLASS, package.module:factory, a checkpoint.",
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Arguments of the builder, e.g. num_classes=10."),
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option(metavar="N,C,H,W", help="Shape of the example input. [default: one image that fits the model]"),
    ] = None,
    integers: Annotated[bool, typer.Option(help="The input holds token numbers, not images.")] = False,
    proof: Annotated[bool, typer.Option("--verify", help="Prove the groups by permuting their units.")] = False,
    trust: Trust = None,
) -> None:
    """Show what can be cut in a model, and what is frozen and why."""
    from secateur.look import look

    typer.echo(look(model, arguments or (), input_shape, integers=integers, proof=proof, trust=trust or ()))


@app.command()
@guarded
def evaluate(
    checkpoint: Checkpoint,
    part: Annotated[str, typer.Option(help="Which images: test, validation or train.")] = "test",
    root: Annotated[str | None, typer.Option(metavar="DIR", help="Where the data is, when it moved.")] = None,
    density: Annotated[float | None, typer.Option(help="Of gates of FBS: the fraction of channels computed.")] = None,
    budget: Annotated[float | None, typer.Option(help="Of RNP: the fraction of the MACs, by a bias.")] = None,
    trust: Trust = None,
) -> None:
    """Measure loss and accuracy, or the ELBO, of a checkpoint on its data."""
    from secateur import infer

    parts = ("train", "validation", "test")
    if part not in parts:
        raise typer.BadParameter(f"{part!r} is not one of {', '.join(parts)}", param_hint="--part")
    reader = infer.open_model(checkpoint, trust or ())
    if density is not None:
        infer.set_density(reader, density)
    if budget is not None:
        typer.echo(f"bias {infer.set_budget(reader, budget, root=root):.4f} for each further group of channels")
    quality, data = infer.evaluate(reader, part, root=root)
    typer.echo(f"{checkpoint} on {quality.n:,} {part} images of {data.source.name}")
    for row in quality.measurements("cpu", part):
        typer.echo(f"{row.name:<18} {row.value:.4f} +- {row.spread:.4f} {row.unit} (standard error)")
    if (work := infer.work(reader, data, part)) is not None:
        typer.echo(
            f"{'macs':<18} {work.macs.mean():,.0f} +- {work.macs.std():,.0f} of {work.whole:,.0f} per image (spread)"
        )


@app.command()
@guarded
def predict(
    checkpoint: Checkpoint,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files (PNG, JPEG, ...).")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to print for each image.")] = 1,
    invert: Annotated[bool, typer.Option("--invert", help="Swap dark and bright first.")] = False,
    trust: Trust = None,
) -> None:
    """Print index, name and probability of the class of each image."""
    from secateur import infer

    for guess in infer.predict(infer.open_model(checkpoint, trust or ()), images, top=top, invert=invert):
        typer.echo(f"{guess.image}\t{guess.index}\t{guess.name}\t{guess.probability:.4f}")


@app.command()
@guarded
def init(
    path: Annotated[Path, typer.Argument(metavar="[FILE]", help="Where to write it.")] = Path("recipe.yaml"),
) -> None:
    """Write a recipe with every key, its default and what it means."""
    from secateur.starter import starter
    from secateur.train.resume import atomic_write
    from secateur.types import RecipeError

    if path.exists():
        raise RecipeError(f"{path} exists; choose another name.")
    atomic_write(path, starter(str(path)).encode())
    typer.echo(f"wrote {path}; next: secateur run {path}")


@app.command()
@guarded
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from secateur.recipe import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
@guarded
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run, finished or not.")],
) -> None:
    """Write report.html of a run again, from its records."""
    from secateur.folder import RECORDS, REPORT
    from secateur.report import render
    from secateur.track.local import read
    from secateur.train.resume import atomic_write

    atomic_write(folder / REPORT, render(read(folder / RECORDS)).encode())
    typer.echo(str(folder / REPORT))


@app.command()
@guarded
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, folders of those, or record files.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the page goes.")] = Path("compare.html"),
    part: Annotated[str, typer.Option(help="Accuracy (or ELBO) on which images: test or validation.")] = "test",
) -> None:
    """Put runs beside each other: accuracy against size and speed, over seeds, with the controls."""
    from secateur.compare import compare as beside
    from secateur.compare import write
    from secateur.report.compared import table

    if part not in ("test", "validation"):
        raise typer.BadParameter(f"{part!r} is not one of test, validation", param_hint="--part")
    found = beside(runs, part=part)
    write(found, out)
    typer.echo(table(found))
    typer.echo(f"page: {out}")


@app.command()
@guarded
def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe that the grid is put over.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values put on top of the recipe in all cells.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY=A,B,...", help="A key and its values, e.g. seed=0,1,2; repeatable."),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm", metavar="'KEY=VALUE ...'", help="Values that belong together, in each point; repeatable."
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at once; they share the processor's threads. [default: 1; with --ray, all]"),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="Run on a Ray cluster: HOST:PORT of its head, or auto."),
    ] = None,
    cpus: Annotated[int, typer.Option(min=1, help="Processors of each run on the cluster.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each run on the cluster, e.g. 1 or 0.5.")] = 0.0,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the sweep. [default: runs/NAME-sweep]")
    ] = None,
) -> None:
    """Run a recipe at every point of a grid, with each arm, then compare; the same command again continues."""
    from secateur.choice import chosen as one_of
    from secateur.compare import PAGE
    from secateur.recipe import load
    from secateur.report.compared import table
    from secateur.sweep import OnRay
    from secateur.sweep import sweep as carry_out
    from secateur.terminal import screen

    recipe = one_of(recipe, overrides or (), typer.prompt if sys.stdin.isatty() else None)
    folder = out or Path("runs") / f"{load(recipe, overrides or ()).name}-sweep"
    put = OnRay(ray, cpus, gpus) if ray else None
    try:
        with screen() as shown:
            values = {"overrides": overrides or (), "arms": arm or ()}
            result = carry_out(recipe, grid or (), folder, **values, jobs=jobs, screen=shown, ray=put)
    except KeyboardInterrupt as stop:
        raise type(stop)(f"Finished cells are kept; the same command with --out {folder} continues.") from None
    if result.comparison:
        typer.echo(table(result.comparison))
        typer.echo(f"page: {folder / PAGE}")
    if result.failed:
        rows = [f"{cell.name}: {why}" for cell, why in result.failed]
        count = f"{len(rows)} of {len(rows) + len(result.done)} cells failed"
        _fail("\n  ".join([f"{count}; the same command tries them again:", *rows]), 1)


@track.command()
@guarded
def push(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, finished or not.")],
    uri: Annotated[
        str | None,
        typer.Option(
            help="Server or store: http://host:5000, sqlite:///mlflow.db. [default: the recipe's; MLFLOW_TRACKING_URI]"
        ),
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(metavar="NAME", help="Experiment in MLflow. [default: the recipe's, or its name]")
    ] = None,
) -> None:
    """Copy a run to MLflow: parameters, metrics, files; a second push adds only what is missing."""
    from secateur.folder import tracked
    from secateur.track.mlflow import push as copy

    found = tracked(folder)
    done = copy(folder, uri or found.mlflow, experiment or found.experiment)
    added = f"{done.params} parameters, {done.metrics} metric values, {len(done.files)} files"
    typer.echo(f"run {done.run} of experiment {done.experiment}: {added} added")
