"""The loops behind `batch_norm`."""
