"""Evaluation of a model that two processes share: the numbers of one process, and every rank runs it equally often."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.midtraining.evaluation.domains import heldout_loss
from surgery.midtraining.evaluation.resting import ALONE
from surgery.midtraining.evaluation.suite import Suite
from surgery.midtraining.evaluation.tasks import find_data
from tests.test_evaluation import GOLDEN, SAID, encoder, model, rows_with_documents

PROGRAM = """
import json, sys
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from surgery.midtraining.evaluation import domains
from surgery.midtraining.evaluation.resting import Ranks
from tests.test_evaluation import model
from tests.test_evaluation_sharded import evaluated

def total(tensor):
    dist.all_reduce(tensor)
    return tensor

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
mesh = dist.init_device_mesh("cpu", (2,))
for layer in model().model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model(), mesh=mesh)
domains.LOGITS = 1  # a row at a time: three rows for two ranks
print(json.dumps(evaluated(Ranks(rank, 2, total))))
"""


def evaluated(ranks):
    suite = Suite.of(find_data(GOLDEN / "tasks").load(["chosen/*"], limit=5), encoder(), SAID["context"])
    lengths = [i % 7 for i in range(300)]
    rows = {"x": rows_with_documents(300)}
    return suite.run(model(), batch=200, ranks=ranks), heldout_loss(model(), rows, lengths, ranks=ranks)


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", PROGRAM]
    ranks = [
        subprocess.Popen([*words, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, env=environment)
        for rank in range(2)
    ]
    tasks, held = evaluated(ALONE)
    out = [p.communicate(timeout=240)[0] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0]
    for found, rows in map(json.loads, out):
        for name, scores in tasks.items():
            assert found[name] == pytest.approx(scores, rel=1e-5)
        assert rows["x"] == pytest.approx(held["x"], rel=1e-6)
