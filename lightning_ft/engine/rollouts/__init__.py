"""Answers that the trained model writes itself: drawn, rewarded, measured, and turned into rows to learn from."""
