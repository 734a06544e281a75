"""Where workers run: the only package that imports joblib, and only when a run needs it."""
