"""Tracking: records of what a run did."""
