"""What lies at a path, whatever it is: a sentence, what can be read of it, and the next step.

    answer = describe("runs/seed-1/global_step5")
    answer.what          # "a checkpoint of DeepSpeed ZeRO-3: every rank holds a slice of all weights"
    answer.next          # ("python zero_to_fp32.py ... whole",)

kind.py      a kind of file or folder, and an answer     folders.py, trainers.py, files.py   tables of kinds
folder.py    the names in a folder                       facts.py                            what configs say
contents.py  tensors and pickles' names                  missing.py                          paths that are not there
look.py      the first kind that fits

Checkpoints that surgery converts are known to `surgery.formats`, which stands above: it is asked by `known`.
"""

from surgery.recognising.kind import Answer
from surgery.recognising.look import describe, unread

__all__ = ["Answer", "describe", "unread"]
