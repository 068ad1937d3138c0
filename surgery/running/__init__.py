"""The one place that runs models: whole or layer by layer, for logits, losses, activations, talk.

loading.py      a folder into transformers, safely        whole.py        a run with every module watched
layerwise.py    one layer in memory at a time             expertwise.py   and of a layer one expert
activations.py  statistics of a dense model on a text     tokens.py       ids of prose, a text, or random ones
loss.py         loss on a text                            chat.py         `surgery ask`
device.py       on the CPU or a GPU                       prose.txt       a text that comes along
expected.py     would transformers load a folder?         rowwise.py      and of a matrix a block of rows
before_head.py  up to the head, whose logits are made for some ids at a time
"""
