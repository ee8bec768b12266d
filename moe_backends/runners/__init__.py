"""One module per kernel choice; each holds an `ExpertRunner` (see `moe_backends/runner.py`)."""
