"""The doctor: one of each thing that a run needs, done for real, and what to do about what does not work."""
