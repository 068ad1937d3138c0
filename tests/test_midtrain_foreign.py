"""Configs of OLMo, GPT-NeoX and Megatron as runs: what is said, and what is named because no key says it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.data.plans.mixture import read_mixture
from surgery.errors import ConfigError
from surgery.midtraining.foreign import read_foreign, translated, write_foreign
from surgery.midtraining.run_file import read_run

OLMO = """
run_name: anneal
seed: 42
model: {d_model: 4096, max_sequence_length: 4096}
optimizer: {name: adamw, learning_rate: 6.1499e-5, weight_decay: 0.1, eps: 1.0e-8, decay_norm_and_bias: true,
            decay_embeddings: false, betas: [0.9, 0.95], metrics_log_interval: 1}
scheduler: {name: linear_with_warmup, t_warmup: 0, alpha_f: 0}
softmax_auxiliary_loss: true
auxiliary_loss_multiplier: 1.0e-5
load_path: step928646
reset_trainer_state: true
save_folder: out
max_duration: 50e9T
global_train_batch_size: 1024
device_train_microbatch_size: 2
precision: amp_bf16
max_grad_norm: 1.0
data: {paths: [a.npy, b.npy], label_mask_paths: [a.mask, b.mask], memmap_dtype: uint32, num_workers: 32}
"""
NEOX = """
{"optimizer": {"type": "Adam", "params": {"lr": 0.0001, "betas": [0.9, 0.95], "eps": 1.0e-8}}, "min-lr": 1.0e-5,
 "lr_decay_style": "cosine", "warmup": 0.01, "train_iters": 1000, "train_batch_size": 64, "seq_length": 2048,
 "weight_decay": 0.1, "gradient_clipping": 1.0, "precision": "bfloat16", "hidden_size": 512,
 "sparsity_config": {"none": 1},
 "train_data_paths": ["x", "y"], "train_data_weights": [1, 3], "load": "ckpt", "save": "out"}
"""
MEGATRON = """
torchrun pretrain_gpt.py --lr 3.0e-5 --min-lr 0.0 --lr-decay-style linear --train-iters 6652 \\
  --global-batch-size 1024 --micro-batch-size 2 --seq-length 8192 --clip-grad 1.0 --weight-decay 0.1 --bf16 \\
  --adam-beta1 0.9 --adam-beta2 0.95 --data-path 0.3 web 0.7 math --load base --save out --moe-aux-loss-coeff 1e-2 \\
  --tensor-model-parallel-size 2 --override-opt_param-scheduler
"""


def weights(path: Path) -> dict[str, float | None]:
    return {source.paths[0]: source.weight for source in read_mixture(path).sources}


def test_olmo(tmp_path):
    (tmp_path / "config.yaml").write_text(OLMO)
    found = read_foreign("olmo", tmp_path / "config.yaml")
    assert set(found.left) == {"optimizer.decay_embeddings", "optimizer.metrics_log_interval"}
    write_foreign(found, tmp_path / "run.yaml")
    run, _ = read_run(tmp_path / "run.yaml")
    train = run.train
    assert (train.convention, train.batch_tokens, train.micro_batch) == ("olmo", {0: 1024 * 4096}, 2)
    schedule = train.schedule
    assert (schedule.name, schedule.start_lr.of(1), schedule.final_lr.of(1)) == ("linear", 6.1499e-5, 0)
    assert (str(train.length), train.clip_norm, train.z_loss) == ("50000000000 tokens", 1.0, 1e-5)
    assert train.optimizer.betas == (0.9, 0.95) and train.precision == "autocast"
    mixture = read_mixture(tmp_path / "run-data.yaml")
    assert mixture.sources[0].label_mask == ("a.mask", "b.mask") and mixture.sources[0].dtype == "uint32"
    assert (mixture.sequence_length, mixture.isolate) == (4096, False)


def test_neox(tmp_path):
    (tmp_path / "config.yml").write_text(NEOX)
    found = read_foreign("neox", tmp_path / "config.yml")
    assert set(found.left) == {"sparsity_config.none"}
    write_foreign(found, tmp_path / "run.yaml")
    run, _ = read_run(tmp_path / "run.yaml")
    assert run.train.schedule.final_lr.of(1e-4) == 1e-5 and str(run.train.schedule.warmup) == "1%"
    assert (run.train.batch_tokens, str(run.train.length)) == ({0: 64 * 2048}, "1000 steps")
    assert weights(tmp_path / "run-data.yaml") == {"x.bin": 1, "y.bin": 3}


def test_megatron(tmp_path):
    (tmp_path / "train.sh").write_text(MEGATRON)
    words = ["midtrain", str(tmp_path / "run.yaml"), "--from-megatron", str(tmp_path / "train.sh")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0 and "override_opt_param_scheduler" in done.output
    run, _ = read_run(tmp_path / "run.yaml")
    assert (run.train.batch_tokens, str(run.train.length)) == ({0: 1024 * 8192}, "6652 steps")
    assert (run.train.optimizer.betas, run.moe.balance, run.moe.rule) == ((0.9, 0.95), 0.01, "megatron")
    assert weights(tmp_path / "run-data.yaml") == {"web.bin": 0.3, "math.bin": 0.7}
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 1 and "exists" in again.output


def test_what_is_not_understood(tmp_path):
    with pytest.raises(ConfigError, match=r"scheduler.name is 'cosine_linear_envelope'"):
        translated("olmo", {"scheduler.name": "cosine_linear_envelope"})
    assert "reset_trainer_state" in translated("olmo", {"reset_trainer_state": False}).left
    with pytest.raises(ConfigError, match=r"optimizer.name is 'lionw'"):
        translated("olmo", {"optimizer.name": "lionw"})
    text = translated("olmo", {"max_grad_norm": 0.5, "new_key": [1]}).text("data.yaml")
    assert "# not taken over: new_key: [1]" in text and "# still to be said: model" in text
    Path(tmp_path / "empty").write_text("torchrun x.py")
    with pytest.raises(ConfigError, match="holds no arguments"):
        read_foreign("megatron", tmp_path / "empty")
