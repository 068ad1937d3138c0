"""Meta's consolidated.NN.pth with params.json.

format.py   the steps of the format      config.py   params.json <-> Spec      table.py   the tensors
"""
