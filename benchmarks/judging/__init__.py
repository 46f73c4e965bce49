"""The judge of the census: what it measures, where it runs, and its tables."""
