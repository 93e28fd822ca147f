"""What a process needs: logging, signals, ranks, compiled functions, optional imports, locks, suggestions."""
