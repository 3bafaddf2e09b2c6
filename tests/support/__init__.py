"""What tests share: the oracle, the tables of cases, ways to spread a batch, processes."""
