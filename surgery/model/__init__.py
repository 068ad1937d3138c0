"""What a model is: its measures and choices (`Spec`), the parts it consists of, and the words for both.

    spec.part_names()                 ["embed", "layers.0.attn_norm", "layers.0.attn.q", ...]
    layout("attn.q")                  (g n d) h

spec.py      measures, choices, parts       fields.py   what is known of each field of Spec
wording.py   differences in words        sparse.py   which tokens each head sees
"""
