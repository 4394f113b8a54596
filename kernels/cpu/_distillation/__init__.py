"""The loops behind `distillation.py`."""
