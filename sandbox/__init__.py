"""Runs foreign code in isolation. Usable alone: `python -m sandbox program.py`."""
