"""Where ranges run: in the caller, in threads, in processes, in workers of joblib."""
