"""Upcycling: a dense checkpoint of any format becomes a mixture of experts of any format, with a proof.

    surgery.upcycle("SmolLM2-135M", "SmolLM2-moe", experts=64, top_k=8)

dense_to_moe/   settings, strategies, routers, targets       edit_experts/   experts pruned, merged, duplicated
attention_experts.py   groups of heads as experts            collapse.py     a mixture becomes dense again
proof.py        source and result run side by side           distance.py     how far their logits are apart
run.py          plan, write, prove                           api.py          upcycle, experts, collapse
request.py      what can be asked
"""
