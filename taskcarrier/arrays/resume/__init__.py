"""Records of what a run has computed, so that a later run can continue it."""
