"""Data for the experiments: images, text, and the pipelines that batch them."""
