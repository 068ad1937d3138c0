"""How good a model is: loss and bits per byte on rows and texts, log-likelihoods of answers; in a run or by itself."""
