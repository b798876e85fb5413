"""Offline preparation: raw downloads to a training folder, the doctor, the demo. Training imports nothing of it.

python -m dataset.prepare --help says how to use it.
"""
