"""The places where ranges run: the caller, threads, processes, and workers of joblib."""
