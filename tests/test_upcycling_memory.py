"""`--max-memory` holds for an upcycling and its proof, however large a tensor and however many logits: measured."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import surgery
from surgery.errors import MismatchError, UsageError
from surgery.formats.registry import open_checkpoint
from surgery.running.layerwise import forward
from surgery.running.tokens import prose_tokens
from surgery.tensors.in_memory import InMemory
from surgery.upcycling.proof import Claim, prove
from tests import tiny
from tests.test_soup_memory import MIB, model

BUDGET = 64 * MIB
SCRIPT = """
import json, sys
import surgery
from tests.held import most_held

first, *folders = json.loads(sys.argv[1])
budget = int(sys.argv[2])

def upcycle(folder):
    surgery.upcycle(folder, f"{folder}-moe", experts=4, top_k=2, strategy="copy", max_memory=budget, sync=False)

upcycle(first)
print(json.dumps([most_held(lambda: upcycle(folder)) for folder in folders]))
"""


@pytest.mark.slow
def test_the_budget_holds_at_two_sizes(tmp_path: Path) -> None:
    """At the larger one, the logits of the 256 tokens alone would take 31 MB in fp32 in each of three runs."""
    folders = [str(model(tmp_path / str(rows), rows)) for rows in (2048, 12000, 30000)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(folders), str(BUDGET)], capture_output=True,
                          text=True, timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert max(peaks) <= BUDGET, [f"{peak / MIB:.0f} MiB" for peak in peaks]


def test_what_is_needed_at_the_least_is_said_before_anything_is_written(tmp_path):
    folder = tiny.save("llama", tmp_path / "model", l=2)
    settings = {"experts": 4, "top_k": 2, "strategy": "copy"}
    with pytest.raises(UsageError, match=r"the proof on 256 tokens takes at least [\d.]+ MB of memory") as caught:
        surgery.upcycle(folder, tmp_path / "moe", max_memory="1MiB", **settings)
    assert not (tmp_path / "moe").exists() and "--verify-tokens" in str(caught.value.hint)
    least = str(caught.value.hint).split()[1].rstrip(";")
    surgery.upcycle(folder, tmp_path / "moe", max_memory=least, **settings)
    surgery.upcycle(folder, tmp_path / "few", max_memory="1MiB", verify_tokens=0, **settings)


@pytest.mark.parametrize(("family", "dtype"), [("llama_tied", "bfloat16"), ("granite", "float16")])
def test_a_proof_by_blocks_says_what_whole_logits_say(family, dtype, tmp_path):
    folder = tiny.save(family, tmp_path / "model", dtype, l=2)
    surgery.upcycle(folder, tmp_path / "moe", experts=4, top_k=2, strategy="drop", force_lossy=True, max_memory="6MiB")
    proof = json.loads((tmp_path / "moe" / "surgery.json").read_text())["proof"]
    source, result = open_checkpoint(folder), open_checkpoint(tmp_path / "moe")
    tokens = prose_tokens(source, 256)[0]

    def logits(checkpoint, of):
        return forward(checkpoint, tokens, of).logits.double()

    def apart(a, b):
        p, q = (z.log_softmax(-1) for z in (b, a))
        kl = (p.exp() * (p - q)).sum(-1).mean()
        losses = [-z[:, :-1].gather(-1, tokens[:, 1:, None]).mean() for z in (q, p)]
        return torch.stack([(a - b).abs().max(), kl, *(loss.exp() for loss in losses)])

    pairs = {"fp32": (logits(result, "float32"), logits(source, "float32")),
             "floor": (logits(source, dtype), logits(source, "float32")),
             "stored": (logits(result, dtype), logits(source, dtype))}  # fmt: skip
    for name, pair in pairs.items():
        got = torch.tensor(list(proof[name].values()), dtype=torch.float64)
        torch.testing.assert_close(got, apart(*pair), rtol=2e-3, atol=2e-3 if name != "fp32" else 1e-5)


def test_a_result_whose_logits_are_no_numbers_is_not_exact_up_to_rounding(tmp_path):
    source = open_checkpoint(tiny.save("llama", tmp_path / "model", "bfloat16", l=2))
    broken = InMemory(torch.full((source.spec.width,), torch.nan, dtype=torch.bfloat16))
    result = replace(source, parts={**source.parts, "final_norm": broken})
    with pytest.raises(MismatchError, match="the logits differ by inf"):
        prove(source, result, Claim("copy", source.spec, True, rounds=True), 32, memory=64 * MIB)
