"""Commands: thin layers that parse, call the pipeline, print, and set the exit code."""
