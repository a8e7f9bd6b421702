"""Claims, intervals, data and stored results: what a verdict rests on."""
