"""The loops behind `cross_entropy`."""
