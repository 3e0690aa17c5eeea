"""Results of a run: files, tables and plots."""
