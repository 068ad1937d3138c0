"""Continued pretraining of any checkpoint that surgery reads: one loop, and small functions that enter it."""
