"""Measurements: FLOPs, memory, overheads. Each is a program with a main."""
