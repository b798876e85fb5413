"""Reports on finished runs: `python -m report` (tables, figures, pictures) and `python -m report.compare`."""
