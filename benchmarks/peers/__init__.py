"""Programs that ``benchmarks.against_peers`` runs side by side, one process each."""
