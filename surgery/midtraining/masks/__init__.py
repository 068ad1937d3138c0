"""What sparse attention sees: figures of its masks, and pictures."""
