"""What every run needs: session, checkpoints, signals, logs, processes and optimisers."""
