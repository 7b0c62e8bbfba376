"""Sweeps: many runs over choices of options, evaluated and kept as rows. `study.sweep` is the verb."""
