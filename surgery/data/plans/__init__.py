"""Mixtures by token budget, and their batches: `plan.py` writes a plan, `batches.py` reads any step of it.

mixture.py amounts.py apportion.py          what is wished, what there is, what each source gives
packing.py order.py                         documents -> instances, and when each comes
draft.py plan_file.py plan_sources.py       from the mixture to the plan on disk
fingerprint.py text_cache.py                what a plan stands on; text, tokenized once
turns.py                                    conversations longer than a row
"""
