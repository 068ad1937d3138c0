"""A dense model becomes a mixture of experts.

settings.py     what can be asked for              resolve.py    and what that means for a model
strategies.py   which neurons each expert gets     routers.py    what the router starts from
targets.py      families that can hold the result  build.py      parts -> parts, all lazy
measures.py     neurons that belong together       clusters.py   k-means of equal sizes
prompts.py      routers from texts                 noise.py      noise on copies
"""
