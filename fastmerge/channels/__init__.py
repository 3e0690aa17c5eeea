"""Which channels of a network live and die together: found by running it on channel ids.

`ids` runs the graphs of `tracing` on ids instead of numbers, layers (`layer_calls`) by their own rule, every other operation by
`rules`, and fills a `record`. From that `grouping` makes the `groups`.
"""
