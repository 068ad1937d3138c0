"""Attention experts in training: numbers and gradients of plain loops, documents apart, a whole run and its folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, softmax

import surgery
from surgery.errors import ConfigError, UsageError
from surgery.formats.hf.files import code_of
from surgery.formats.registry import open_checkpoint
from surgery.midtraining.balance import balance_loss
from surgery.midtraining.checkpoint import open_saved
from surgery.midtraining.experts import use_experts
from surgery.midtraining.loop import prepare
from surgery.midtraining.model import build, checkpoint_of, load
from surgery.midtraining.router_telemetry import RouterTelemetry, alarms
from surgery.midtraining.routers import ATTENTION, MLP, Routed, RouterLog, by_kind, find_mixtures
from surgery.midtraining.run import midtrain
from surgery.midtraining.run_file import make_run
from surgery.midtraining.run_folder import read_folder
from surgery.midtraining.selftests import TESTS, self_test
from surgery.model.sparse import Sparse
from surgery.running.layerwise import forward
from tests import tiny
from tests.test_attention_experts import Naive
from tests.test_midtrain_loop import record, settings

IDS = torch.randint(3, tiny.SIZES["v"], (2, 24), generator=torch.Generator().manual_seed(3))
MIXED = {"experts": 4, "top_k": 2, "strategy": "copy"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two of four groups of heads; `mixed`: and two of four experts."""
    folder, found = tmp_path_factory.mktemp("heads"), {}
    for name, family, more in (("llama3", "llama3", {}), ("mixed", "llama3", MIXED), ("qwen2", "qwen2", {}),
                               ("tied", "llama_tied", {})):  # fmt: skip
        if not (folder / family).exists():
            tiny.save(family, folder / family, l=2, h=48, f=40)
        found[name] = folder / f"{name}-moe"
        surgery.upcycle(folder / family, found[name], attention_experts=4, attention_top_k=2, force_lossy=True,
                        verify_tokens=0, **more)  # fmt: skip
    return found


@pytest.mark.parametrize("name", ["llama3", "mixed", "qwen2", "tied"])
def test_it_computes_what_the_proof_ran(name, made):
    """Another program: the modelling file that lies in the folder."""
    source = open_checkpoint(made[name])
    model, digest = load(source, torch.float32, "cpu")
    want = forward(source, IDS, "float32").logits
    assert (model(IDS, use_cache=False).logits - want).abs().max() < 1e-5 * want.abs().max()
    written = checkpoint_of(dict(model.state_dict()), source)
    assert all(torch.equal(part.full(), source.parts[n].full()) for n, part in written.parts.items())
    assert len(digest) == 64


@pytest.mark.parametrize("name", ["mixed", "qwen2"])
def test_gradients_are_those_of_a_plain_loop(name, made):
    """Token by token, head by head, over the parts of the file; also of the balance loss of both kinds."""
    source, ids = open_checkpoint(made[name]), IDS[:, :9]
    model, _ = load(source, torch.float32, "cpu")
    log = RouterLog(find_mixtures(model))
    if source.spec.experts:
        use_experts(model, by_kind(log.mixtures)[MLP], "loop")
    with log:
        logits = model(ids, use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), ids.flatten())
    for alike in by_kind(log.take()).values():
        loss = loss + 0.3 * balance_loss(alike)
    loss.backward()
    ours = checkpoint_of({n: p.grad for n, p in model.named_parameters()}, source, "float32").parts

    weights = {n: p.full().float().requires_grad_() for n, p in source.parts.items()}
    plain = Listening(source.spec, weights)
    wanted = cross_entropy(plain.run(ids).flatten(0, 1), ids.flatten()) + 0.3 * plain.balance()
    wanted.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    for part, weight in weights.items():
        torch.testing.assert_close(ours[part].full(), weight.grad, rtol=1e-3, atol=2e-6, msg=part)
    assert all(weights[f"layers.{i}.attn.router"].grad.abs().max() > 1e-5 for i in range(2))


class Listening(Naive):
    """The plain loop, and what its routers said."""

    def __init__(self, spec, weights):
        super().__init__(spec, weights)
        self.said = {ATTENTION: [], MLP: []}

    def attention(self, i, x):
        self.said[ATTENTION].append((x @ self.w[f"layers.{i}.attn.router"].T, self.top_k))
        return super().attention(i, x)

    def feed(self, i, x):
        if self.spec.experts:
            self.said[MLP].append((x @ self.w[f"layers.{i}.router"].T, self.spec.top_k))
        return super().feed(i, x)

    def balance(self):
        """The sum over kinds of the means over layers."""
        sums = []
        for said in filter(None, self.said.values()):
            each = []
            for logits, k in said:
                chances = softmax(logits.flatten(0, 1), -1)
                chosen = torch.zeros_like(chances).scatter(1, chances.topk(k).indices, 1.0)
                each.append(chances.shape[1] * (chosen.mean(0) / k * chances.mean(0)).sum())
            sums.append(sum(each) / len(each))
        return sum(sums)


def test_documents_of_a_row_are_apart(made):
    source = open_checkpoint(made["mixed"])
    model, _ = load(source, torch.float32, "cpu")
    places = torch.arange(12).repeat(2, 2)
    packed = model(IDS, position_ids=places, use_cache=False).logits
    want = torch.cat([forward(source, half, "float32").logits for half in IDS.split(12, 1)], 1)
    assert (packed - want).abs().max() < 1e-5 * want.abs().max()
    assert (packed - forward(source, IDS, "float32").logits).abs().max() > 1e-2


def test_each_kind_of_router_is_found_and_measured_by_itself(made):
    model, _ = load(open_checkpoint(made["mixed"]), torch.float32, "cpu")
    kinds = by_kind(find_mixtures(model))
    assert list(kinds) == [MLP, ATTENTION]
    assert [(m.name, m.layer, m.num_experts, m.top_k, m.scores) for m in kinds[ATTENTION]] == [
        (f"model.layers.{i}.self_attn", i, 4, 2, "softmax") for i in range(2)
    ]
    assert all(m.experts is None for m in kinds[ATTENTION])


def test_most_of_the_groups_in_use_is_no_alarm():
    """Of 8 groups with 7 in use none can have more than 8/7 of the mean load."""
    telemetry, chance = RouterTelemetry([0]), torch.Generator().manual_seed(0)
    for _ in range(2):
        logits = torch.randn(400, 8, generator=chance)
        telemetry.add([Routed(logits, logits.topk(7).indices, "softmax", ATTENTION)])
        assert alarms(telemetry.read()) == []
    one = torch.arange(7).expand(400, 7)  # always the same seven
    telemetry.add([Routed(torch.zeros(400, 8), one, "softmax", ATTENTION)])
    assert [text.partition(" (")[0] for text in alarms(telemetry.read())] == [
        "layer 0: the busiest expert has 1.1 times the mean load", "layer 0: 12% of 8 experts had no token",
    ]  # fmt: skip


def wanted(folder, model, **more):
    value = settings(model, folder / "batches.npz", folder / "out", experts="padded", micro_batch=3)
    return value | {"checkpoint": {"every": 5, "keep_last": 4}, "average": {"last": 3},
                    "export": [{"to": "hf", "dtype": "fp32"}]} | more  # fmt: skip


@pytest.fixture(scope="module")
def ended(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    record(folder / "batches.npz", masked=True, packed=True)
    midtrain(make_run(wanted(folder, made["mixed"])))
    return folder


def test_a_run_learns_and_says_what_both_kinds_of_routers_do(ended, made):
    run = read_folder(ended / "out")
    assert run.metrics[-1]["ce"] < run.metrics[0]["ce"] - 0.5
    for name in ("router", "attention_router"):
        assert all(1 <= m[name]["max_load"] <= 2 for m in run.metrics)
    assert all(m["balance"] > 1.9 for m in run.metrics)  # one of each kind
    last = run.experts[-1]
    assert last["layers"] == last["attention"]["layers"] == [0, 1]
    assert [sum(row) for row in last["attention"]["load"]] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert min(last["attention"]["weight_drift"]) > 0
    tests = json.loads((ended / "out" / "selftests.json").read_text())
    assert [t["name"] for t in tests] == [*TESTS, "update"] and all(t["passed"] for t in tests)
    titles = surgery_report(ended)
    assert "Load of the experts of the attention" in titles and "The busiest expert of the attention" in titles


def surgery_report(folder):
    from surgery.midtraining.report.figures import figures

    return [figure.title for figure in figures([read_folder(folder / "out")])]


def test_what_it_exports_is_the_model_as_it_is(ended, made):
    """Read, verified and run by the folder's own modelling file."""
    (out,) = (ended / "out" / "export").glob("*-hf")
    assert (out / "modeling_attention_moe.py").read_bytes() == code_of("modeling_attention_moe.py")
    kept = {"torch_dtype", "dtype"}
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (out, made["mixed"]))
    assert {k: v for k, v in ours.items() if k not in kept} == {k: v for k, v in theirs.items() if k not in kept}
    job = prepare(make_run(wanted(ended, out, output=str(ended / "none"))))
    saved = open_saved(ended / "out" / "checkpoints" / "step000000020")
    for name, weight in job.weights().items():
        assert torch.equal(weight, saved.tensors[f"model.{name}"].full()), name
    want = reference_logits(out)
    assert (job.model(IDS[:, :9], use_cache=False).logits - want).abs().max() < 1e-4


def reference_logits(folder):
    made = open_checkpoint(folder)
    return Naive(made.spec, {n: p.full().float() for n, p in made.parts.items()}).run(IDS[:, :9])


def test_a_run_that_goes_on_has_the_same_bits(ended, made, tmp_path):
    shutil.copytree(ended, tmp_path / "place")
    place = tmp_path / "place"
    for step in (15, 20):
        shutil.rmtree(place / "out" / "checkpoints" / f"step{step:09d}")
    shutil.rmtree(place / "out" / "export")
    midtrain(make_run(wanted(place, made["mixed"])))
    assert any("resumed from step 10" in e["text"] for e in read_folder(place / "out").events)
    for name in ("metrics.jsonl", "experts.jsonl"):
        assert (place / "out" / name).read_bytes() == (ended / "out" / name).read_bytes()
    one, other = (open_saved(f / "out" / "checkpoints" / "step000000020").tensors for f in (ended, place))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor.full(), other[name].full()), name


@pytest.mark.parametrize("name", ["mixed", "qwen2"])
@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_the_self_tests_pass_where_products_are_rounded(name, precision, made, tmp_path):
    record(tmp_path / "batches.npz", masked=False, packed=True)
    value = wanted(tmp_path, made[name])
    value["train"] |= {"precision": precision, "activation_checkpointing": True, "compile": True}
    job = prepare(make_run(value))
    results = self_test(job)
    assert "train.compile: nothing is compiled, as groups of heads are experts" in job.notes
    assert [r.name for r in results] == list(TESTS) and all(r.passed for r in results)


def test_what_is_refused(made, tmp_path):
    source = open_checkpoint(made["qwen2"])
    with pytest.raises(ConfigError, match="eager cannot weight attention experts"):
        build(source, torch.float32, "cpu", attention="eager")
    sparse = replace(source, spec=source.spec.replace(sparse=Sparse("spattention", 24, {})))
    with pytest.raises(ConfigError, match="attention experts and sparse attention do not go together"):
        build(sparse, torch.float32, "cpu")
    record(tmp_path / "batches.npz", masked=False, packed=False)
    value = wanted(tmp_path, made["mixed"], moe={"balance": 0.02, "coefficients_of": "transformers"})
    with pytest.raises(ConfigError, match="a coefficient of transformers is two of ours"):
        prepare(make_run(value))
    with pytest.raises(UsageError, match="has no bias that chooses experts"):
        prepare(make_run(wanted(tmp_path, made["mixed"], moe={"bias_rate": 0.001})))
