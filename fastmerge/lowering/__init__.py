"""From a teacher's code to the big student's: graphs that run all teachers at once.

Read `graph` first: it goes through a teacher's graph and says for each node what becomes of it, a value of `values`, which
also knows the operations that may run once on all streams. `computed_weights` adds what computes a layer's weight. Then
`fusion` puts each BatchNorm and the pattern that follows it into one call, and `programs` compiles the graphs and runs them.
"""
