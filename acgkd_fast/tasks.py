"""What the commands do, without the command line: files in, files out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .checkpoints import load_model, save_model
from .data import GraphDataset, gfkd_split, house_or_cycle, load_dataset, stratified_split
from .distill.config import RunConfig
from .distill.run import Evaluation, Progress, Run
from .errors import InputError, check
from .graphs import GraphBatch
from .report import result_table
from .teachers import as_teacher, evaluate, train_classifier


def split_dataset(dataset: GraphDataset, split: str, seed: int) -> tuple[GraphBatch, GraphBatch]:
    """(training graphs, held-out graphs) by the rule "gfkd" or "stratified", 70/30."""
    graphs = dataset.graphs
    assert graphs.y is not None
    if split == "gfkd":
        train, test = gfkd_split(graphs.num_graphs, seed)
    else:
        train, test = stratified_split(graphs.y, seed)
    return graphs.select(train), graphs.select(test)
