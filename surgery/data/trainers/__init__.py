"""The exact batches of other trainers' runs.

megatron_order.py megatron_batches.py    Megatron-LM: the order of its samples, and what they hold,
megatron_run.py megatron_cache.py        from its settings or from its cache
olmo_order.py olmo_batches.py            OLMo and OLMo-core
recorded.py                              any other, from an .npz
"""
