"""Reads photographs of any size and number: folders of image files by class, and ArrayRecord files."""
