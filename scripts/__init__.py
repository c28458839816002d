"""What writes data, measurements, tables and figures; from the checkout: `python -m scripts.report.tables`."""
