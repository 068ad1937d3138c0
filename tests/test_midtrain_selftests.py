"""Planted faults: each must be found by the test that looks for it, before a step is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from surgery.data.trainers.recorded import RecordedBatches
from surgery.errors import ConfigError, MismatchError, UsageError
from surgery.midtraining import step
from surgery.midtraining.experts import EXPERTS, REGISTERED
from surgery.midtraining.loop import fresh_state, prepare, train
from surgery.midtraining.run_file import make_run
from surgery.midtraining.schedule import Schedule
from surgery.midtraining.selftests import TESTS, fingerprints, moved, self_test
from tests import tiny
from tests.test_midtrain_loop import LENGTH, Kept, record, settings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny.save(family, tmp_path_factory.mktemp("m") / family, l=2, h=48, f=40, m=16)
        return made[family]

    return get


@pytest.fixture
def job(model, tmp_path):
    def get(family: str = "llama", packed: bool = True, **more):
        batches = record(tmp_path / "b.npz", masked=False, packed=packed)
        return prepare(make_run(settings(model(family), batches, tmp_path, **more)))

    return get


def fault(job) -> str:
    """The test that fails, and what it says; the others before it passed."""
    told = []
    with pytest.raises(MismatchError) as error:
        self_test(job, told.append)
    assert [r.passed for r in told] == [True] * (len(told) - 1) + [False]
    assert f"skip_self_tests: [{told[-1].name}]" in str(error.value)
    return f"{told[-1].name}: {told[-1].detail}"


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen2", "mixtral", "olmoe", "gpt_neox", "glm4_moe", "gpt2"])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_a_sound_run_passes(family, precision, tiny_hf, tmp_path):
    batches = record(tmp_path / "b.npz", masked=True, packed=True)
    value = settings(tiny_hf(family), batches, tmp_path, precision=precision, experts="padded")
    one = prepare(make_run(value))
    results = self_test(one)
    assert [r.name for r in results] == list(TESTS) and all(r.passed for r in results)
    before, state = fingerprints(one.weights()), fresh_state(one)
    found = []

    def after(job, state):
        if state["progress"].step == 1:
            found.append(moved(job, before))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(one, state, Kept(), [after])
    assert "parameters have changed" in found[0].detail


def test_the_future_leaks(job):
    one = job()
    layer = one.model.model.layers[1]
    layer.register_forward_hook(lambda _, __, out: out + 0.01 * out.mean(1, keepdim=True))
    assert fault(one).startswith("causality: other tokens later in a row change earlier places by")


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_the_future_leaks_where_products_are_rounded(job, precision):
    one = job(precision=precision)
    one.model.model.layers[0].register_forward_hook(lambda _, __, out: out + 0.3 * out.flip(1))
    assert fault(one).startswith("causality")


def test_documents_leak(job, monkeypatch):
    def leaking(model, part, across=False):
        return step_hidden(model, part, True)

    step_hidden = step.hidden_states
    monkeypatch.setattr("surgery.midtraining.selftests.hidden_states", leaking)
    assert fault(job()).startswith("isolation: the second document of a row sees the first")
    assert "not needed" in self_test(job(packed=False))[3].detail


def test_a_wrong_kernel_of_experts(job):
    def blind(module, x, experts, weights):
        return EXPERTS["loop"].run(module, x, experts, weights.detach())

    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    one = job("olmoe")
    ALL_EXPERTS_FUNCTIONS.register(REGISTERED + "wrong", blind)
    one.model.set_experts_implementation(REGISTERED + "wrong")
    assert fault(one).startswith("experts: the gradients of weights differ from the plain loop's by")

    def wrong(module, x, experts, weights):
        return EXPERTS["loop"].run(module, x, experts.clamp(max=module.num_experts - 2), weights)

    ALL_EXPERTS_FUNCTIONS.register(REGISTERED + "wrong", wrong)
    assert fault(one).startswith("experts: the ")


def test_a_rate_of_zero(job):
    one = job()
    idle = replace(one.course, schedule=Schedule(peak=0.0, steps=20, decay=20))
    assert fault(replace(one, course=idle)) == "learning_rate: the learning rate of step 1 is 0"


def test_weights_that_are_not_those_of_the_source(job):
    one = job()
    with torch.no_grad():
        layer = one.model.model.layers[0].self_attn
        layer.q_proj.weight.copy_(layer.q_proj.weight.flip(0))
    assert fault(one).startswith("conversion: the model's loss is")


def test_a_head_that_is_not_the_models(job):
    one = job()
    one.model.lm_head.register_forward_hook(lambda _, __, out: out / 2)  # as a family with scaled logits has it
    assert fault(one).startswith("head: the loss from hidden states is")


def test_a_parameter_that_gets_no_gradient(job):
    one = job()
    mlp = one.model.model.layers[1].mlp
    mlp.up_proj.register_forward_hook(lambda _, __, out: out.detach())
    assert fault(one) == "gradient: no gradient reaches 1 parameters: model.layers.1.mlp.up_proj.weight"


def test_ids_beyond_the_vocabulary(job, tmp_path):
    one = job()
    np.savez(tmp_path / "b.npz", input_ids=np.full((20, 6, 24), 264))
    with pytest.raises(ConfigError, match="the data hold the id 264, and the model has 264 ids"):
        prepare(make_run(settings(one.source.path, tmp_path / "b.npz", tmp_path)))
    changed = replace(one, batches=RecordedBatches(tmp_path / "b.npz"))
    assert fault(changed) == "vocabulary: the data hold the id 264, and the model has 264 ids"


def test_rows_longer_than_what_the_model_was_made_for(tmp_path):
    """Where positions are learned there is no row for them; a rope goes on, and that is told."""
    batches, shorter = record(tmp_path / "b.npz", masked=False, packed=False), {"sequence_length": LENGTH // 2}
    for family, key in (("gpt2", "n_positions"), ("llama", "max_position_embeddings")):
        tiny.save(family, tmp_path / family, l=2, h=48, f=40, **{key: LENGTH - 1})
        fits = prepare(make_run(settings(tmp_path / family, batches, tmp_path, **shorter)))
        assert not any(note.startswith("rows have") for note in fits.notes)
    with pytest.raises(ConfigError, match="rows have 24 tokens, and the model has 23 learned positions"):
        prepare(make_run(settings(tmp_path / "gpt2", batches, tmp_path)))
    told = prepare(make_run(settings(tmp_path / "llama", batches, tmp_path))).notes
    assert any("rows have 24 tokens, more than the 23 that the model was made for" in note for note in told)


def test_a_parameter_that_does_not_move_and_one_that_should_not(job):
    one = job(freeze=["embedding"])
    before = fingerprints(one.weights())
    lost = one.optimizer.param_groups[0]["params"].pop()
    name = one.optimizer.param_groups[0]["names"].pop()
    assert lost is one.model.get_parameter(name)

    def stop(job, state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(one, fresh_state(one), Kept(), [stop])
    with pytest.raises(MismatchError, match=f"1 parameters did not change in the first step: {name}"):
        moved(one, before)
    with torch.no_grad():
        lost += 1e-3
        one.model.model.embed_tokens.weight[3, 4] += 1e-6
    with pytest.raises(MismatchError, match=r"1 frozen parameters changed: model\.embed_tokens\.weight"):
        moved(one, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_many_elements_up_as_down_are_a_change(dtype):
    """Of a norm's weights, which are all near one: Adam's first step is the rate, whatever the gradient's size."""
    step = torch.tensor([1, -1, -1, 1, 1, -1, 1, -1], dtype=dtype) / 64
    weight = torch.full((8,), 1.5, dtype=dtype)
    apart = (weight + step).view(torch.int32 if dtype == torch.float32 else torch.int16).sum()
    assert apart == weight.view(torch.int32 if dtype == torch.float32 else torch.int16).sum()  # what a plain sum says
    assert fingerprints({"norm": weight + step}) != fingerprints({"norm": weight})
    assert fingerprints({"norm": weight.clone()}) == fingerprints({"norm": weight})


def test_tests_can_be_left_out_by_name(job):
    one = job()
    one.model.model.layers[1].register_forward_hook(lambda _, __, out: out + out.mean(1, keepdim=True))
    skipping = one.run.model_copy(update={"skip_self_tests": ("causality", "isolation", "conversion")})
    results = self_test(replace(one, run=skipping))
    assert [r.name for r in results] == [n for n in TESTS if n not in skipping.skip_self_tests]
    with pytest.raises(UsageError, match="there is no test casuality"):
        self_test(replace(one, run=one.run.model_copy(update={"skip_self_tests": ("casuality",)})))


def test_what_stands_against_a_run_is_said_before_anything_is_loaded(model, tmp_path):
    batches = record(tmp_path / "b.npz", masked=False, packed=False)

    def refused(**schedule) -> str:
        with pytest.raises(ConfigError) as error:
            prepare(make_run(settings(model("llama"), batches, tmp_path, schedule={"start_lr": 1e-3, **schedule})))
        return str(error.value)

    assert "stands at 1,859,665: it is over" in refused(offset=1_859_665)
    assert "learning rate is 0 in steps 16 to 20 of 20" in refused(offset=5, count_decay_from=0)
    assert "learning rate is 0 in steps 1 to 20 of 20" in refused(name="constant", start_lr=0.0)
    prepare(
        make_run(settings(model("llama"), batches, tmp_path, schedule={"start_lr": 1e-3, "warmup": 3}, convention="hf"))
    )
