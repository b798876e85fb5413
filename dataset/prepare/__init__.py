"""Offline preparation of training folders, their check, and the demo. Training does not import this package.

See python -m dataset.prepare --help.
"""
