"""The same model under lm-eval, EleutherAI's harness, with its own tasks; the extra [eval].

    found = run_harness(opened, ["arc_easy"], limit=200)["tasks"]["arc_easy"]["acc_norm"]

lm-eval loads its data sets from the Hugging Face hub or its cache; `include` is a folder with tasks of your own (YAML).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from surgery.errors import SurgeryError, UsageError, show, some
from surgery.midtraining.evaluation.opened import Opened

MISSING = "pip install 'checkpoint-surgery[eval]'"


def run_harness(
    opened: Opened, tasks: Sequence[str], *, include: str | None = None, limit: int | None = None, rows: int = 4
) -> dict[str, Any]:
    """Every number that lm-eval gives for each task, by its name without the filter: "acc_norm", "acc_norm_stderr".

    rows   that are run at once
    Raises SurgeryError if lm-eval is not installed, UsageError for tasks that it does not know or cannot load.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SurgeryError(f"lm-eval cannot be imported: {show(str(error), 200)}", hint=MISSING) from None
    manager = TaskManager(include_path=include)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise UsageError(f"lm-eval has no task {some(unknown)}", hint="`lm_eval ls tasks` names them all")
    tokenizer = _tokenizer(opened)
    model = HFLM(opened.model, tokenizer=tokenizer, backend="causal", max_length=opened.context, batch_size=rows)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where it says what it does
            found = simple_evaluate(
                model=model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
            )
    except Exception as error:  # whatever its tasks and their data sets raise
        what = f"lm-eval failed: {type(error).__name__}: {show(' '.join(str(error).split()), 300)}"
        hint = "its data sets must be in the cache of `datasets`, or the hub reachable"
        raise SurgeryError(what, hint=hint) from error
    assert found is not None
    return {"tasks": {task: _scores(numbers) for task, numbers in found["results"].items()}}


def _scores(numbers: dict[str, Any]) -> dict[str, Any]:
    """{"acc,none": 0.4, "alias": ...} -> {"acc": 0.4}."""
    named = {"sample_len": "documents"}
    kept = {named.get(k, k.partition(",")[0]): v for k, v in numbers.items() if isinstance(v, (int, float))}
    return {k: v for k, v in kept.items() if not isinstance(v, bool)}


def _tokenizer(opened: Opened) -> Any:
    from transformers import PreTrainedTokenizerFast

    vocabulary = opened.needed()
    tokens = {f"{role}_token": text for role in ("bos", "eos", "pad", "unk") if (text := vocabulary.text(role))}
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary.tokenizer, **tokens)
