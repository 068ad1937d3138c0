"""What sparse attention sees: figures of its masks (`figures.py`), and pictures (`picture.py`)."""
