"""The exact batches of other trainers' runs.

megatron_order.py megatron_batches.py    Megatron-LM
olmo_order.py olmo_batches.py            OLMo and OLMo-core
recorded.py                              any other, from an .npz
"""
