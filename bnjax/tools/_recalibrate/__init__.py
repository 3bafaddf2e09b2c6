"""Statistics of the population: a program that gathers moments, its passes over batches, and what is made of them."""
