"""How upcycling runs: layer by layer and expert by expert, on a device, with bars, from Python as from the shell."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import subprocess
import sys
import weakref

import pytest
import torch
from click.testing import CliRunner
from torch._subclasses import fake_tensor

import surgery
from surgery.cli import main as cli
from surgery.errors import UsageError
from surgery.formats.registry import open_checkpoint
from surgery.running.activations import each_layer
from surgery.running.device import Device, device
from surgery.running.expertwise import expert_modules
from surgery.running.layerwise import empty_model, forward
from surgery.tensors.lazy import Lazy
from surgery.upcycling import api, run
from surgery.upcycling.request import Collapse, Upcycle
from tests import oracle, tiny
from tests.test_conversion import weights

IDS = torch.randint(0, tiny.SIZES["v"], (2, 24), generator=torch.Generator().manual_seed(3))
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "ernie4_5_moe", "granitemoeshared", "olmoe", "flex_olmo")


@dataclasses.dataclass(frozen=True)
class Watched(Device):
    """The CPU, which notes how many matrices of experts are alive whenever one more is asked for."""

    shapes: tuple = ()
    alive: list = dataclasses.field(default_factory=list)
    seen: list = dataclasses.field(default_factory=list)

    def holds(self, tensor, dtype=None):
        out = super().holds(tensor, dtype)
        if tuple(out.shape) in self.shapes:
            self.seen.append(weakref.ref(out))
            self.alive.append(sum(ref() is not None for ref in self.seen))
        return out


# ------------------------------------------------------------------------------------------------- expert by expert


@pytest.mark.parametrize("family", MIXTURES)
def test_one_expert_after_another_is_what_transformers_computes(family, tiny_hf):
    source = open_checkpoint(tiny_hf(family))
    assert len(expert_modules(empty_model(source, "float32"))) == sum(
        map(source.spec.is_moe, range(source.spec.layers))
    )
    want = oracle.hf_logits(tiny_hf(family), IDS)
    got = forward(source, IDS, "float32").logits
    assert float((got - want).abs().max()) < 1e-4 * float(want.std())


def test_only_one_expert_is_in_memory(tiny_hf):
    source = open_checkpoint(tiny_hf("mixtral"))
    m, h = source.spec.expert_ffn, source.spec.width
    on = Watched(shapes=((2 * m, h), (h, m)))
    forward(source, IDS, "float32", on)
    assert len(on.seen) > 2 * source.spec.layers
    assert max(on.alive) <= 4  # the two of this expert, and those of the one before until the names are taken
    assert on.alive[-1] <= 4


# -------------------------------------------------------------------------------------------------------- devices


def test_devices_that_are_not_there_are_told(tiny_hf, tmp_path, monkeypatch):
    assert device("cpu").holds(torch.ones(2), torch.float64).dtype == torch.float64
    for name in ("tpu", "cuda:", "cuda:x", "mps", "", "cuda:0:1", "cpu:0"):
        with pytest.raises(UsageError, match="unknown"):
            device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="finds no CUDA"):
        device("cuda")
    source = str(tiny_hf("llama"))
    for words in (
        ["upcycle", "--experts", "4", "--top-k", "2"],
        ["upcycle", "--collapse"],
        ["experts", "--top-k", "2"],
    ):
        done = CliRunner().invoke(cli.main, [words[0], source, str(tmp_path / "out"), *words[1:], "--device", "cuda:1"])
        assert done.exit_code == 2
        assert "the device cuda:1 is not there" in done.output
    with pytest.raises(UsageError, match="is not there"):
        surgery.upcycle(source, tmp_path / "out", experts=4, top_k=2, device="cuda")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device("cuda:1").name == "cuda:1"
    with pytest.raises(UsageError, match="cuda:2 is not there"):
        device("cuda:2")


class Real(Lazy):
    """A part that is read as it is, whatever torch pretends meanwhile."""

    def __init__(self, src):
        self.src, self.dtype, self.shape = src, src.dtype, src.shape

    def read(self, box):
        with fake_tensor.unset_fake_temporarily():
            return self.src.read(box).clone()


@dataclasses.dataclass(frozen=True)
class Elsewhere(Device):
    """A device of which torch knows no more than that it is not the CPU: sums across devices are errors."""

    name: str = "meta"
    mode: object = None

    def holds(self, tensor, dtype=None):
        if not isinstance(tensor, fake_tensor.FakeTensor):
            tensor = self.mode.from_tensor(tensor, static_shapes=True)
        return super().holds(tensor, dtype)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_on_a_text_is_all_on_the_device_and_what_is_seen_is_not(gradients, tmp_path):
    source = open_checkpoint(tiny.save("llama", tmp_path / "source", l=2))
    source = dataclasses.replace(source, parts={name: Real(part) for name, part in source.parts.items()})
    empty_model(source, "float32")  # transformers' modules are imported outside of the mode
    seen = []
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        each_layer(source, IDS, lambda _, *tensors: seen.extend(tensors), gradients, on=Elsewhere(mode=mode))
    assert len(seen) == (6 if gradients else 4)
    assert {t.device.type for t in seen} == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("router", ["normal:0.02", "kmeans"])
def test_the_gpu_says_the_same(router, tiny_hf, tmp_path):
    settings = {"experts": 8, "top_k": 4, "order": "co-activation", "router": router, "verify_tokens": 64}
    done = surgery.upcycle(tiny_hf("llama"), tmp_path / "out", device="cuda", **settings)
    assert done.proof.verdict == "exact"
    back = surgery.collapse(tmp_path / "out", tmp_path / "dense", device="cuda")
    assert back.proof.verdict == "exact"


# ------------------------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize(("family", "dtype", "settings"), [
    ("llama_tied", "float32", {"experts": 4, "top_k": 2, "strategy": "copy"}),
    ("llama", "bfloat16", {"experts": 8, "top_k": 4, "shared": "0.5"}),
    ("qwen3", "float32", {"experts": 8, "top_k": 4, "dense_layers": (1,)}),
])  # fmt: skip
def test_all_bytes_are_told_as_they_go(family, dtype, settings, tmp_path):
    source = tiny.save(family, tmp_path / "source", dtype, l=2)
    ready = run.prepare(source, Upcycle(**settings, verify_tokens=64))
    wrote, proved = [], []
    run.carry_out(ready, tmp_path / "out", progress=wrote.append, proving=proved.append)
    assert sum(wrote) == pytest.approx(ready.plan.bytes_to_write, rel=0.02)  # without surgery.json
    assert sum(proved) == ready.bytes_to_prove
    assert len(proved) > 4 * settings["experts"]
    with_none, bare = [], run.prepare(source, Upcycle(**settings, verify=False))
    run.carry_out(bare, tmp_path / "bare", proving=with_none.append)
    assert sum(with_none) == bare.bytes_to_prove < ready.bytes_to_prove


def test_what_is_measured_is_told(tiny_hf, tmp_path):
    """Before anything is written: activations, and experts that are compared."""
    source, told = tiny_hf("llama"), []
    run.prepare(source, Upcycle(experts=8, top_k=4, router="kmeans"), on=Device(advance=told.append))
    parts = open_checkpoint(source).parts
    assert sum(told) == sum(part.nbytes for name, part in parts.items() if name != "lm_head")
    surgery.upcycle(source, tmp_path / "moe", experts=4, top_k=2, strategy="copy", verify_tokens=0)
    told.clear()
    run.prepare_collapse(tmp_path / "moe", Collapse(), on=Device(advance=told.append))
    assert sum(told) == 4 * sum(part.nbytes for name, part in parts.items() if ".mlp." in name)


@pytest.mark.parametrize(("settings", "read"), [
    ({"experts": 4, "top_k": 2, "strategy": "copy"}, 0),
    ({"experts": 4, "top_k": 2, "strategy": "copy", "scale": "1"}, 0),
    ({"experts": 8, "top_k": 4}, 1),
    ({"experts": 4, "top_k": 2, "strategy": "copy", "dtype": "bf16"}, None),
])  # fmt: skip
def test_digests_of_the_source_read_only_what_is_lost(settings, read, tiny_hf, tmp_path):
    """What the result holds as it was is counted as it is written; either way it is the digest of the source."""
    proved, source = [], tiny_hf("llama_tied")
    surgery.upcycle(source, tmp_path / "out", verify_tokens=0, proving=proved.append, **settings)
    parts = open_checkpoint(source).parts
    mlp = sum(part.nbytes for name, part in parts.items() if ".mlp." in name)
    assert sum(proved) == (sum(part.nbytes for part in parts.values()) if read is None else read * mlp)
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert record["source_digest"] == surgery.convert(source, tmp_path / "same", to="hf").content_digest


@pytest.mark.slow
def test_the_proof_is_seen_on_a_terminal(tiny_hf, tmp_path):
    words = ["upcycle", tiny_hf("llama"), tmp_path / "out", "--experts", "8", "--top-k", "4", "--verify-tokens", "512"]
    master, slave = pty.openpty()
    with os.fdopen(master, "rb", buffering=0) as screen:
        process = subprocess.Popen(
            [sys.executable, "-m", "surgery", *map(str, words)], stdout=subprocess.PIPE, stderr=slave,
            env={**os.environ, "TERM": "xterm"}, cwd=cli.__file__.rsplit("/", 2)[0],
        )  # fmt: skip
        os.close(slave)
        shown = bytearray()
        try:
            while data := screen.read(1 << 16):
                shown += data
        except OSError:  # Linux says so when the other end is closed
            pass
        out = process.communicate()[0].decode()
    assert process.returncode == 0
    assert b"prove" in shown
    assert "proof  exact" in out
    assert "prove" not in out


def test_more_tokens_than_memory_are_refused_before_anything_is_written(tiny_hf, tmp_path):
    with pytest.raises(UsageError, match="proof on 1,000,000,000,000 tokens takes at least") as error:
        surgery.upcycle(tiny_hf("llama"), tmp_path / "out", experts=4, top_k=2, verify_tokens=10**12)
    assert "--verify-tokens" in str(error.value)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- from Python


def test_experts_and_collapse_are_functions(tiny_hf, tmp_path):
    source = tiny_hf("mixtral")
    surgery.experts(source, tmp_path / "a", keep=[0, 2, 5], layers={3: {"keep": [7, 1, 6]}}, top_k=2, force_lossy=True)
    shell = ["--keep", "0,2,5", "--keep", "3:7,1,6", "--top-k", 2, "--force-lossy", "--verify-tokens", 0]
    done = CliRunner().invoke(cli.main, ["experts", *map(str, (source, tmp_path / "b", *shell))])
    assert done.exit_code == 0, done.output
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(oracle.same_bits(a[n], b[n]) for n in a)
    old = weights(source)
    for layer, kept in ((0, (0, 2, 5)), (3, (7, 1, 6))):
        at = f"model.layers.{layer}.block_sparse_moe"
        for new, e in enumerate(kept):
            assert oracle.same_bits(a[f"{at}.experts.{new}.w2.weight"], old[f"{at}.experts.{e}.w2.weight"])
    surgery.upcycle(tiny_hf("llama"), tmp_path / "moe", experts=4, top_k=2, strategy="copy", verify_tokens=0)
    back = surgery.collapse(tmp_path / "moe", tmp_path / "dense", verify_tokens=16)
    assert back.proof.verdict == "exact"
    assert weights(tmp_path / "dense").keys() == weights(tiny_hf("llama")).keys()


@pytest.mark.parametrize("choice", [{}, {"keep": [0], "prune": [1]}, {"keep": [9]}, {"noise": 0.1},
                                    {"duplicate": 2, "noise": -1}, {"duplicate": 2, "seed": "x"}])  # fmt: skip
def test_mistakes_in_keywords_are_told(choice, tiny_hf, tmp_path):
    with pytest.raises(UsageError):
        surgery.experts(tiny_hf("mixtral"), tmp_path / "out", **choice)
    with pytest.raises(UsageError):
        surgery.collapse(tiny_hf("mixtral"), tmp_path / "out", by="vote")
    assert not list(tmp_path.iterdir())


def test_the_shell_calls_the_same_functions():
    import inspect

    assert surgery.upcycle is api.upcycle
    assert surgery.experts is api.experts
    for function in (api.upcycle, api.experts, api.collapse):
        assert inspect.signature(function).parameters["device"].default == "cpu"


# ---------------------------------------------------------------------------------------------- noise on duplicates


@pytest.mark.slow
def test_noise_goes_to_the_copies_of_experts(tiny_hf, tmp_path):
    source = tiny_hf("mixtral")
    with pytest.raises(UsageError, match=r"noise: 0\.1 of the weights'"):
        surgery.experts(source, tmp_path / "no", duplicate=3, noise=0.1)
    made = surgery.experts(source, tmp_path / "a", duplicate=3, noise=0.1, force_lossy=True, verify_tokens=32)
    assert made.proof.verdict == "not preserving, as asked"
    assert made.proof.fp32.max_diff > 1e-2
    surgery.experts(
        source, tmp_path / "b", duplicate=3, noise=0.1, force_lossy=True, max_memory=1 << 18, verify_tokens=0
    )
    surgery.experts(source, tmp_path / "c", duplicate=3, noise=0.1, force_lossy=True, seed=1, verify_tokens=0)
    data = [(tmp_path / x / "model.safetensors").read_bytes() for x in "abc"]
    assert data[0] == data[1]
    assert data[0] != data[2]
    old, new = weights(source), weights(tmp_path / "a")
    count = len({n.split(".")[5] for n in old if ".experts." in n})
    for layer in (0, 5):
        at = f"model.layers.{layer}.block_sparse_moe"
        assert torch.equal(new[f"{at}.gate.weight"], old[f"{at}.gate.weight"].repeat_interleave(3, 0))
        for e in range(count):
            for w in ("w1", "w2", "w3"):
                was = old[f"{at}.experts.{e}.{w}.weight"]
                first, *copies = (new[f"{at}.experts.{3 * e + i}.{w}.weight"] for i in range(3))
                assert oracle.same_bits(first, was)
                assert not torch.equal(copies[0], copies[1])
                for copy in copies:
                    assert abs(float((copy - was).std() / was.std()) - 0.1) < 0.01
                    assert abs(float((copy - was).mean() / was.std())) < 0.01


def test_half_chosen_pairs_are_counted(tmp_path):
    """Copies tie in the router: where only one of two is chosen, the proof says so."""
    from surgery.upcycling.edit_experts.choose import chosen
    from surgery.upcycling.edit_experts.selection import Choices, selected

    source = open_checkpoint(tiny.save("mixtral", tmp_path / "source", l=2))
    assert chosen(source, selected(Choices(duplicate=2))).claim().group == 2
    assert chosen(source, selected(Choices(top_k=2, force_lossy=True))).claim().group == 1
    surgery.upcycle(tiny.save("llama", tmp_path / "dense", l=2), tmp_path / "moe", experts=8, top_k=4, verify_tokens=0)
    groups = open_checkpoint(tmp_path / "moe")
    assert chosen(groups, selected(Choices(duplicate=2))).claim().group == 8
    assert chosen(groups, selected(Choices(permute=[0, 4, 1, 5, 2, 6, 3, 7]))).claim().group == 1
