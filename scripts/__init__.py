"""What writes the project's data, measurements, tables and figures; run from the checkout: `python -m scripts.report.tables`."""
