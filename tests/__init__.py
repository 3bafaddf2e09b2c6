"""The tests. They import each other from the root of the repository, as `tests.support.cases`."""
