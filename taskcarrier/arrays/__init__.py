"""Array faces on the waist: what becomes of arrays before, in and after a run."""
