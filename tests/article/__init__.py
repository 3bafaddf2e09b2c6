"""Tests of the article's programs and of what fails in them."""
