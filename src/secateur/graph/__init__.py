"""Trace a model, group its units, prove the grouping."""
