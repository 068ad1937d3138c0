"""Merge methods by name: each a function of aligned blocks with a declared contract.

registry.py   every method by name                 elementwise.py   linear, passthrough ...
spheres.py    slerp and its family                 tasks.py         task vectors: TIES, DARE, DELLA ...
thinning.py   which elements of a task vector stay  consensus.py    Model Stock, SCE
fusion.py     Arcee Fusion
"""
