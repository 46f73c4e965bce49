"""Run-time pruning: networks that decide per input what to compute, and the engine that skips the rest."""
