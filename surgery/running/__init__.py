"""The one place that runs models: whole or layer by layer, for logits, losses, activations, talk.

whole.py        fp32 runs with every module watched       layerwise.py    one layer in memory at a time
activations.py  statistics of a dense model on a text     expertwise.py   and of a layer one expert
loss.py         loss on a text                            chat.py         `surgery ask`
device.py       on the CPU or a GPU                       prose.py        a text that comes along
"""
