"""What the tests of runs and of the command line share."""

from __future__ import annotations

import torch

from acgkd_fast import checkpoints
from acgkd_fast.nn.models import build_model

WIDTH = 3


def make_teacher(path=None, width=WIDTH):
    torch.manual_seed(0)
    model = build_model("gcn3-8", width, 2).eval()
    if path is not None:
        checkpoints.save_model(path, model, {"feature_kind": "one-hot"})
    return model


def folder_contents(folder):
    return {path.name for path in folder.iterdir()}


FILES = {"student.safetensors", "pseudo_graphs.safetensors", "metrics.jsonl", "config.json", "report.html"}
