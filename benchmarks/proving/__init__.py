"""Random networks and the promises that every network and every plan must keep."""
