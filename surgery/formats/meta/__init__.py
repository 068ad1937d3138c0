"""Meta's consolidated.NN.pth with params.json."""
