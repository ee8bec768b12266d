"""One layer on every kernel that runs here, ours and other projects' (baselines): time and error."""
