"""Are two checkpoints the same model?  Weights and configs in little memory, then, if asked, the logits.

    compare(open_checkpoint("A"), open_checkpoint("B"), max_memory=256 << 20).verdict
    compare_logits("A", "B").causes

compare.py   part by part, then the configs      logits.py    both through transformers, and how far apart
values.py    how two tensors differ              causes.py    experiments that find out why
configs.py   specs, facts, tokenizers            trials.py    one change at a time, run again
folders.py   `surgery.verify`: opens both         weights.py   a loaded model as parts that can be changed
readings.py  which reading of the files predicts a text
"""

from surgery.verification.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
