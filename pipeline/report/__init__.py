"""The report of a run, and the shared parts of all pages."""
