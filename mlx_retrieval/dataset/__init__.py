"""Read data: rows and their formats, sources, evaluation folders; knows no models."""
