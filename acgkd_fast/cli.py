"""The command line: demo, train-teacher, distill, evaluate, table, doctor."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from . import __version__
from .errors import InputError, check

_INTERRUPTED = 130


class _Group(click.Group):
    """Turns expected failures into one line and a non-zero exit; anything else is a defect and shows itself."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            result = super().main(*args, **kwargs)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (InputError, OSError) as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            sys.exit(1)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted: what was finished is kept; `distill --resume` goes on from it", err=True)
            sys.exit(_INTERRUPTED)
        sys.exit(result or 0)


class _Range(click.ParamType):
    """LOW:HIGH, or one number for both."""

    name = "LOW:HIGH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        low, _, high = str(value).partition(":")
        try:
            return int(low), int(high or low)
        except ValueError:
            self.fail(f"expected LOW:HIGH, two whole numbers such as 10:29, got {value!r}", param, ctx)


_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


def _bars() -> tuple[Callable[[str, int, int, dict[str, float]], None], Callable[[], None]]:
    """A progress callback that keeps one bar per stage, and what closes the last bar."""
    from tqdm import tqdm

    open_bar: dict[str, Any] = {}

    def close() -> None:
        for bar in open_bar.values():
            bar.close()
        open_bar.clear()

    def show(stage: str, step: int, total: int, values: dict[str, float]) -> None:
        if stage not in open_bar:
            close()
            open_bar[stage] = tqdm(total=total, desc=stage, file=sys.stderr, mininterval=0.5, leave=True)
        bar = open_bar[stage]
        bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        bar.update(step - bar.n)

    return show, close


@click.group(cls=_Group)
@click.version_option(__version__, prog_name="acgkd-fast")
@click.option("--threads", default=1, show_default=True, help="CPU threads; small graphs gain little from more.")
def main(threads: int) -> None:
    """Distil a trained graph classifier into a smaller one, without its training data."""
    check(threads >= 1, "threads", "at least 1", threads)
    import torch

    # Two busy processes can slow a threaded torch tenfold, so more than one is for the user to ask for.
    torch.set_num_threads(threads)


@main.command("train-teacher")
@click.option("--dataset", required=True, help="A TUDataset by name, such as MUTAG.")
@click.option("--data-root", required=True, type=_FOLDER, help="Folder that holds the data set.")
@click.option("--arch", default="gcn5-64", show_default=True, help="gcn or gin, convolutions + 1, width.")
@click.option("--split-seed", default=29, show_default=True, help="Seed of the 70/30 split.")
@click.option(
    "--split", type=click.Choice(["gfkd", "stratified"]), default="gfkd", show_default=True, help="Split rule."
)
@click.option("--epochs", default=None, type=int, help="Epochs [default: by data set size].")
@click.option("--seed", default=0, show_default=True, help="Initialisation and order of the mini-batches.")
@click.option("--out", required=True, type=_FILE, help="Where the teacher goes (safetensors).")
def train_teacher(
    dataset: str, data_root: Path, arch: str, split_seed: int, split: str, epochs: int | None, seed: int, out: Path
) -> None:
    """Train a teacher on a TUDataset and save it; prints its accuracy on the held-out graphs."""
    from .tasks import train_teacher_file

    show, close = _bars()
    try:
        scores = train_teacher_file(
            dataset,
            data_root,
            out,
            arch=arch,
            split_seed=split_seed,
            split=split,
            epochs=epochs,
            seed=seed,
            progress=show,
        )
    finally:
        close()
    click.echo(
        f"{out}: {arch} on {dataset}, accuracy {100 * scores['accuracy']:.1f} % on {scores['num_graphs']} "
        f"held-out graphs (majority class {100 * scores['majority']:.1f} %)"
    )


@main.command()
@click.option("--teacher", required=True, type=_FILE, help="A model saved by train-teacher or save_model.")
@click.option("--student", default="gcn3-32", show_default=True, help="Architecture of the student.")
@click.option("--out", required=True, type=_FOLDER, help="Run folder; empty or new unless --resume.")
@click.option("--config", "config_file", type=_FILE, help="JSON settings, or the config.json of another run.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run in --out.")
@click.option("--seed", type=int, help="Seed of the whole run.")
@click.option("--num-graphs", type=int, help="Pseudo-graphs in the pool.")
@click.option("--nodes", type=_Range(), help="Prior: node counts, such as 10:29.")
@click.option("--mean-nodes", type=int, help="Prior: their mean, where the range is not known; instead of --nodes.")
@click.option("--mean-degree", type=float, help="Prior: expected partners per node [default: looked for].")
@click.option("--hub-share", type=float, help="Prior: chance that a node joins a hub, 0 to 1 [default: looked for].")
@click.option("--size-spread", type=float, help="Prior: deviation of the node counts over their mean; 0 is uniform.")
@click.option("--degree-growth", type=float, help="Prior: power of its size that a graph's mean degree grows with.")
@click.option(
    "--ego-networks/--no-ego-networks",
    default=None,
    help="Prior: one node is joined to all others, who form cliques [default: looked for].",
)
@click.option("--feature-kind", help="Prior: one-hot, continuous, degree or constant [default: the teacher's].")
@click.option("--xi", type=float, help="Spatial complexity parameter of the learning stage, in (0, 1].")
@click.option("--learn-steps", type=int, help="Steps of the gradient stage; 0 leaves it out.")
@click.option(
    "--refine-steps",
    type=int,
    help="Steps of the search for graphs of up to 25 nodes (larger ones: up to four times as many); 0 leaves it out.",
)
@click.option(
    "--start-share", type=float, help="Share of the graphs not searched [default: 0.5 if features are degrees, else 0]."
)
@click.option("--proposals", type=int, help="Search: candidate edits per graph and step, the best of which is tried.")
@click.option("--two-hop", type=float, help="Search: chance that a new edge closes a triangle.")
@click.option("--connected/--any-parts", default=None, help="Search: keep connected graphs connected [default].")
@click.option("--max-degree", type=int, help="Search: raise no degree above this.")
@click.option("--keep-degrees/--any-degrees", default=None, help="Search: swap edges, so that all degrees stay.")
@click.option(
    "--perturb", type=float, help="Largest chance of an edge or feature to change, anew in every epoch [default: 0.2]."
)
@click.option(
    "--twins",
    type=float,
    help="Largest chance of a node to get a twin [default: 0.3 if the student sees a density that the teacher hides].",
)
@click.option("--epochs", type=int, help="Epochs of the student.")
@click.option(
    "--reuse-classifier/--own-classifier", default=None, help="Let the teacher's frozen classifier answer [default]."
)
@click.option("--projector", help="How a reused classifier is reached: gat, linear or none [default: gat].")
@click.option("--feature-weight", type=float, help="Factor of feature matching, for a reused classifier [default: 1].")
@click.option(
    "--curriculum", help="Easy graphs first, by teacher_loss, disagreement, edges, nodes or degree [default: none]."
)
@click.option("--adversary", help="Adversarial temperature: global, graph or fixed (off) [default: fixed].")
@click.option("--students", default=1, show_default=True, help="Students per row of the table, seeds counting up.")
@click.option("--eval-dataset", help="Measure on this TUDataset's held-out graphs, after the run.")
@click.option("--data-root", type=_FOLDER, help="Folder that holds the evaluation data set.")
def distill(
    teacher: Path,
    student: str,
    out: Path,
    config_file: Path | None,
    resume: bool,
    students: int,
    eval_dataset: str | None,
    data_root: Path | None,
    **changes: Any,
) -> None:
    """Distil a teacher into a student without data. Everything ends up in the folder --out."""
    from .tasks import distill_file

    show, close = _bars()
    try:
        table = distill_file(
            teacher,
            out,
            student=student,
            config_file=config_file,
            changes=_changes(changes),
            resume=resume,
            students=students,
            eval_dataset=eval_dataset,
            data_root=data_root,
            progress=show,
        )
    finally:
        close()
    if table:
        click.echo(table)
    click.echo(f"student: {out / 'student.safetensors'}, report: {out / 'report.html'}")


_SEARCH = ("proposals", "two_hop", "connected", "max_degree", "keep_degrees")


def _changes(options: dict[str, Any]) -> dict[str, Any]:
    """Command-line options as dotted settings; None means: not given."""
    from .pseudo_graphs import SHAPE, GraphPrior

    low, high = options["nodes"] or (None, None)
    mean, unknown = options["mean_nodes"], {}
    if mean is not None:
        check(low is None, "mean-nodes", "none where --nodes is given", mean)
        around = GraphPrior.around(mean)
        low, high = around.min_nodes, around.max_nodes
        if options["size_spread"] is None:
            unknown = {"prior.size_spread": None}
    named = {
        "seed": options["seed"],
        "num_graphs": options["num_graphs"],
        "xi": options["xi"],
        "prior.min_nodes": low,
        "prior.max_nodes": high,
        **{f"prior.{name}": options[name] for name in SHAPE},
        "prior.feature_kind": options["feature_kind"],
        "learn.steps": options["learn_steps"],
        "refine.steps": options["refine_steps"],
        "start_share": options["start_share"],
        **{f"refine.{name}": options[name] for name in _SEARCH},
        "perturbation": options["perturb"],
        "twins": options["twins"],
        "student.epochs": options["epochs"],
        "student.reuse_classifier": options["reuse_classifier"],
        "student.projector": options["projector"],
        "student.feature_weight": options["feature_weight"],
        "student.curriculum.difficulty": options["curriculum"],
        "student.adversary.mode": options["adversary"],
    }
    return {name: value for name, value in named.items() if value is not None} | unknown


@main.command()
@click.option("--model", required=True, type=_FILE, help="A model saved by this package.")
@click.option("--dataset", required=True, help="A TUDataset by name.")
@click.option("--data-root", required=True, type=_FOLDER, help="Folder that holds the data set.")
@click.option("--split-seed", default=29, show_default=True, help="Seed of the 70/30 split.")
@click.option(
    "--split", type=click.Choice(["gfkd", "stratified"]), default="gfkd", show_default=True, help="Split rule."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(model: Path, dataset: str, data_root: Path, split_seed: int, split: str, as_json: bool) -> None:
    """Accuracy of a model on the held-out graphs of a data set."""
    from .tasks import evaluate_file

    scores = evaluate_file(model, dataset, data_root, split_seed=split_seed, split=split)
    if as_json:
        click.echo(json.dumps(scores))
    else:
        click.echo(
            f"accuracy {100 * scores['accuracy']:.1f} % on {scores['num_graphs']} graphs "
            f"(majority class {100 * scores['majority']:.1f} %)"
        )


@main.command()
@click.option("--out", type=_FOLDER, default=Path("runs/demo"), show_default=True, help="Run folder.")
@click.option("--quick", is_flag=True, help="A shorter run for continuous integration; accuracies mean less.")
@click.option("--seed", default=0, show_default=True, help="Seed of data, teacher and run.")
def demo(out: Path, quick: bool, seed: int) -> None:
    """The whole job on a data set made on the spot: teacher, data thrown away, student, table."""
    from .tasks import run_demo

    show, close = _bars()
    try:
        table = run_demo(out, quick=quick, seed=seed, progress=show)
    finally:
        close()
    click.echo(table)
    click.echo(f"report: {out / 'report.html'}")


@main.command()
@click.option("--out", required=True, type=_FILE, help="File of finished cells (JSON lines); they are not run again.")
@click.option("--work", type=_FOLDER, default=Path("runs/table"), show_default=True, help="Folder for teachers.")
@click.option("--data-root", type=_FOLDER, help="Folder that holds the data sets.")
@click.option("--datasets", default="house-or-cycle", show_default=True, help="Names, separated by commas.")
@click.option("--teachers", default="gcn5-64", show_default=True, help="Architectures, separated by commas.")
@click.option("--students", default="gcn3-32", show_default=True, help="Architectures, separated by commas.")
@click.option("--splits", default="1,2,3,4,5", show_default=True, help="Seeds of the splits, separated by commas.")
@click.option(
    "--rows", help="Names, separated by commas [default: our method and every baseline]; 'all' adds ablations."
)
@click.option("--config", "config_file", type=_FILE, help="JSON settings of every cell; prior and seed are the cell's.")
def table(
    out: Path,
    work: Path,
    data_root: Path | None,
    datasets: str,
    teachers: str,
    students: str,
    splits: str,
    rows: str | None,
    config_file: Path | None,
) -> None:
    """Accuracy of every method over data sets, teachers and splits; resumable. Prints the table."""
    from .distill.config import RunConfig
    from .table import ROWS, Table, default_rows
    from .table_view import render

    config = RunConfig() if config_file is None else RunConfig.from_file(config_file)
    chosen = default_rows() if rows is None else ROWS if rows == "all" else _names(rows)
    for seed in _names(splits):
        check(seed.isdecimal(), "splits", "seeds separated by commas, such as 1,2,3", seed)
    seeds = [int(seed) for seed in _names(splits)]
    Table(out, work, data_root, config, report=lambda line: click.echo(line, err=True)).run(
        _names(datasets), teachers=_names(teachers), students=_names(students), splits=seeds, rows=chosen
    )
    click.echo(render(out))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """What was built, what runs where, and why."""
    from .doctor import render, report

    found = report()
    click.echo(json.dumps(found, indent=2) if as_json else render(found))


if __name__ == "__main__":
    main()
