"""What the commands do, without the command line: files in, files out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .checkpoints import load_model, save_model
from .data import GraphDataset, gfkd_split, house_or_cycle, load_dataset, stratified_split
from .distill.config import RunConfig
from .distill.run import Evaluation, Progress, Run
from .errors import InputError
from .graphs import GraphBatch
from .nn.models import GraphClassifier
from .nn.projected import Classifier
from .report import parameter_line, result_table
from .teachers import as_teacher, default_epochs, evaluate, train_classifier


def split_positions(dataset: GraphDataset, split: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of (training graphs, held-out graphs) by the rule "gfkd" or "stratified", 70/30."""
    graphs = dataset.graphs
    assert graphs.y is not None
    return gfkd_split(graphs.num_graphs, seed) if split == "gfkd" else stratified_split(graphs.y, seed)


def split_dataset(dataset: GraphDataset, split: str, seed: int) -> tuple[GraphBatch, GraphBatch]:
    """(training graphs, held-out graphs); see :func:`split_positions`."""
    train, test = split_positions(dataset, split, seed)
    return dataset.graphs.select(train), dataset.graphs.select(test)


def train_teacher_file(
    dataset: str,
    data_root: Path,
    out: Path,
    *,
    arch: str,
    split_seed: int,
    split: str,
    epochs: int | None,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Train on the training share of a TUDataset and save the last epoch; returns the held-out scores."""
    data = load_dataset(dataset, data_root)
    if data.feature_kind == "degree":
        # The degree vocabulary is part of the model, so only the training graphs may decide it.
        seen = split_positions(data, split, split_seed)[0]
        data = load_dataset(dataset, data_root, degrees_from=seen)
    train, test = split_dataset(data, split, split_seed)
    model = _train(arch, train, data.num_classes, epochs, seed, progress)
    scores = evaluate(model, test)
    save_model(
        out,
        model,
        {
            "feature_kind": data.feature_kind,
            "dataset": dataset,
            "split": split,
            "split_seed": split_seed,
            "seed": seed,
            "accuracy": scores["accuracy"],
        },
    )
    return scores


def _train(
    arch: str, graphs: GraphBatch, num_classes: int, epochs: int | None, seed: int, progress: Progress
) -> GraphClassifier:
    total = default_epochs(graphs.num_graphs) if epochs is None else epochs
    return train_classifier(
        arch,
        graphs,
        num_classes=num_classes,
        epochs=total,
        seed=seed,
        progress=lambda epoch, values: progress("teacher", epoch, total, values),
    )


def distill_file(
    teacher: Path,
    out: Path,
    *,
    student: str,
    config_file: Path | None,
    changes: dict[str, Any],
    resume: bool,
    students: int,
    eval_dataset: str | None,
    data_root: Path | None,
    progress: Progress,
) -> str:
    """Distil a saved teacher into a run folder; returns the sizes, and with an evaluation data set the table."""
    model, metadata = load_model(teacher)
    if resume and config_file is None and not changes:
        # The folder knows its settings; giving them again is allowed, changing them is not.
        config_file = out / "config.json"
    config = RunConfig() if config_file is None else RunConfig.from_file(config_file)
    if config_file is None and metadata.get("feature_kind"):
        changes = {"prior.feature_kind": metadata["feature_kind"], **changes}
    if config.prior.size_spread and changes.get("prior.size_spread", 0.0) is None:
        # A mean number of nodes leaves the spread open, unless the file states it.
        changes = {name: value for name, value in changes.items() if name != "prior.size_spread"}
    config = config.with_settings(changes)
    evaluation = None
    if eval_dataset is not None:
        # Read before any work is done, so that a wrong path costs nothing.
        evaluation = _evaluation(eval_dataset, data_root, model, metadata)
    run = Run(out, model, config, student=student, teacher_name=str(teacher), resume=resume, progress=progress)
    results = run.execute(evaluation, students=students)
    sizes = parameter_line(run.parameters)
    return f"{sizes}\n{result_table(results)}" if results else sizes


def _evaluation(name: str, data_root: Path | None, model: Classifier, metadata: dict[str, Any]) -> Evaluation:
    if data_root is None:
        raise InputError("data-root: expected the folder of --eval-dataset, got none")
    data = _dataset_for(model, name, data_root)
    train, test = split_dataset(data, metadata.get("split", "gfkd"), metadata.get("split_seed", 29))
    return Evaluation(name, test, train)


def _dataset_for(model: Classifier, name: str, data_root: Path) -> GraphDataset:
    """The data set with the features that the model takes."""
    data = load_dataset(name, data_root, max_degree=model.num_features - 1)
    have, want = data.num_features, model.num_features
    if have != want or data.num_classes > model.num_classes:
        raise InputError(
            f"dataset: expected graphs with {want} features and at most {model.num_classes} classes, as the model has, "
            f"got {name} with {have} features and {data.num_classes} classes"
        )
    return data


def evaluate_file(model: Path, dataset: str, data_root: Path, *, split_seed: int, split: str) -> dict[str, Any]:
    """Scores of a saved model on the held-out graphs: ``accuracy``, ``num_graphs``, ``majority``, ``loss``."""
    classifier, _ = load_model(model)
    data = _dataset_for(classifier, dataset, data_root)
    return evaluate(classifier, split_dataset(data, split, split_seed)[1])


def run_demo(out: Path, *, quick: bool, seed: int, progress: Progress) -> str:
    """House or cycle: make data, train a teacher, throw the data away, distil, measure; returns the table.

    `quick` takes fewer graphs, steps and epochs.
    """
    data = house_or_cycle(200 if quick else 600, seed=seed)
    train, test = split_dataset(data, "stratified", seed)
    model = _train("gcn5-64", train, data.num_classes, 20 if quick else None, seed, progress)
    teacher = as_teacher(model, feature_kind=data.feature_kind)
    config = RunConfig().with_settings(
        {
            "seed": seed,
            "num_graphs": 60 if quick else RunConfig().num_graphs,
            "prior.feature_kind": data.feature_kind,
            "prior.min_nodes": 20,
            "prior.max_nodes": 30,
            "prior_steps": 100 if quick else RunConfig().prior_steps,
            "refine.steps": 200 if quick else RunConfig().refine.steps,
            "student.epochs": 10 if quick else RunConfig().student.epochs,
        }
    )
    # The run is given the teacher alone. What is held back of the data only measures, after the run.
    evaluation = Evaluation("house or cycle", test, train)
    run = Run(out, teacher, config, teacher_name="gcn5-64, trained by the demo", progress=progress)
    return result_table(run.execute(evaluation, students=1 if quick else 5))
