"""Training many replicates of small networks at once, and the strategies that are compared at equal epochs."""
