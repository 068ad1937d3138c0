"""Evaluation: log-likelihoods and scores against lm-eval's own, losses of rows against one token at a time, no traces.

The goldens are what `tests/upstream/make_lm_eval_goldens.py` writes with lm-eval 0.4.13.
"""

from __future__ import annotations

import copy
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from surgery.data.rows import Rows, isolated, restarting, shifted
from surgery.errors import ConfigError, UsageError
from surgery.midtraining.evaluation.domains import heldout_loss
from surgery.midtraining.evaluation.likelihood import Span, score
from surgery.midtraining.evaluation.resting import Ranks
from surgery.midtraining.evaluation.suite import Suite, summary
from surgery.midtraining.evaluation.tasks import Document, Task, find_data
from surgery.midtraining.evaluation.texts import encoder_of

GOLDEN = Path(__file__).parent / "golden" / "lm_eval"
SAID = json.loads((GOLDEN / "golden.json").read_text())
CLOSE = 2e-5  # nats


@cache
def model():
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "model", dtype=torch.float32).eval()


@cache
def encoder():
    return encoder_of(Tokenizer.from_file(str(GOLDEN / "model" / "tokenizer.json")), bos=0, eos=1)


def scored(spans, **more):
    return score(model(), spans, context=SAID["context"], **more)


# as lm-eval


@pytest.mark.parametrize(("context", "continuation", "nats", "greedy"), SAID["pairs"])
def test_answers_are_scored_as_by_lm_eval(context, continuation, nats, greedy):
    (found,) = scored([encoder().answer(context, continuation)])
    assert found.nats == pytest.approx(nats, abs=CLOSE)
    assert found.greedy == greedy


def test_some_answer_is_the_likeliest():
    assert {greedy for *_, greedy in SAID["pairs"]} == {True, False}


@pytest.mark.parametrize(("text", "nats"), SAID["texts"])
def test_texts_are_scored_as_by_lm_eval(text, nats):
    spans = encoder().windows(text, SAID["context"])
    assert sum(s.nats for s in scored(spans)) == pytest.approx(nats, abs=10 * CLOSE)
    assert sum(len(s.ids) - s.start for s in spans) == len(encoder().bare(text))


@pytest.mark.parametrize("name", SAID["tasks"])
def test_tasks_are_scored_as_by_lm_eval(name):
    suite = Suite.of(find_data(GOLDEN / "tasks").load([name]), encoder(), SAID["context"])
    told, said = suite.answers(model()), SAID["tasks"][name]
    for mine, theirs in zip(told, said["samples"], strict=True):
        assert mine["log_likelihoods"] == pytest.approx(theirs["log_likelihoods"], abs=CLOSE)
        assert (mine["acc"], mine["acc_norm"]) == (theirs["acc"], theirs["acc_norm"])
    found = suite.run(model())[name]
    for metric in ("documents", "acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert found[metric] == pytest.approx(said[metric], abs=1e-12), metric
    gold = [d["log_likelihoods"][d["gold"]] for d in told]
    sizes = [len(d.answers[d.gold][1].encode()) for d in suite.tasks[0].documents]
    bits = [-nats / math.log(2) / size for nats, size in zip(gold, sizes, strict=True)]
    assert found["bpb"] == pytest.approx(sum(bits) / len(bits))


def test_a_single_answer_has_bits_and_whether_it_is_exact():
    *_, (context, answer, nats, _) = SAID["pairs"]
    task = Task("t/v", (Document(0, ((context, answer),), 0), Document(1, ((context, answer + "?"),), 0)))
    found = Suite.of([task], encoder(), 40).run(model())["t/v"]
    assert found["exact"] == 0.5
    assert found["documents"] == 2
    assert "acc" not in found
    alone = Suite.of([Task("t/v", task.documents[:1])], encoder(), 40).run(model())["t/v"]
    assert alone["bpb"] == pytest.approx(-nats / math.log(2) / len(answer), abs=1e-5)
    assert "exact_stderr" not in alone  # of one document there is none


# batches


def all_spans():
    return [encoder().answer(context, continuation) for context, continuation, *_ in SAID["pairs"]]


@pytest.mark.parametrize("batch", [1, 50, 100_000])
def test_batches_change_nothing(batch):
    each = [scored([span])[0] for span in all_spans()]
    together = scored(all_spans(), batch=batch)
    assert [s.nats for s in together] == pytest.approx([s.nats for s in each], abs=CLOSE)
    assert [s.greedy for s in together] == [s.greedy for s in each]


def test_answers_of_one_token_share_a_row(monkeypatch):
    rows = []
    monkeypatch.setattr(model(), "forward", spying(model().forward, rows))
    spans = [Span([5, 9, last], 2) for last in (3, 7, 11)] + [Span([5, 9, 3, 4], 2)]
    scored(spans)
    assert rows == [(2, 3)]  # [5, 9, 3] and [5, 9], padded


def spying(forward, rows):
    def spy(*args, **kwargs):
        rows.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    return spy


def test_only_the_logits_that_are_needed_are_made(monkeypatch):
    kept = []
    forward = model().forward
    monkeypatch.setattr(model(), "forward", lambda **k: kept.append(k["logits_to_keep"]) or forward(**k))
    scored([Span(list(range(2, 32)), 28)])
    assert kept == [2]


def test_progress_counts_every_span():
    done = []
    scored(all_spans(), batch=60, advance=done.append)
    assert sum(done) == len(SAID["pairs"])
    assert len(done) > 1


def test_an_answer_longer_than_the_context_is_refused():
    with pytest.raises(UsageError, match="30 tokens are to be scored at once, the model sees 20"):
        score(model(), [Span(list(range(31)), 1)], context=20)
    task = Task("t/v", (Document(7, (("the", " cat" * 60),), 0),))
    with pytest.raises(UsageError, match=r"t/v, document 7: \d+ tokens"):
        Suite.of([task], encoder(), 40)


def test_a_tokenizer_needs_something_to_begin_with():
    with pytest.raises(ConfigError, match="neither bos nor eos"):
        encoder_of(Tokenizer.from_file(str(GOLDEN / "model" / "tokenizer.json")), None, None)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_add_up_to_one_process(world, monkeypatch):
    calls, shares = [], []
    monkeypatch.setattr(model(), "forward", spying(model().forward, calls))
    for rank in range(world):
        before = len(calls)
        kept = []
        scored(all_spans(), batch=80, ranks=Ranks(rank, world, lambda t, kept=kept: kept.append(t) or t))
        shares.append((len(calls) - before, kept[0]))
    assert len({n for n, _ in shares}) == 1  # as often on every rank: a sharded model needs all of them
    alone = scored(all_spans(), batch=80)
    total = sum(t for _, t in shares)
    assert total[:, 0].tolist() == [s.nats for s in alone]


# no trace


@pytest.fixture
def mixture():
    torch.manual_seed(3)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, **heads, num_local_experts=4, attention_dropout=0.3)
    return MixtralForCausalLM(config).train()


def test_nothing_of_a_training_model_changes(mixture):
    mixture.model.layers[0].eval()  # a part that was frozen stays as it was
    modes = [m.training for m in mixture.modules()]
    counted = []
    router = mixture.model.layers[1].mlp.gate
    router.register_forward_hook(lambda m, *_: counted.append(1) if m.training else None)
    before, state = copy.deepcopy(mixture.state_dict()), torch.get_rng_state()
    found = [score(mixture, [Span([1, 2, 3], 1)], context=8)[0].nats for _ in range(2)]
    assert found[0] == found[1]  # no dropout
    assert [m.training for m in mixture.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), mixture.state_dict().values(), strict=True))
    assert all(p.grad is None for p in mixture.parameters())
    assert counted == []
    mixture(input_ids=torch.tensor([[1, 2]]))
    assert counted == [1]


def test_an_error_leaves_no_trace_either(mixture):
    with pytest.raises(IndexError):
        score(mixture, [Span([1, 99], 1), Span([99, 1], 1)], context=8)  # there are 50 tokens
    assert mixture.training
    assert torch.is_grad_enabled()


# rows


def rows_with_documents(vocabulary, seed=0):
    """Three rows of 12, documents beginning inside two of them, some labels masked."""
    tokens = np.random.default_rng(seed).integers(2, vocabulary, (3, 12))
    where, offsets = np.array([0, 2, 2]), np.array([5, 3, 8])
    mask = np.ones((3, 12), bool)
    mask[1, 4:7] = False
    labels = isolated(shifted(tokens, mask), where, offsets)
    return Rows(tokens, labels, restarting((3, 12), where, offsets), np.zeros(3, int), np.arange(3))


def naive(rows):
    """Nats of every label: each document by itself, one prefix at a time."""
    out = []
    for tokens, labels, positions in zip(rows.tokens, rows.labels, rows.positions, strict=True):
        for t, label in enumerate(labels):
            if label >= 0:
                prefix = tokens[t - positions[t] : t + 1]
                logits = model()(input_ids=torch.tensor(prefix[None])).logits[0, -1]
                out.append((-float(logits.double().log_softmax(-1)[label]), int(label)))
    return out


@torch.no_grad()
def test_held_out_loss_is_that_of_each_document_alone():
    rows, other = rows_with_documents(300), rows_with_documents(300, seed=1)
    lengths = [i % 7 for i in range(290)]  # the vocabulary is larger: ids beyond have no text
    found = heldout_loss(model(), {"math": rows, "web": other}, lengths)
    for name, held in (("math", rows), ("web", other)):
        alone = naive(held)
        told = sum(lengths[label] for _, label in alone if label < len(lengths))
        assert found[name]["tokens"] == len(alone) == held.learnt
        assert found[name]["bytes"] == told
        assert found[name]["loss"] == pytest.approx(sum(n for n, _ in alone) / len(alone), abs=1e-5)
        assert found[name]["bpb"] == pytest.approx(sum(n for n, _ in alone) / math.log(2) / told, abs=1e-5)


def test_without_lengths_there_are_no_bits_per_byte():
    found = heldout_loss(model(), {"math": rows_with_documents(300)})["math"]
    assert found["bpb"] is None
    assert found["bytes"] is None


def test_rows_without_labels_have_no_loss():
    rows = rows_with_documents(300)
    rows.labels[:] = -100
    assert heldout_loss(model(), {"x": rows}, [1])["x"] == {"loss": None, "bpb": None, "tokens": 0, "bytes": 0}


@pytest.mark.parametrize("world", [2, 5])
def test_rows_are_shared_among_ranks(world, monkeypatch):
    monkeypatch.setattr("surgery.midtraining.evaluation.domains.LOGITS", 1)  # a row at a time
    rows, sums = rows_with_documents(300), []
    for rank in range(world):
        heldout_loss(model(), {"x": rows}, ranks=Ranks(rank, world, lambda t: sums.append(t) or t))
    whole = heldout_loss(model(), {"x": rows})["x"]
    total = sum(sums)[0]
    assert int(total[1]) == whole["tokens"]
    assert float(total[0]) / float(total[1]) == pytest.approx(whole["loss"], abs=1e-12)


def test_documents_that_are_not_isolated_see_each_other():
    rows = rows_with_documents(300)
    leaking = Rows(rows.tokens, rows.labels, None, rows.source, rows.instance)
    losses = [heldout_loss(model(), {"x": r})["x"]["loss"] for r in (rows, leaking)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_summaries_are_means():
    told = [{"acc": 1.0, "acc_norm": 0.0, "bpb": 1.5}, {"acc": 0.0, "acc_norm": 0.0, "bpb": 0.5}]
    assert summary(told) == {"documents": 2, "acc": 0.5, "acc_stderr": 0.5, "acc_norm": 0.0, "acc_norm_stderr": 0.0,
                             "bpb": 1.0}  # fmt: skip
