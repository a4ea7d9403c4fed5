"""Rules: what an equation does to a kernel on its way."""
