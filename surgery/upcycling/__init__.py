"""Upcycling: a dense checkpoint of any format becomes a mixture of experts of any format, with a proof.

surgery.upcycle("SmolLM2-135M", "SmolLM2-moe", experts=64, top_k=8)

settings.py     what can be asked for, from flags or a YAML recipe      resolve.py     and what that means for a model
strategies.py   which neurons of the dense mlp each expert gets         routers.py     what the router starts from
targets.py      which families can hold the result, and why not         build.py       parts -> parts, all lazy
chance.py       numbers that depend on their place alone                nodes.py       lazy gathers and factors
proof.py        source and result run side by side                      run.py         plan, write, prove
layerwise.py    one layer in memory at a time                           expertwise.py  and of that one expert
device.py       on the CPU or a GPU                                     api.py         upcycle, experts, collapse
selection.py    which experts of a mixture stay                         chosen.py      and which those are in a model
experts.py      and what that makes of the parts                        flags.py, command.py   the command line
collapse.py     a mixture becomes dense again                           attention.py   groups of heads as experts
measures.py     neurons that belong together, k-means routers           prompts.py     routers from texts
calibration.py  a dense model run on a text, layer by layer             clusters.py    k-means of equal sizes
"""
