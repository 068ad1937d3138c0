"""Token files, mixtures and their order: from text to the exact batches of a run.  No torch."""
