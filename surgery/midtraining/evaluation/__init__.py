"""How good a model is: loss and bits per byte on rows and texts, log-likelihoods of answers; in a run or by itself.

opened.py      the model and its tokenizer     run.py          all of an evaluation
rows.py        rows of plans and token files   domains.py      their losses, by domain
texts.py       windows of texts                likelihood.py   log-likelihoods in batches
tasks.py       OLMo's request files            suite.py        several of them, encoded once
harness.py     lm-eval itself                  resting.py      in the midst of training, without a trace
"""
