"""Settings of the runs: their fields, their files and the command line."""
