"""Merge methods by name: each a function of aligned blocks with a declared contract.

registry.py         every method by name                  linear.py         linear, passthrough, nearswap
slerp.py            slerp, nuslerp, multislerp            karcher.py        the Karcher mean
task_arithmetic.py  TIES, DARE, DELLA, breadcrumbs ...    thinning.py       which elements of a task vector stay
model_stock.py      Model Stock    sce.py   SCE           ram.py   RAM      arcee_fusion.py   Arcee Fusion
"""
