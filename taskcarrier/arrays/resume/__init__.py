"""What a run has computed, so that another run can go on with it."""
