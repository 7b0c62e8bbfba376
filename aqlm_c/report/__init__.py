"""What a run reports, as data, as tables, and what may be wrong with it."""
