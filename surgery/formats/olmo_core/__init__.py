"""OLMo-core: a torch DCP folder with config.json.

format.py   the steps of the format     config.py         config.json -> Spec      rope.py   its rotary embeddings
table.py    the tensors                 write_config.py   Spec -> config.json      optimizer.py   Adam's state
"""
