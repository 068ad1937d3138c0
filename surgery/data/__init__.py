"""Token files, mixtures and their order: from text to the exact batches of a run.  No torch.

files/         token files of any program, opened as one stream of documents
tokenizing/    text -> token files
trainers/      the batches of other trainers' runs: Megatron-LM, OLMo, recorded ones
plans/         mixtures by token budget -> a plan on disk -> the batches of any step
rows.py        what a training loop takes, whichever of them gives it
inspection.py  what a token file is; payload_index.py gives one an .idx
show.py        what a batch holds
strict.py      YAML as strict models
extra.py       libraries that only some work needs
"""
