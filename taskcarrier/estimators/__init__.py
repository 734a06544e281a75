"""Fits and predictions in the style of scikit-learn."""
